"""What the devices of a mesh tell each other while each runs its own part of one model.

`dms_jax.spmd` runs a function once on every device, on the device's own rows, heads and columns of the weights. The
axis "tensor" of the mesh splits heads, feed-forward and vocabulary: devices of one row exchange the sums of two
projections in each layer, of three where a norm is over all heads, and once a step the embeddings, the logits and one
number a row. Elsewhere, and on one device, every function here returns its argument.

Where "tensor" does not divide the KV heads, it splits rows in their place, and feed-forward and vocabulary as before
(`sharding.Split`). A device then computes attention of its own rows. Before a feed-forward it gets the rows of
the others (`joined`), and after it the sum of its own (`parted`): again two exchanges a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from dms_jax.sharding import Split

AXIS = "tensor"

_devices = jax.make_user_context(1)
_by_rows = jax.make_user_context(False)


@contextlib.contextmanager
def among(split: Split) -> Iterator[None]:
  """What is traced inside runs on each device of a mesh, on its own part."""
  with _devices(split.head_parts), _by_rows(split.by_rows):
    yield


def devices() -> int:
  """Devices that share the heads of a layer; 1 outside `among`, and where they split rows."""
  return _devices.value


def summed(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
  """The sum of the `x` of every device that shares the heads."""
  return lax.psum(x, AXIS) if devices() > 1 else x


def joined(x: Shaped[Array, "B ..."]) -> Shaped[Array, "rows ..."]:
  """The rows of all devices that share a feed-forward or vocabulary: `x`, unless each has its own rows."""
  return lax.all_gather(x, AXIS, axis=0, tiled=True) if _by_rows.value else x


def parted(x: Num[Array, "rows ..."]) -> Num[Array, "B ..."]:
  """This device's rows of the sum of every device's `x`, of which `joined` gave the rows."""
  return lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True) if _by_rows.value else summed(x)


def own_rows(x: Shaped[Array, "rows ..."]) -> Shaped[Array, "B ..."]:
  """This device's rows of an `x` that every device has, of which `joined` gave the rows."""
  if not _by_rows.value:
    return x
  count = len(x) // lax.axis_size(AXIS)
  return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * count, count)


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
  if len(table) == vocab:
    return look_up(table, tokens)
  own = joined(tokens) - first_own(len(table), vocab)
  mine = (own >= 0) & (own < len(table))
  return parted(jnp.where(mine[..., None], look_up(table, jnp.where(mine, own, 0)), 0))


def multiplied(
  x: Float[Array, "*rows D"], table: Float[Array, "V D"], vocab: int, product
) -> Float[Array, "*rows vocab"]:
  """`product(x, table)`, the logits of all `vocab` tokens, where `table` may hold this device's part of their rows."""
  if len(table) == vocab:
    return product(x, table)
  logits = product(joined(x), table)
  if _by_rows.value:
    return lax.all_to_all(logits, AXIS, split_axis=0, concat_axis=logits.ndim - 1, tiled=True)
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
