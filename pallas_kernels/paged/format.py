"""Page formats: how a pool's pages store keys and values, quantised or not.

A *slot* is one token's key and value. Its cells are one row of the pool; a format with scales multiplies the key and
the value by one float32 each.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.common.platform import platform


@dataclasses.dataclass(frozen=True)
class PageFormat:
  """A pool's cells, their scales and their size. The kernels tell formats apart by the pool's dtype.

  Another format is a subclass with its own `width`, `encode` and `widened`, an entry in `FORMATS`, and the decode of
  its cells in the kernels that should read it.

  Fields:
    name: "float" for cells that are the numbers themselves (2H a slot), else a key of `FORMATS`.
    dtype: of a cell; uint16 holds the bits of bfloat16.
    largest: the cell of a key's or value's largest magnitude; None: the format has no scales.
  """

  name: str
  dtype: np.dtype
  largest: float | None = None

  @property
  def scaled(self) -> bool:
    return self.largest is not None

  def width(self, head_dim: int) -> int:
    """Cells of a slot."""
    return 2 * head_dim

  def encode(self, rows: Shaped[Array, "*n numbers"]) -> tuple[Shaped[Array, "*n cells"], Float[Array, "*n 2"] | None]:
    """(cells, float32 scales of key and value or None) of slots, numbers or the bits of bfloat16."""
    if not self.scaled:
      return rows, None
    pairs = floats(rows).astype(jnp.float32).reshape(*rows.shape[:-1], 2, rows.shape[-1] // 2)
    scales = jnp.max(jnp.abs(pairs), axis=-1) / self.largest
    cells = pairs / jnp.where(scales == 0, 1.0, scales)[..., None]
    cells = jnp.round(cells) if jnp.issubdtype(self.dtype, jnp.integer) else cells
    return cells.astype(self.dtype).reshape(rows.shape), scales

  def decode(self, cells: Shaped[Array, "*n cells"], scales: Float[Array, "*n 2"] | None) -> Float[Array, "*n numbers"]:
    """The inverse of `encode`; float32 if there are scales."""
    if scales is None:
      return floats(cells)
    numbers = self.widened(cells, jnp.float32)
    pairs = numbers.reshape(*numbers.shape[:-1], 2, numbers.shape[-1] // 2) * scales[..., None]
    return pairs.reshape(numbers.shape)

  def widened(self, cells: Shaped[Array, "*n cells"], dtype) -> Float[Array, "*n numbers"]:
    """Cells as numbers before scaling, of `dtype` (which must hold them exactly) if there are scales."""
    return cells.astype(dtype) if self.scaled else floats(cells)

  def empty(self, pages: int, page: int, head_dim: int) -> tuple[Shaped[Array, "P page width"], Array | None]:
    """A pool of zeros and its scales, float32 [P, 1, 2 * page], if it has any."""
    scales = jnp.zeros((pages, 1, 2 * page), jnp.float32) if self.scaled else None
    return jnp.zeros((pages, page, self.width(head_dim)), self.dtype), scales

  def slot_bytes(self, head_dim: int) -> int:
    """Bytes of a slot, its scales included."""
    return self.width(head_dim) * self.dtype.itemsize + (8 if self.scaled else 0)

  def page_size(self) -> int:
    """Slots a page by default: 32, so that half a page a head, unused on average, is 1.5 % of a thousand tokens.

    64 with scales on a TPU, so that they fill a row of 128 lanes: XLA gives shorter rows another layout on v5p and v6e,
    and copies them in every layer.
    """
    return 64 if self.scaled and platform() == "tpu" else 32


FORMATS = {
  "int8": PageFormat("int8", jnp.dtype(jnp.int8), 127.0),
  "float8": PageFormat("float8", jnp.dtype(jnp.float8_e4m3fn), 448.0),
}


def format_of(dtype) -> PageFormat:
  """The format of a pool of `dtype`."""
  dtype = jnp.dtype(dtype)
  return next((form for form in FORMATS.values() if form.dtype == dtype), PageFormat("float", dtype))


def floats(rows: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Stored rows as numbers: uint16 holds the bits of bfloat16."""
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def scale_places(slot: Int[Array, "*n"]) -> Int[Array, "*n 2"]:
  """Where in its page's row of scales those of a slot's key and value are."""
  return 2 * slot[..., None] + jnp.arange(2)
