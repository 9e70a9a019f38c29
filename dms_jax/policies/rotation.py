"""RoPE's rotations for policies: at given positions, undone, or averaged over positions to come."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dms_jax.config import ModelConfig
from dms_jax.layers import rope_frequencies


def frequencies(config: ModelConfig, policy: str) -> Float[Array, "1 half"]:
  """RoPE's frequencies of a model whose keys `policy` turns.

  Raises:
    ValueError: RoPE is not the same turn of all channels in all layers.
  """
  if not config.plain_rope:
    raise ValueError(f"{policy} turns keys by RoPE, and in this {config.family} model not all are turned alike")
  return jnp.asarray(rope_frequencies(config))[None]


def turned(x: Float[Array, "*n H"], turn: tuple[Array, Array]) -> Float[Array, "*n H"]:
  """Channels c and c + H/2, as a complex number, times `turn` = (re, im), each [..., H/2]; float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  re, im = turn
  return jnp.concatenate([a * re - b * im, b * re + a * im], axis=-1)


def conjugate(turn: tuple[Array, Array]) -> tuple[Array, Array]:
  """The turn back: undoes a rotation, and is the transpose of an average of rotations."""
  return turn[0], -turn[1]


def rotation(frequencies: Float[Array, "1 half"], position: Int[Array, "*n"]) -> tuple[Array, Array]:
  """RoPE's turn at each position, float32 [*n, half] each."""
  angle = position[..., None].astype(jnp.float32) * frequencies[0]
  return jnp.cos(angle), jnp.sin(angle)


def mean_rotation(frequencies: Float[Array, "1 half"], start: Int[Array, "*n"], count) -> tuple[Array, Array]:
  """The mean of RoPE's turns at positions `start` .. `start + count - 1`, float32 [*n, half] each.

  It is the turn at the middle position, times sin(count w / 2) / (count sin(w / 2)); `count` is [] or [*n].
  """
  w, count = frequencies[0], jnp.asarray(count).astype(jnp.float32)[..., None]
  shrink = jnp.sin(count * w / 2) / (count * jnp.sin(w / 2))
  angle = (start[..., None].astype(jnp.float32) + (count - 1) / 2) * w
  return shrink * jnp.cos(angle), shrink * jnp.sin(angle)
