"""What the devices of a mesh tell each other while each runs its own part of one model.

`dms_jax.spmd` runs a function once on every device, on the device's own rows, heads and columns of the weights. The
axis "tensor" of the mesh splits heads, feed-forward and vocabulary: devices of one row exchange the sums of two
projections in each layer, and once a step the embeddings, the logits and one number a row. Elsewhere, and on one
device, every function here returns its argument.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

AXIS = "tensor"

_devices = jax.make_user_context(1)


@contextlib.contextmanager
def among(devices: int) -> Iterator[None]:
  """What is traced inside runs on each of `devices` devices of the mesh axis "tensor"."""
  with _devices(devices):
    yield


def devices() -> int:
  """Devices that share the heads of a layer; 1 outside `among`."""
  return _devices.value


def summed(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
  """The sum of every device's `x`."""
  return lax.psum(x, AXIS) if devices() > 1 else x


def averaged(means: Sequence[Float[Array, "*rows 1"]]) -> list[Float[Array, "*rows 1"]]:
  """Means over the numbers of all devices, of each one's own over equally many; one exchange for all of `means`."""
  if devices() == 1:
    return list(means)
  return jnp.split(lax.pmean(jnp.concatenate(means, axis=-1), AXIS), len(means), axis=-1)


def first_own(count: int, whole: int) -> Int[Array, ""] | int:
  """The number of this device's first entry, where each device holds `count` of `whole`; 0 where each holds all."""
  return lax.axis_index(AXIS) * count if count < whole else 0


def looked_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], vocab: int, look_up) -> Float[Array, "B T D"]:
  """`look_up(table, tokens)`, where `table` may hold this device's part of `vocab` rows."""
  if devices() == 1 or len(table) == vocab:
    return look_up(table, tokens)
  own = tokens - first_own(len(table), vocab)
  mine = (own >= 0) & (own < len(table))
  return summed(jnp.where(mine[..., None], look_up(table, jnp.where(mine, own, 0)), 0))


def gathered(logits: Float[Array, "*rows V"], vocab: int) -> Float[Array, "*rows vocab"]:
  """The logits of all `vocab` tokens, from every device's own."""
  if devices() == 1 or logits.shape[-1] == vocab:
    return logits
  return lax.all_gather(logits, AXIS, axis=logits.ndim - 1, tiled=True)


def on_all(mine: Bool[Array, "*rows"]) -> Bool[Array, "*rows"]:
  """Whether a row is marked on every device."""
  return lax.psum((~mine).astype(jnp.int32), AXIS) == 0 if devices() > 1 else mine


def on_any(mine: Bool[Array, "B"]) -> Bool[Array, "B"]:
  """Whether a row is marked on some device."""
  return lax.psum(mine.astype(jnp.int32), AXIS) > 0 if devices() > 1 else mine


def head_numbers(count: int) -> Int[Array, "K"]:
  """The numbers, among the KV heads of a layer, of the `count` ones of this device."""
  own = jnp.arange(count)
  return own + lax.axis_index(AXIS) * count if devices() > 1 else own


def own_heads(table: Float[Array, "heads ..."], count: int) -> Float[Array, "count ..."]:
  """The entries of this device's `count` heads in a table of all heads."""
  return lax.dynamic_slice_in_dim(table, lax.axis_index(AXIS) * count, count) if devices() > 1 else table
