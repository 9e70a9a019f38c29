"""Dispatch of decode attention."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.common import dispatch
from pallas_kernels.decode import gpu, tpu, xla
from pallas_kernels.paged.pages import Pages

IMPLEMENTATIONS = {"gpu": gpu.decode_attention, "tpu": tpu.decode_attention, "xla": xla.decode_attention}


def decode_attention(
  q: Float[Array, "B N H"],
  kv: Float[Array, "L B K S 2*H"] | UInt16[Array, "L B K S 2*H"] | None,
  layer: int | Int[Array, ""],
  lengths: Int[Array, "B K"] | None,
  *,
  pages: Pages | None = None,
  lse: bool = False,
  mass: bool = False,
  softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H"] | tuple:
  """Attention of one query per row over the live slots of each KV head of one layer, in one softmax.

  The first `lengths[b, k]` slots of `kv` and the first `pages.lengths[b, k]` of the archive in `pages` are live; either
  source may be None. Slots past the length are never used and may hold NaN.

  Args:
    q: queries after RoPE.
    kv: the whole cache, a slot's key and value side by side; `layer` picks its first axis, nothing else is copied.
      uint16 holds the bits of bfloat16.
    lengths: live slots; a head without any gives zeros. None if `kv` is None.
    lse: also return the logarithm of each query's sum of exponentials, float32 [B, N], sinks included; -inf for a sum
      of nothing.
    mass: also return the attention probability of each slot, summed over the query heads of its group: the pair
      (float32 [B, K, S], float32 [B, K, M * page]) for `kv` and `pages`, None for a missing source, 0 for dead slots.
    softcap: scores s, before any mask or bias, become softcap tanh(s / softcap) (Gemma 2); None leaves them.
    sinks: a logit for each query head, whose exponential joins the sum of the softmax and has no value (gpt-oss).
    implementation: None for the first able one, else a name or names in order.

  Returns:
    out, or the tuple (out, log-sum-exp if asked for, mass if asked for).

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: the implementations named cannot do the case.
  """
  b, n, h = q.shape
  check = dispatch.check
  check(kv is not None or pages is not None, "kv and pages are both None: nothing to attend to")
  check((kv is None) == (lengths is None), "kv and lengths go together: give both or neither")
  dispatch.check_sinks(sinks, n)
  if kv is not None:
    check(kv.ndim == 5 and kv.shape[1] == b, f"kv {kv.shape} must be [L, B={b}, K, S, 2H]")
    check(kv.shape[4] == 2 * h, f"kv's last axis is {kv.shape[4]}, expected 2H = {2 * h}")
    check(n % kv.shape[2] == 0, f"N={n} query heads are not a multiple of K={kv.shape[2]} KV heads")
    check(lengths.shape == (b, kv.shape[2]), f"lengths {lengths.shape} must be [B, K] = {(b, kv.shape[2])}")
  if pages is not None:
    check_pages(pages, b, n, h, None if kv is None else kv.shape)
  options = dict(pages=pages, lse=lse, mass=mass, softcap=softcap, sinks=sinks)
  return dispatch.call("decode", IMPLEMENTATIONS, implementation, q, kv, layer, lengths, **options)


def check_pages(pages: Pages, b: int, n: int, h: int, cache: tuple[int, ...] | None) -> None:
  """Raises ValueError unless the arrays of `pages` fit q [b, n, h], the cache's shape, and each other."""
  check, pool, table, scales = dispatch.check, pages.pool, pages.table, pages.scales
  width = pages.format.width(h)
  check(pool.ndim == 3 and pool.shape[2] == width, f"pages.pool {pool.shape} must be [P, page, 2H = {width}]")
  check(table.ndim == 4 and table.shape[1] == b, f"pages.table {table.shape} must be [L, B={b}, K, M]")
  k = table.shape[2]
  check(n % k == 0, f"N={n} query heads are not a multiple of the K={k} KV heads of pages.table")
  check(pages.lengths.shape == (b, k), f"pages.lengths {pages.lengths.shape} must be [B, K] = {(b, k)}")
  if cache is not None:
    same = table.shape[0] == cache[0] and k == cache[2]
    check(same, f"pages.table {table.shape} and kv {cache} must have the same L and K")
  check(
    (scales is not None) == pages.format.scaled,
    f"a pool of {pool.dtype} {'needs' if scales is None else 'takes no'} pages.scales",
  )
  if scales is not None:
    expected = (len(pool), 1, 2 * pool.shape[1])
    check(scales.shape == expected, f"pages.scales {scales.shape} must be [P, 1, 2 * page] = {expected}")
