"""The PyTorch step that ours is timed against, by FlexAttention's formula on a CPU."""

import dataclasses
import sys

import pytest
import torch

from dms_jax.families import PRESETS
from experiments.bench import flex_attention, flex_step
from experiments.bench.cases import llama_config

SHAPE = dataclasses.replace(
  PRESETS["llama-3.2-1b"],
  num_layers=2,
  d_model=32,
  d_ff=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  vocab_size=61,
  eos_token_ids=(),
)


def formula(q, k, v, bias, window):
  group, t = q.shape[1] // k.shape[1], q.shape[2]
  wide = lambda x: x.repeat_interleave(group, dim=1)
  back = torch.arange(t)[:, None] - torch.arange(t)
  scores = q @ wide(k).transpose(-1, -2) * q.shape[-1] ** -0.5 + torch.where(back > window, wide(bias)[:, :, None], 0.0)
  return scores.masked_fill(back < 0, float("-inf")).softmax(-1).to(v.dtype) @ wide(v)


@pytest.mark.parametrize(("trainable", "together"), [("gates", 1), ("lora", 2), ("all", 1)])
def test_a_step_trains_what_it_says(trainable, together, monkeypatch):
  monkeypatch.setattr(flex_attention, "forms", lambda tokens, device: {"flex": formula})
  stepped = []
  adamw = torch.optim.AdamW

  def watched(params, **kwargs):
    stepped.extend((p, p.detach().clone()) for p in params)
    return adamw(params, **kwargs)

  monkeypatch.setattr(torch.optim, "AdamW", watched)
  found = flex_step.measure(llama_config(SHAPE), trainable, 4, 2, together, 24, 5, 1, "flex", device="cpu")
  assert found["tokens_per_second"] == pytest.approx(48 / found["step_seconds"]) and 0 <= found["loss"] < 10
  layers, targets = SHAPE.num_layers, 4
  base = 2 + 9 * layers + (not SHAPE.tie_embeddings)  # embedding, final norm; seven projections and two norms a layer
  assert len(stepped) == {"gates": layers, "lora": layers * (1 + 2 * targets), "all": layers + base}[trainable]
  assert any((p != before).any() for p, before in stepped)


def test_it_says_why_it_was_not_measured(monkeypatch):
  monkeypatch.setitem(sys.modules, "transformers", None)
  assert "transformers" in flex_step.measure(llama_config(SHAPE), "all", 4, 2, 1, 24, 5, 1, "flex")["skipped"]
