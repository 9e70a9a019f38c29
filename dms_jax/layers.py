"""The building blocks of a Llama-style decoder as pure functions: norm, rotary embedding, projection, MLP."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dms_jax.config import ModelConfig
from pallas_kernels.platform import platform


def rms_norm(x: Float[Array, "*batch C"], weight: Float[Array, "C"], eps: float) -> Float[Array, "*batch C"]:
  """x / rms(x) * weight over the last axis; statistics in float32, result in x's dtype."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return weight.astype(x.dtype) * (x32 * scale).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians per position of each channel pair, float32 [H/2], with Llama 3.1's scaling where the config has it."""
  half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
  freq = (1.0 / (np.float32(config.rope_theta) ** half)).astype(np.float32)
  if (s := config.rope_scaling) is not None:
    wavelength = 2 * math.pi / freq
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
      s.high_freq_factor - s.low_freq_factor
    )
    blended = (1 - smooth) * freq / s.factor + smooth * freq
    freq = np.where(wavelength > low, freq / s.factor, np.where(wavelength < high, freq, blended))
  return freq.astype(np.float32)


def rope_tables(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
  """(cos, sin), each float32 [B, T, 1, H/2]; computed once a step and shared by all layers."""
  angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def apply_rope(x: Float[Array, "B T heads H"], tables: tuple[Array, Array]) -> Float[Array, "B T heads H"]:
  """Rotates channel c with channel c + H/2 (Hugging Face's half-split convention), in float32."""
  cos, sin = tables
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def linear(x: Array, weight: Array, num_inputs: int = 1, *, out_dtype=None) -> Array:
  """Contracts the last `num_inputs` axes of x [rows..., in...] with those of weight [out..., in...].

  Float32 is not rounded first, whatever the device. Sums are in float32; the result [rows..., out...] is rounded once,
  to `out_dtype` or x's dtype.
  """
  rows, outs = x.shape[: x.ndim - num_inputs], weight.shape[: weight.ndim - num_inputs]
  x2 = x.reshape(math.prod(rows), -1)
  single = x2.shape[0] == 1 and x.dtype == jnp.bfloat16 and platform() == "cpu"
  if single:
    # XLA's CPU backend has no bfloat16 matrix-vector product (it converts the whole matrix, 10x slower than reading
    # it); two equal rows take its matrix-matrix path.
    x2 = jnp.concatenate([x2, x2])
  y = jax.lax.dot_general(
    x2, weight.reshape(math.prod(outs), -1), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
  )  # fmt: skip
  return (y[:1] if single else y).reshape(*rows, *outs).astype(out_dtype or x.dtype)


def project(x: Array, layer: dict, name: str, num_inputs: int = 1, *, lora_scale: float = 0.0, out_dtype=None) -> Array:
  """`linear` by the projection called `name`, with its low-rank update if the layer holds one unmerged."""
  y = linear(x, layer[name], num_inputs, out_dtype=out_dtype)
  if f"{name}_lora_a" in layer:
    down = linear(x, layer[f"{name}_lora_a"].astype(x.dtype), num_inputs)
    y = y + lora_scale * linear(down, layer[f"{name}_lora_b"].astype(x.dtype), out_dtype=y.dtype)
  return y


def mlp(layer: dict, x: Float[Array, "B T D"], lora_scale: float = 0.0) -> Float[Array, "B T D"]:
  """SwiGLU feed-forward."""
  gate, up = (project(x, layer, n, lora_scale=lora_scale) for n in ("gate_proj", "up_proj"))
  return project(jax.nn.silu(gate) * up, layer, "down_proj", lora_scale=lora_scale)
