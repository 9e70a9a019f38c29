"""Every family against transformers on small random models: modules, logits, tokens, files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig, RopeScaling
from dms_jax.convert import convert, export
from dms_jax.convert.tensors import from_params
from dms_jax.decoder import _attention_inputs, embed, unembed
from dms_jax.execution import Execution
from dms_jax.layers import mlp, rms_norm, rope_tables
from dms_jax.model import forward
from dms_jax.params import param_table
from tests.helpers import OTHER_FAMILIES

# Sums of at most 64 products of numbers of size 1, in float32 and in another order.
MODULE, LOGITS = 2e-5, 1e-4

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32, kind="yarn", beta_fast=8.0)
CONFIGS = {
  "llama": tiny.config(tie_embeddings=False),
  "llama-multi-head": tiny.config(num_kv_heads=4, tie_embeddings=False, rms_norm_eps=1e-6),
  "llama-tied-llama3-rope": tiny.config(rope_theta=500000.0, rope_scaling=LLAMA3),
  "llama-head-dim": tiny.config(head_dim=24, d_ff=64, tie_embeddings=False),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, tie_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e6),
  "qwen2-tied": tiny.config(family="qwen2", qkv_bias=True, num_kv_heads=1),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32, rms_norm_eps=1e-6),
  "qwen3-tied": tiny.config(family="qwen3", qk_norm=True, num_kv_heads=4),
  "llama-linear-rope": tiny.config(rope_scaling=RopeScaling(factor=4.0, kind="linear"), tie_embeddings=False),
  "llama-yarn-rope": tiny.config(rope_scaling=YARN, tie_embeddings=False),
  "mistral": tiny.config(family="mistral", tie_embeddings=False),
}
LENGTH = 80  # beyond the llama3 scaling's 32 trained positions


@pytest.fixture(scope="module", params=[*CONFIGS, *OTHER_FAMILIES])
def pair(request, tmp_path_factory, transformers):
  """(our model, transformers' model from the directory we export, that directory, tokens [2, T])."""
  config = (CONFIGS | OTHER_FAMILIES)[request.param]
  model = tiny.model(config)
  path = export(tmp_path_factory.mktemp("pair") / "hf", model)
  return model, load_hf(transformers, path), path, tiny.tokens(config, 2, LENGTH)


def load_hf(transformers, path, dtype="float32"):
  model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
  return model.eval()


def to_torch(x):
  import torch

  return torch.from_numpy(np.array(x))


def hf_logits(hf, tokens) -> np.ndarray:
  import torch

  with torch.no_grad():
    return hf(to_torch(tokens).long()).logits.float().numpy()


def our_logits(model, tokens) -> np.ndarray:
  return np.asarray(jax.jit(lambda m, t: unembed(m, forward(m, t)[0]))(model, tokens))


@pytest.mark.parametrize("pair", CONFIGS, indirect=True)
def test_modules(pair, torch):
  model, hf, _, tokens = pair
  c, inner = model.config, hf.model
  layer = {name: w[0] for name, w in model.params["layers"].items()}
  block = inner.layers[0]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, c.d_model)), jnp.float32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
  close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs.numpy(), atol=MODULE, rtol=MODULE)
  with torch.no_grad():
    np.testing.assert_array_equal(embed(model, tokens), inner.embed_tokens(to_torch(tokens).long()).numpy())
    close(rms_norm(x, layer["attn_norm"], c.rms_norm_eps), block.input_layernorm(to_torch(x)))
    cos, sin = inner.rotary_emb(to_torch(x), to_torch(positions))
    ours = rope_tables(c, jnp.asarray(positions))
    # Angles reach 80 radians: float32 keeps 4e-6 of them.
    for table, theirs in zip(ours, (cos, sin), strict=True):
      np.testing.assert_allclose(
        np.tile(table[:, :, 0], 2), np.broadcast_to(theirs, (2, LENGTH, c.head_dim)), atol=1e-5
      )
    close(mlp(layer, x), block.mlp(to_torch(x)))

    q, k, v, _ = _attention_inputs(model, layer, x, ours, Execution(), 0.0)
    attention, normed = block.self_attn, block.input_layernorm(to_torch(x))
    heads = lambda y: y.view(2, LENGTH, -1, c.head_dim)
    theirs = [heads(p(normed)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if c.qk_norm:
      theirs[:2] = attention.q_norm(theirs[0]), attention.k_norm(theirs[1])
    rotate = lambda y: (
      y * cos.unsqueeze(2) + torch.cat([-y[..., c.head_dim // 2 :], y[..., : c.head_dim // 2]], -1) * sin.unsqueeze(2)
    )
    close(q, rotate(theirs[0]))
    close(k, rotate(theirs[1]))
    close(v, theirs[2])


def first_layers(config, count):
  by_layer = {name: getattr(config, name)[:count] for name in ("rope_layers", "sliding_layers")}
  return dataclasses.replace(config, num_layers=count, **by_layer)


def test_each_layer(pair, torch):
  model, hf, _, tokens = pair
  with torch.no_grad():
    states = hf.base_model(to_torch(tokens).long(), output_hidden_states=True).hidden_states
  first = 1 + next((index for index, slides in enumerate(model.config.sliding_layers) if not slides), 0)
  for count in range(first, model.config.num_layers):  # the last of `states` is already normed; logits compare it
    part = model.replace(
      config=first_layers(model.config, count),
      params={**model.params, "layers": {n: w[:count] for n, w in model.params["layers"].items()}},
    )
    np.testing.assert_allclose(forward(part, tokens)[0], states[count].numpy(), atol=LOGITS)


def test_logits(pair):
  model, hf, _, tokens = pair
  theirs = hf_logits(hf, tokens)
  assert theirs.std() > 0.1
  np.testing.assert_allclose(our_logits(model, tokens), theirs, atol=LOGITS)


def test_greedy_tokens(pair, torch):
  """Our cached decoding, compared with their cached decoding, from prompts of two lengths."""
  model, hf, _, tokens = pair
  for length in (1, 37):
    prompt = np.asarray(tokens)[:1, :length]
    with torch.no_grad():
      ids = to_torch(prompt).long()
      theirs = hf.generate(  # without a mask, it would guess one from the padding token
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
      )[0, length:].tolist()
    out = dms_jax.generate(
      model, prompt.tolist(), policy=dms_jax.Vanilla(window=6), max_new_tokens=40, eos=False, prefill_chunk=16,
      decode_block=8,
    )  # fmt: skip
    assert out.tokens[0] == theirs


def test_saved_by_transformers(pair, tmp_path):
  """Their directory -> our checkpoint -> our export -> transformers again: weights and logits to the bit."""
  model, hf, _, tokens = pair
  hf.save_pretrained(tmp_path / "theirs")
  loaded = checkpoint.load(convert(str(tmp_path / "theirs"), tmp_path / "ours"))
  assert loaded.config == model.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
  import transformers

  again = load_hf(transformers, export(tmp_path / "again", loaded))
  np.testing.assert_array_equal(hf_logits(again, tokens), hf_logits(hf, tokens))


def test_config_styles(pair, tmp_path):
  """transformers 5 writes rope_parameters and dtype; we write transformers 4's names, and both read the same."""
  model, hf, path, _ = pair
  hf.save_pretrained(tmp_path)
  theirs, ours = (json.loads((p / "config.json").read_text()) for p in (tmp_path, path))
  if model.config.rotated:
    assert "rope_parameters" in theirs and {"rope_theta", "rotary_emb_base"} & set(ours)
  assert type(hf).__name__ == ours["architectures"][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_to_the_bit(pair, transformers, tmp_path, dtype):
  model, _, _, _ = pair
  hf = load_hf(transformers, export(tmp_path / "hf", model, dtype=dtype, shard_bytes=20_000), dtype)
  assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
  state = hf.state_dict()
  for name, _, _, read in from_params(param_table(model.config), model.params, jnp.dtype(dtype)):
    if ".experts." in name:  # stacked in memory; `test_saved_by_transformers` compares them
      continue
    # Names in files, and in memory: of GPT-NeoX, and of Mixtral.
    name = {"embed_out.weight": "lm_head.weight"}.get(name, name).replace(".block_sparse_moe.", ".mlp.")
    np.testing.assert_array_equal(state[name].float().numpy(), read().astype(np.float32), err_msg=name)


def test_exported_retrofit(transformers, tmp_path):
  """Low-rank updates are merged for torch; gates lie beside and stay out of transformers' way."""
  model = tiny.model(CONFIGS["qwen3"], tiny.dms(), LoRAConfig(rank=3))
  tokens = tiny.tokens(model.config, 2, LENGTH)
  plain = model.replace(params=tiny.model(CONFIGS["qwen3"]).params, dms=None, lora=None)
  path = export(tmp_path / "hf", model)
  theirs = hf_logits(load_hf(transformers, path), tokens)
  np.testing.assert_allclose(our_logits(model, tokens), theirs, atol=LOGITS)
  assert np.abs(our_logits(plain, tokens) - theirs).max() > 0.1  # the updates matter
