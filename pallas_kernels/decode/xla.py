"""Decode attention in plain XLA: blocks of slots, only up to the longest live prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.platform import platform
from pallas_kernels.common.softmax import soft_capped, with_sinks
from pallas_kernels.common.xla_dot import einsum
from pallas_kernels.paged.format import PageFormat, format_of

# Slots read at a time. A block is the only copy made of the cache, so it bounds the temporaries.
BLOCK = 128


def block_slots(dtype) -> int:
  """BLOCK; more on a CPU, where a step of the loop costs more, but half as many for types converted to float32.

  In float32 on two cores a step of SmolLM2-135M took longer with 128, 256 and 640 slots (experiments/LOG.md).
  """
  if platform() != "cpu":
    return BLOCK
  return 320 if dtype == jnp.float32 else 160


def product(subscripts: str, a, b):
  """`einsum` of a [B, K, G, ...] with the slots `b`; on a CPU one `einsum` for each query head of the group.

  XLA's CPU backend is several times faster at a batch of matrix-vector products than at one with this few rows.
  """
  if platform() != "cpu":
    return einsum(subscripts, a, b)
  one = subscripts.replace("g", "")
  return jnp.stack([einsum(one, a[:, :, g], b) for g in range(a.shape[2])], axis=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Slots of a `format` read by blocks, `blocks` of them up to the longest live prefix.

  read(i) gives block i: (cells [B, K, block, 2H], scales [B, K, block, 2] or None, live bool [B, K, block]).
  put(kept, i, scores) writes those of block i [B, K, G, block] into `kept` [B, K, G, room], -inf at first; the first
  `slots` of the room are the slots in order.
  """

  format: PageFormat
  blocks: Any
  read: Callable
  put: Callable
  slots: int
  room: int


