"""The building blocks of a decoder as pure functions: norms, RoPE, projections, MLP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dms_jax.collectives import averaged, joined, parted
from dms_jax.config import ModelConfig
from dms_jax.execution import Execution

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu_tanh": jax.nn.gelu,
  "gelu": partial(jax.nn.gelu, approximate=False),
}
FEW_WORDS = 1024  # rows of an embedding whose gradient is a matrix product


def rms_norm(
  x: Float[Array, "*batch C"], weight: Float[Array, "C"], eps: float, square: Float[Array, "*batch 1"] | None = None
) -> Float[Array, "*batch C"]:
  """x / rms(x) * weight over the last axis; statistics in float32, result in x's dtype.

  Args:
    square: the mean square, float32, where it is not that of these channels alone.
  """
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt((mean_square(x) if square is None else square) + eps)
  return weight.astype(x.dtype) * (x32 * scale).astype(x.dtype)


def mean_square(x: Float[Array, "*batch C"]) -> Float[Array, "*batch 1"]:
  """The mean of x's squares over the last axis, in float32."""
  x32 = x.astype(jnp.float32)
  return jnp.mean(x32 * x32, axis=-1, keepdims=True)


def norm(
  config: ModelConfig, x: Float[Array, "*batch C"], weight: Float[Array, "C"], bias: Float[Array, "C"] | None = None,
  square: Float[Array, "*batch 1"] | None = None,
) -> Float[Array, "*batch C"]:  # fmt: skip
  """The model's norm; a LayerNorm has a bias. `square`: of an RMSNorm, as `rms_norm` takes it."""
  if config.layer_norm:
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = rms_norm(x32, weight.astype(jnp.float32), config.rms_norm_eps)  # of what has no mean
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
  if not config.norm_plus_one:
    return rms_norm(x, weight, config.rms_norm_eps, square)
  return rms_norm(x.astype(jnp.float32), 1 + weight.astype(jnp.float32), config.rms_norm_eps, square).astype(x.dtype)


def norm_heads(
  config: ModelConfig, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], layer: dict
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """The RMSNorm of query heads and that of key heads: each head by itself, or all together, on all devices."""
  weights = layer["q_norm"], layer["k_norm"]
  if config.qk_norm_over == "head":
    return norm(config, q, weights[0]), norm(config, k, weights[1])
  flat = [x.reshape(*x.shape[:2], -1) for x in (q, k)]
  squares = averaged([mean_square(x) for x in flat])
  q_normed, k_normed = (
    norm(config, x, weight.reshape(-1), square=square) for x, weight, square in zip(flat, weights, squares, strict=True)
  )
  return q_normed.reshape(q.shape), k_normed.reshape(k.shape)


def scaled(x: Array, factor: float) -> Array:
  """`factor` x in x's dtype; no operation if the factor is 1."""
  return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """RoPE's radians per position for each pair of channels that it turns, float32 [H/2], scaled if configured."""
  half = np.arange(0, config.rotated, 2, dtype=np.float32) / config.rotated
  freq = (1.0 / (np.float32(config.rope_theta) ** half)).astype(np.float32)
  if (s := config.rope_scaling) is None:
    return freq
  if s.kind == "linear":
    freq = freq / np.float32(s.factor)
  elif s.kind == "yarn":
    kept = _yarn_kept(config)
    freq = freq / np.float32(s.factor) * (1 - kept) + freq * kept
  else:
    wavelength = 2 * math.pi / freq
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
      s.high_freq_factor - s.low_freq_factor
    )
    blended = (1 - smooth) * freq / s.factor + smooth * freq
    freq = np.where(wavelength > low, freq / s.factor, np.where(wavelength < high, freq, blended))
  return freq.astype(np.float32)


def _yarn_kept(config: ModelConfig) -> np.ndarray:
  """YaRN's share of each frequency that stays, float32 [H/2]: 1 for short waves, 0 for long ones."""
  s, size = config.rope_scaling, config.rotated
  assert s is not None

  def channel(rotations: float) -> float:
    """The channel pair whose wave turns so often within the original length."""
    turns = s.original_max_position_embeddings / (rotations * 2 * math.pi)
    return size * math.log(turns) / (2 * math.log(config.rope_theta))

  low, high = channel(s.beta_fast), channel(s.beta_slow)
  if s.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
  return 1 - np.clip(ramp, 0, 1).astype(np.float32)


