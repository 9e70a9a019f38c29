"""Inputs that tests of several files share."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dms_jax import checkpoint, families
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig, RopeScaling
from dms_jax.generation.results import Result
from dms_jax.model import Model
from dms_jax.params import flatten, map_table, param_table
from dms_jax.tokenizer import byte_tokenizer
from tests import oracle

# Golden outputs of NVIDIA's PyTorch code ------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
GATES = {"separate_head": "adapter", "neuron_head": "neuron"}


@functools.cache
def load_golden(kind: str) -> tuple[Model, dict[str, np.ndarray]]:
  """The model of golden set `kind`, a key of `GATES`, and its arrays."""
  raw = json.loads((GOLDENS / f"{kind}.config.json").read_text())
  cfg = ModelConfig(
    "qwen3", raw["num_hidden_layers"], raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"],
    raw["num_key_value_heads"], raw["head_dim"], raw["vocab_size"], raw["max_position_embeddings"], raw["rope_theta"],
    None, raw["rms_norm_eps"], raw["tie_word_embeddings"], qk_norm=True, eos_token_ids=(raw["eos_token_id"],),
  )  # fmt: skip
  dms = DMSConfig(GATES[kind], raw["dms_window_size"], raw["dms_alpha_scale"], raw["dms_initial_alpha_offset"], shift=1)
  state = load_file(GOLDENS / f"{kind}.safetensors")

  def leaf(_, spec):
    if not spec.layered:
      return jnp.asarray(state[spec.hf_name]).reshape(spec.shape)
    layers = [state[spec.hf_name.format(layer=i)].reshape(spec.shape[1:]) for i in range(cfg.num_layers)]
    return jnp.asarray(np.stack(layers))

  golden = dict(np.load(GOLDENS / f"{kind}_f32.npz"))
  return Model(map_table(leaf, param_table(cfg, dms)), cfg, dms), golden


# Configs --------------------------------------------------------------------------------------------------------------


def changed(config: Any, **changes: Any) -> Any:
  """`config` with other values; `loss__tau=1.0` changes the field `tau` of the nested config `loss`."""
  fields: dict[str, Any] = {}
  for name, value in changes.items():
    section, _, field = name.partition("__")
    fields.setdefault(section, {}).update({field: value} if field else {"": value})
  return dataclasses.replace(
    config, **{n: v[""] if "" in v else changed(getattr(config, n), **v) for n, v in fields.items()}
  )


_SHAPE = dict(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=97)


def family(name: str, **changes: Any) -> ModelConfig:
  """A tiny config of a family whose layers differ from Llama's."""
  return families.get(name).config(**{**_SHAPE, **changes})


OTHER_FAMILIES = {
  "phi3": family("phi3", tie_embeddings=False),
  "phi3-partial": family("phi3", rope_fraction=0.75, tie_embeddings=False),
  "olmo2": family("olmo2", tie_embeddings=False),
  "olmo3": family(
    "olmo3",
    num_layers=4,
    tie_embeddings=False,
    sliding_window=6,
    sliding_layers=(True, True, True, False),
    rope_theta=5e4,
    local_rope_theta=100.0,
    rope_scaling=RopeScaling(4.0, original_max_position_embeddings=32, kind="yarn"),
  ),
  "granite": family("granite", embed_scale=3.0, residual_scale=0.4, attention_scale=0.1, logit_divisor=2.0),
  "qwen3_moe": family(
    "qwen3_moe", tie_embeddings=False, d_ff=24, num_experts=5, experts_per_token=2, norm_experts=True
  ),
  "mixtral": family("mixtral", tie_embeddings=False, d_ff=24, num_experts=4, experts_per_token=2),
  "gpt_oss": family(
    "gpt_oss",
    d_ff=24,
    num_experts=4,
    experts_per_token=2,
    sliding_window=6,
    sliding_layers=(True, False),
    swiglu_alpha=1.702,
    swiglu_limit=0.2,
    rope_scaling=RopeScaling(4.0, original_max_position_embeddings=32, kind="yarn", truncate=False),
    tie_embeddings=False,
  ),
  "gpt2": family("gpt2", num_kv_heads=4, head_dim=8),
  "gpt_neox": family("gpt_neox", num_kv_heads=4, rope_fraction=0.25, parallel=True, tie_embeddings=False),
  "gemma2": family(
    "gemma2",
    sliding_window=6,
    sliding_layers=(True, False),
    embed_scale=32**0.5,
    attention_scale=0.25,
    attention_softcap=2.0,
    logit_softcap=3.0,
  ),
  "gemma3": family(
    "gemma3_text",
    num_layers=3,
    sliding_window=6,
    sliding_layers=(True, False, True),
    embed_scale=32**0.5,
    attention_scale=0.25,
    local_rope_theta=100.0,
    rope_scaling=RopeScaling(4.0, kind="linear"),
  ),
  "smollm3": family("smollm3", num_layers=3, rope_layers=(True, False, True)),
}


