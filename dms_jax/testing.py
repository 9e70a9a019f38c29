"""Tiny random models for tests, with peaked attention and gates that decide both ways."""

from __future__ import annotations

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.decoder import Model
from dms_jax.params import map_table, param_table

STDDEV = 0.12

# Compiler options for functions that run a few times on many shapes: compilation takes a quarter of the time, a run
# takes longer.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
  QUICK["xla_cpu_use_fusion_emitters"] = False


def config(**overrides) -> ModelConfig:
  """2 layers, 4 query and 2 KV heads of 16, vocabulary 97."""
  defaults = dict(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=97)
  return ModelConfig(**{**defaults, **overrides})


def dms(**overrides) -> DMSConfig:
  """An adapter gate with a window of 5."""
  return DMSConfig(**{"window": 5, **overrides})


def model(
  cfg: ModelConfig | None = None,
  gates: DMSConfig | None = None,
  lora: LoRAConfig | None = None,
  *,
  seed: int = 0,
  dtype=jnp.float32,
) -> Model:
  """A model with random values in every tensor, even those that training starts at 0 or 1, so that each one matters."""
  cfg = cfg or config()

  def leaf(path, spec):
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])  # numpy: JAX would compile each shape
    scale = math.prod(spec.shape[2:]) ** -0.5 if spec.init == "fan_in" else STDDEV
    return jnp.asarray(scale * rng.standard_normal(spec.shape) + (spec.init == "ones"), dtype)

  return Model(map_table(leaf, param_table(cfg, gates, lora)), cfg, gates, lora)


def tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
  """Random token ids, int32 [B, T]."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length)), jnp.int32)


def neuron_config(cfg: ModelConfig | None = None) -> ModelConfig:
  """`cfg` in the Qwen3 family, with q/k norm and untied embeddings, like NVIDIA's checkpoints with the neuron gate."""
  return dataclasses.replace(cfg or config(), family="qwen3", qk_norm=True, tie_embeddings=False)