def rope_tables(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
  """(cos, sin) of RoPE, each float32 [B, T, 1, H/2]; computed once per step for all layers.

  With a RoPE of its own in sliding layers, each is [2, B, T, 1, H/2]: that of the other layers, and theirs.
  """
  if config.local_rope_theta is not None:
    local = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    both = [rope_tables(dataclasses.replace(each, local_rope_theta=None), positions) for each in (config, local)]
    return jnp.stack([cos for cos, _ in both]), jnp.stack([sin for _, sin in both])
  angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
  factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor or 1.0
  return scaled(jnp.cos(angles)[:, :, None], factor), scaled(jnp.sin(angles)[:, :, None], factor)


def layer_rope(config: ModelConfig, tables: tuple[Array, Array], index: Array | int) -> tuple[Array, Array]:
  """The tables of one layer, out of `rope_tables`; of a turn by nothing if it has no RoPE."""
  if config.local_rope_theta is not None:
    slides, (cos, sin) = jnp.asarray(config.sliding_layers, jnp.int32)[index], tables
    return cos[slides], sin[slides]
  if not config.rope_layers:
    return tables
  turns, (cos, sin) = jnp.asarray(config.rope_layers)[index], tables
  return jnp.where(turns, cos, 1.0), jnp.where(turns, sin, 0.0)


def apply_rope(x: Float[Array, "B T heads H"], tables: tuple[Array, Array]) -> Float[Array, "B T heads H"]:
  """Rotates channels c and c + H/2 as a pair (Hugging Face's half-split convention), in float32; returns x's dtype.

  Channels past the tables' stay.
  """
  cos, sin = tables
  if (turned := 2 * cos.shape[-1]) == 0:
    return x
  if turned < x.shape[-1]:
    return jnp.concatenate([apply_rope(x[..., :turned], tables), x[..., turned:]], axis=-1)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """Rows of the embedding `table`.

  With at most `FEW_WORDS` rows the gradient is a matrix product with float32 sums. Each row of so small a vocabulary
  occurs thousands of times in a batch: a scatter would add its gradients one by one, on a GPU in the table's dtype.
  """
  return table[tokens]


def _look_up_backward(saved: tuple[Array, Array], gradient: Float[Array, "B T D"]) -> tuple[Array, None]:
  table, tokens = saved
  if len(table) > FEW_WORDS:
    return jnp.zeros_like(table).at[tokens].add(gradient), None
  hot = tokens.reshape(-1, 1) == jnp.arange(len(table))
  flat = gradient.reshape(-1, gradient.shape[-1])
  return _contract(hot.astype(gradient.dtype), flat, 0, 0).astype(table.dtype), None


look_up.defvjp(lambda table, tokens: (table[tokens], (table, tokens)), _look_up_backward)


def linear(x: Array, weight: Array, num_inputs: int = 1, *, out_dtype=None) -> Array:
  """Contracts the last `num_inputs` axes of x [rows..., in...] with those of weight [out..., in...].

  Float32 operands keep their full precision on every device. Sums are in float32.

  Returns:
    [rows..., out...], rounded once, to `out_dtype`, by default x's dtype.
  """
  rows, outs = x.shape[: x.ndim - num_inputs], weight.shape[: weight.ndim - num_inputs]
  x2, weight2 = x.reshape(math.prod(rows), -1), weight.reshape(math.prod(outs), -1)
  how = Execution.choose()
  if x.dtype == jnp.bfloat16 and len(x2) <= how.weights_left:
    y = _weights_left(x2, weight2)
  elif x.dtype == jnp.float32 and len(x2) == 1 and how.matvec_parts > 1:
    y = _matvec_in_parts(x2, weight2, how.matvec_parts)
  else:
    y = _dot(x2, weight2)
  return y.reshape(*rows, *outs).astype(out_dtype or x.dtype)


@jax.custom_vjp
def _dot(a: Float[Array, "M in"], b: Float[Array, "N in"]) -> Float[Array, "M N"]:
  """a b^T with float32 sums and result; float32 operands keep their full precision.

  The backward pass first rounds the gradient to the operands' dtype. This loses nothing if the result was rounded to
  that dtype, too. A float32 gradient would make both products of the backward pass float32, several times slower on an
  accelerator.
  """
  return _contract(a, b, 1, 1)


def _dot_backward(operands: tuple[Array, Array], gradient: Float[Array, "M N"]) -> tuple[Array, Array]:
  a, b = operands
  gradient = gradient.astype(a.dtype)
  return _contract(gradient, b, 1, 0).astype(a.dtype), _contract(gradient, a, 0, 0).astype(b.dtype)


_dot.defvjp(lambda a, b: (_dot(a, b), (a, b)), _dot_backward)


def _contract(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  """The product of two matrices over an axis of each, in float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((axis_a,), (axis_b,)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _weights_left(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
  """x weight^T of few bfloat16 rows on a CPU, in float32: see `Execution.weights_left`.

  The barrier keeps XLA from swapping the operands back. One row is doubled: XLA's CPU backend has no bfloat16
  matrix-vector product and converts the whole matrix.
  """
  count = len(x)
  y = _dot(weight, jnp.concatenate([x, x]) if count == 1 else x)
  return jax.lax.optimization_barrier(y).T[:count]


def _matvec_in_parts(x: Float[Array, "1 in"], weight: Float[Array, "out in"], parts: int) -> Float[Array, "1 out"]:
  """x weight^T of one float32 row, as a batch of up to `parts` products: see `Execution.matvec_parts`."""
  parts = math.gcd(len(weight), parts)
  y = jax.lax.dot_general(
    weight.reshape(parts, -1, weight.shape[1]),
    jnp.broadcast_to(x, (parts, x.shape[1])),
    (((2,), (1,)), ((0,), (0,))),
    jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return y.reshape(1, -1)


def project(
  x: Array, layer: dict, name: str, num_inputs: int = 1, *, lora_scale: float | Array = 0.0, out_dtype=None,
  update: Array | None = None,
) -> Array:  # fmt: skip
  """`linear` by the projection called `name`, plus its low-rank update if the layer has one that is not merged.

  The result is named for `jax.checkpoint`: see `decoder.SAVED_ACTIVATIONS`.

  Args:
    lora_scale: factor of the update: a number, or a traced one or one a row [B].
    update: of `joint_updates`, if it is known.
  """
  y = linear(x, layer[name], num_inputs, out_dtype=out_dtype)
  if update is None and f"{name}_lora_a" in layer:
    update = _low_rank(x, layer, name, num_inputs, lora_scale, y.dtype)
  return checkpoint_name(y if update is None else y + update.astype(y.dtype), name)


def _low_rank(x: Array, layer: dict, name: str, num_inputs: int, scale: float | Array, dtype) -> Array:
  """The low-rank update `scale` B A x of the layer called `name`, in `dtype`."""
  a, b = (layer[f"{name}_lora_{side}"].astype(x.dtype) for side in "ab")
  by_row = scale.reshape(-1, 1, 1) if isinstance(scale, Array) else None
  if math.prod(x.shape[: x.ndim - num_inputs]) <= Execution.choose().joint_updates:
    x, a = (y.reshape(*y.shape[: y.ndim - num_inputs], -1).astype(jnp.float32) for y in (x, a))
    x = x if by_row is None else x * by_row
    down = jnp.sum(x[..., None, :] * a, axis=-1)
  else:
    down = linear(x, a, num_inputs)
    down = down if by_row is None else down.astype(jnp.float32) * by_row  # the short vectors
  scale = scale if by_row is None else 1.0
  return scaled(linear(down.astype(b.dtype), b, out_dtype=dtype), scale)


def join_updates(layer: dict, names: Sequence[str], joint: str) -> dict:
  """The layer with a low-rank update `joint` that stands for those of several projections of one input.

  Their matrices A stand one below another, and their matrices B along a diagonal. The layer itself without updates.
  """
  names = [name for name in names if f"{name}_lora_a" in layer]
  if not names:
    return layer
  a, b = ([layer[f"{name}_lora_{side}"] for name in names] for side in "ab")
  diagonal = jax.scipy.linalg.block_diag(*(w.reshape(-1, w.shape[-1]) for w in b))
  return layer | {f"{joint}_lora_a": jnp.concatenate(a), f"{joint}_lora_b": diagonal}


def joint_updates(
  x: Float[Array, "B T D"], layer: dict, names: Sequence[str], joint: str, scale: float | Array
) -> dict[str, Array]:
  """The low-rank updates of projections of x, float32 by name, by one of `join_updates`; none without it."""
  if f"{joint}_lora_a" not in layer:
    return {}
  up, found, start = _low_rank(x, layer, joint, 1, scale, jnp.float32), {}, 0
  for name in names:
    if f"{name}_lora_b" in layer:
      outputs = layer[name].shape[:-1]
      size = math.prod(outputs)
      found[name], start = up[..., start : start + size].reshape(*x.shape[:-1], *outputs), start + size
  return found


def biased(y: Array, layer: dict, name: str) -> Array:
  """y plus the layer's bias `name`; y itself in a model without it."""
  return y + layer[name].astype(y.dtype) if name in layer else y


def mlp(
  layer: dict, x: Float[Array, "B T D"], lora_scale: float | Array = 0.0, activation: str = "silu"
) -> Float[Array, "B T D"]:
  """Feed-forward: down(activation(gate(x)) * up(x)), which is SwiGLU with "silu", or down(activation(up(x))).

  It is summed over the devices that share the hidden units.
  """
  x, lora_scale = joined(x), joined(lora_scale) if jnp.ndim(lora_scale) else lora_scale
  of = lambda name: biased(project(x, layer, f"{name}_proj", lora_scale=lora_scale), layer, f"{name}_bias")
  if "gate_proj" in layer:
    hidden = ACTIVATIONS[activation](of("gate")) * of("up")
  else:
    hidden = ACTIVATIONS[activation](of("up"))
  return biased(parted(project(hidden, layer, "down_proj", lora_scale=lora_scale)), layer, "down_bias")