def contiguous(kv, layer, lengths) -> Source:
  """The slots of one layer of `kv` [L, B, K, S, 2H]."""
  _, b, k, s, width = kv.shape
  block = min(block_slots(kv.dtype), s)
  # The last block starts early enough to lie inside the cache; slots it shares with the one before are masked.
  start = lambda i: jnp.minimum(i * block, s - block)

  def read(i):
    slots = lax.dynamic_slice(kv, (layer, 0, 0, start(i), 0), (1, b, k, block, width))[0]
    index = start(i) + jnp.arange(block)
    return slots, None, (index >= i * block) & (index < lengths[..., None])

  def put(kept, i, scores):  # a slot of the block before is masked here, so its score is -inf
    before = lax.dynamic_slice_in_dim(kept, start(i), block, 3)
    return lax.dynamic_update_slice_in_dim(kept, jnp.maximum(before, scores), start(i), 3)

  return Source(format_of(kv.dtype), (lengths.max() + block - 1) // block, read, put, s, s)


def paged(pages, layer) -> Source:
  """The archives of one layer; as many pages a block as make `block_slots`, however many the table has."""
  _, page, _ = pages.pool.shape
  _, b, k, most = pages.table.shape
  several = max(1, block_slots(pages.pool.dtype) // page)
  block = several * page
  table = lax.dynamic_index_in_dim(pages.table, layer, 0, keepdims=False)

  def read(i):
    index = i * block + jnp.arange(block)
    live = index < pages.lengths[..., None]
    numbers = jnp.take(table, i * several + jnp.arange(several), axis=2, mode="clip")
    numbers = jnp.where(live[..., ::page], numbers, 0)  # numbers of pages with nothing live are arbitrary
    rows = lambda x, width: jnp.take(x, numbers, axis=0, mode="clip").reshape(b, k, block, width)
    scales = None if pages.scales is None else rows(pages.scales, 2)
    return rows(pages.pool, pages.pool.shape[2]), scales, live

  put = lambda kept, i, scores: lax.dynamic_update_slice_in_dim(kept, scores, i * block, 3)
  blocks = (pages.lengths.max() + block - 1) // block
  return Source(pages.format, blocks, read, put, most * page, -(-most // several) * block)


def decode_attention(
  q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, softcap=None, sinks=None
):
  """See `api.decode_attention`. A block past a row's prefix changes nothing, not even a bit, in that row."""
  b, n, h = q.shape
  of_kv = None if kv is None else contiguous(kv, layer, lengths)
  of_pages = None if pages is None else paged(pages, layer)
  sources = [source for source in (of_kv, of_pages) if source is not None]
  k = (kv if kv is not None else pages.table).shape[2]
  qg = q.reshape(b, k, n // k, h)
  on_cpu = platform() == "cpu"
  if on_cpu:  # keys and values stay side by side in both products: taking them apart would copy both
    qg = jnp.pad(qg, ((0, 0), (0, 0), (0, 0), (0, h)))

  def scores_of(source, i):
    """Block i: (scores [B, K, G, block], -inf where dead; values [B, K, block, H]; their scales [B, K, 1, block]).

    On a CPU the values are whole slots [B, K, block, 2H], their last half the value.
    """
    cells, scales, live = source.read(i)
    cells = jnp.where(live[..., None], cells, jnp.zeros((), cells.dtype))  # dead slots may hold anything, NaN too
    slots = source.format.widened(cells, q.dtype)
    if scales is not None:  # a slot's scale is a factor of its score
      scales = jnp.where(live[..., None], scales, 0.0)
    # On a CPU `einsum` would convert a block to float32 for each product; this does it once for all.
    wider = jnp.float32 if on_cpu else jnp.promote_types(slots.dtype, q.dtype)
    slots, queries = slots.astype(wider), qg.astype(wider)
    keys, values = (slots, slots) if on_cpu else (slots[..., :h], slots[..., h:])
    scores = product("bkgh,bksh->bkgs", queries, keys) * h**-0.5
    if scales is not None:
      scores = scores * scales[:, :, None, :, 0]
    scores = soft_capped(scores, softcap)
    scores = jnp.where(live[:, :, None], scores, -jnp.inf)
    return scores, values, None if scales is None else scales[:, :, None, :, 1]

  def attend(source, state):
    """The softmax's state after a source, and the scores of its slots [B, K, G, slots] if `mass`.

    The scores are kept, because a second read of the cache would have no place among the writes of later layers: XLA
    would copy the cache for it.
    """

    def body(i, state):
      (top, total, acc), kept = state
      scores, values, scales = scores_of(source, i)
      new_top = jnp.maximum(top, scores.max(axis=-1))
      safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
      weights = jnp.exp(scores - safe[..., None])
      scale = jnp.exp(top - safe)
      scaled = weights if scales is None else weights * scales
      part = product("bkgs,bksh->bkgh", scaled.astype(values.dtype), values)[..., -h:]
      state = new_top, total * scale + weights.sum(axis=-1), acc * scale[..., None] + part
      return state, source.put(kept, i, scores) if mass else None

    kept = jnp.full((b, k, n // k, source.room), -jnp.inf) if mass else None
    state, kept = _loop(source.blocks, body, (state, kept))
    return state, kept[..., : source.slots] if mass else None

  state = jnp.full((b, k, n // k), -jnp.inf), jnp.zeros((b, k, n // k)), jnp.zeros((b, k, n // k, h))
  scores = {}
  for source in sources:
    state, scores[source] = attend(source, state)
  top, total, acc = state
  out = acc / jnp.where(total == 0, 1.0, total)[..., None]
  logs = top + jnp.log(total)
  if sinks is not None:
    out, logs = with_sinks(out, logs, sinks.reshape(k, n // k))
  out = jax.lax.reshape(out, (b, n, h)).astype(q.dtype)
  if not lse and not mass:
    return out
  results = [out]
  if lse:
    results.append(logs.reshape(b, n))
  if mass:
    finite = jnp.where(total == 0, 0.0, logs)
    mass_of = lambda source: jnp.exp(scores[source] - finite[..., None]).sum(axis=2)
    results.append(tuple(None if source is None else mass_of(source) for source in (of_kv, of_pages)))
  return tuple(results)


def _loop(count, body: Callable, state):
  """`lax.fori_loop` from 0 whose program never depends on `count`, traced or not: XLA sums in another order where it
  knows that there is one block."""
  step = lambda carry: (carry[0] + 1, body(*carry))
  return lax.while_loop(lambda carry: carry[0] < count, step, (jnp.int32(0), state))[1]
