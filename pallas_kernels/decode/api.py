"""Dispatch of decode attention."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels import dispatch
from pallas_kernels.decode import gpu, xla

IMPLEMENTATIONS = {"gpu": gpu.decode_attention, "xla": xla.decode_attention}


def decode_attention(
  q: Float[Array, "B N H"],
  kv: Float[Array, "L B K S 2*H"] | UInt16[Array, "L B K S 2*H"],
  layer: int | Int[Array, ""],
  lengths: Int[Array, "B K"],
  *,
  lse: bool = False,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H"] | tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
  """Attention of one query per row over the first `lengths[b, k]` slots of each KV head of one layer.

  Args:
    q: queries after RoPE.
    kv: the whole cache, a slot's key and value side by side; `layer` picks its first axis, nothing else is copied.
      uint16 holds the bits of bfloat16.
      Slots past the length are never used and may hold NaN.
    lengths: live slots; a head with none gives zeros.
    lse: also return the logarithm of each query's sum of exponentials, float32, -inf where the length is 0.
    implementation: None for the first able one, else a name or names in order.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  b, n, h = q.shape
  dispatch.check(kv.ndim == 5 and kv.shape[1] == b, f"kv {kv.shape} must be [L, B={b}, K, S, 2H]")
  dispatch.check(kv.shape[4] == 2 * h, f"kv's last axis is {kv.shape[4]}, expected 2H = {2 * h}")
  dispatch.check(n % kv.shape[2] == 0, f"N={n} query heads are not a multiple of K={kv.shape[2]} KV heads")
  dispatch.check(lengths.shape == (b, kv.shape[2]), f"lengths {lengths.shape} must be [B, K] = {(b, kv.shape[2])}")
  return dispatch.call("decode", IMPLEMENTATIONS, implementation, q, kv, layer, lengths, lse=lse)