# Checkpoints ----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def save_checkpoints(folder: Path) -> tuple[Path, Path]:
  """A tiny model with a byte tokenizer and a chat template, and a retrofit of it."""
  tokenizer = dataclasses.replace(byte_tokenizer(), settings={**byte_tokenizer().settings, "chat_template": TEMPLATE})
  cfg = tiny.config(vocab_size=257, max_position_embeddings=8192)
  checkpoint.save(folder / "base", tiny.model(cfg), tokenizer)
  gated = tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0), LoRAConfig(rank=2, scale=0.1))
  checkpoint.save(folder / "retrofit", gated, groups=("gate", "lora"))
  return folder / "base", folder / "retrofit"


# Files of tasks -------------------------------------------------------------------------------------------------------

SIX_LINES = "".join(
  f"Act {i}: First {i}. she\n{i % 4}\n" + "".join(f"end {i}{letter}.\n" for letter in "abcd") for i in range(4)
)


def write_mmlu(folder: Path) -> Path:
  for part, count in (("dev", 3), ("test", 2)):
    (folder / part).mkdir(parents=True)
    rows = "".join(f'" Q{part}{i}, ""so""? ",w{i},x{i},"y, {i}",z{i},{i % 4}\n' for i in range(count))
    (folder / part / f"high_school_physics_{part}.csv").write_text(
      "question,choice0,choice1,choice2,choice3,answer\n" + rows
    )
    (folder / part / f"anatomy_{part}.csv").write_text(
      "".join(f"q{part}{i},a,b,c,d,{'ABCD'[i]}\n" for i in range(count))
    )
  return folder


def write_gsm8k(path: Path, count: int = 4) -> Path:
  path.write_text(
    "".join(
      json.dumps({"question": f"How many {i}? ", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"})
      + "\n"
      for i in range(count)
    )
  )
  return path


# Pages of a pool ------------------------------------------------------------------------------------------------------


def check_pages(cache):
  """Every page is free or owned, as often as tables say; all live slots lie in owned pages. Returns the owners."""
  table, pool = jax.device_get((cache.table, cache.table.pool))
  owned = np.arange(table.pages.shape[3]) < table.owned[..., None]
  numbers, counts = np.unique(table.pages[owned], return_counts=True)
  owners = np.zeros(cache.pages, int)
  owners[numbers] = counts
  np.testing.assert_array_equal(owners, pool.owners)
  free = pool.free[: int(pool.count)]
  assert sorted([*free, *numbers]) == list(range(cache.pages))
  assert (-(-np.asarray(cache.archived) // cache.page_size) <= table.owned).all()
  return owners


def check_falling_thresholds(model: Model, start: float, prompts: list[list[int]], results: list[Result]):
  """Greedy answers under pressure are a float64 oracle's, whose threshold falls from `start` where results say so."""
  weights, close = {n: np.asarray(x) for n, x in flatten(model.stacked().params).items()}, 0
  for text, result in zip(prompts, results, strict=True):
    (given,), (tokens,) = result.given_up, result.tokens
    assert given and 0 < sum(one.tokens for one in given) and result.finish_reason == ["length"]
    whole = text + tokens
    limits = np.full(len(whole), start)  # of the token last kept: rounding must not tip it
    for one in given:
      levels, numbers = model.dms.levels, one.numbers
      limits[one.seen :] = numbers["threshold"] if levels is None else levels.threshold(numbers["cr"])
    assert (np.diff(limits) <= 0).all() and limits[-1] < limits[0]
    options = dict(window=model.dms.window, threshold=limits + 2e-5)
    logits, gates, seen = oracle.forward(weights, model.config, model.dms, whole, **options)
    for place, token in enumerate(tokens, len(text) - 1):
      best = np.sort(logits[place])[-2:]
      if best[1] - best[0] > 1e-3:
        assert logits[place].argmax() == token
      else:
        close += 1
    edge = np.abs(gates[..., None] - np.unique(limits)).min(axis=-1) < 1e-4
    held = seen[:, :, len(whole) - 2].sum()
    assert abs(held - result.held[0] * result.usage[0].heads) <= edge.sum()
  assert close < 5


# Comparison -----------------------------------------------------------------------------------------------------------

RTOL = 2e-5  # float32, two layers, of the logits' largest value


def close(actual, expected, rtol=RTOL):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)
