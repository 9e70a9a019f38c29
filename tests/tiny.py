"""Tiny models for tests: random weights large enough that attention is peaked and gates decide both ways."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.model import Model
from dms_jax.params import flatten, init_params, param_table, unflatten

STDDEV = 0.12


def config(**overrides) -> ModelConfig:
  """2 layers, 4 query and 2 KV heads of 16, vocabulary 97."""
  defaults = dict(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=97)
  return ModelConfig(**{**defaults, **overrides})


def dms(**overrides) -> DMSConfig:
  """An adapter gate with a window of 5."""
  return DMSConfig(**{"window": 5, **overrides})


def model(
  cfg: ModelConfig | None = None, gates: DMSConfig | None = None, lora: LoRAConfig | None = None, *, seed=0,
  dtype=jnp.float32,
) -> Model:  # fmt: skip
  """A model in which no tensor is left at its initial zeros or ones, so that every one of them matters."""
  cfg = cfg or config()
  table = param_table(cfg, gates, lora)
  flat = flatten(init_params(table, jax.random.key(seed), jnp.float32, STDDEV))
  for i, (path, spec) in enumerate(table.items()):
    if spec.init in ("zeros", "ones"):
      noise = STDDEV * jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), i), spec.shape)
      flat[path] = flat[path] + noise
  return Model(unflatten({p: w.astype(dtype) for p, w in flat.items()}), cfg, gates, lora)


def tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
  """Random token ids, int32 [B, T]."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length)), jnp.int32)


def neuron_config(cfg: ModelConfig | None = None) -> ModelConfig:
  """`cfg` as Qwen3 with q/k norm, as the neuron gate's released checkpoints have it."""
  return dataclasses.replace(cfg or config(), family="qwen3", qk_norm=True, tie_embeddings=False)
