"""Attention of dms_jax: the one module that calls the attention kernels of `pallas_kernels`.

`use` names the implementation for a block of code. A function that was traced before keeps the implementation of its
trace.

Under a mesh (`with jax.set_mesh(dms_jax.sharding.make_mesh(...))`) each device attends to its own rows and KV heads
inside `jax.shard_map`: attention mixes neither, and kernels are not partitioned automatically. The mesh axis "tensor"
splits KV heads where it divides their number, and rows otherwise; "data" splits rows.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from dms_jax.execution import Execution
from dms_jax.sharding import row_and_head_axes, shard_map
from pallas_kernels import decode, prefill, window_bias
from pallas_kernels.common import compat, dispatch
from pallas_kernels.decode import Pages
from pallas_kernels.paged import api as paged
from pallas_kernels.prefill import NEVER as NEVER

_choice: contextvars.ContextVar[str | Sequence[str] | None] = contextvars.ContextVar("attention", default=None)


_softmax: contextvars.ContextVar[tuple[float | None, Any]] = contextvars.ContextVar("softmax", default=(None, None))


@contextlib.contextmanager
def layer_softmax(softcap: float | None, sinks: Array | None):
  """The softmax of every attention traced inside, which is that of one layer.

  Args:
    softcap: caps the scores, as `ModelConfig.attention_softcap` says.
    sinks: [N], the layer's attention sinks; None for none.
  """
  token = _softmax.set((softcap, sinks))
  try:
    yield
  finally:
    _softmax.reset(token)


def softmax_of_layer() -> tuple[float | None, Array | None]:
  """(softcap, sinks) of the layer that is being traced, see `layer_softmax`."""
  return _softmax.get()


@contextlib.contextmanager
def use(implementation: str | Sequence[str] | None):
  """Names the implementation ("xla", ...) of every attention traced inside, or several in order of preference.

  Functions that were compiled before keep theirs: name it first, or call `jax.clear_caches()`.
  """
  token = _choice.set(implementation)
  try:
    yield
  finally:
    _choice.reset(token)


def _on_shards(
  call: Callable, rows: int, kv_heads: int, specs: Callable[[Any, Any], tuple], out_spec: Callable[[Any, Any], P], *args
):
  """`call(*args)`, on shards under a mesh; `specs` and `out_spec` map the mesh axes of rows and KV heads to specs."""
  axes = row_and_head_axes(rows, kv_heads)
  if axes is None:
    return call(*args)
  return shard_map(call, in_specs=specs(*axes), out_specs=out_spec(*axes))(*args)


def decode_attention(q, kv, layer, lengths, *, pages: Pages | None = None, **kwargs):
  """`pallas_kernels.decode.decode_attention`: one query a row over a cache's live slots, its pages, or both.

  Under a mesh every device holds the whole pool of `pages`.

  Args:
    q: [B, N, H].
    kv: [L, B, K, S, 2H], or None if all keys lie in `pages`.
    layer: int32 [], the first axis of `kv` and of `pages.table`.
    lengths: int32 [B, K], live slots of `kv`.
    kwargs: `lse` and `mass`, which add results.

  Returns:
    [B, N, H], or a tuple with the results added.
  """

  softcap, sinks = _softmax.get()

  def call(q, kv, layer, lengths, pages, sinks):
    arrays = {"pages": pages, "sinks": sinks}
    return _chosen(decode.decode_attention, q, kv, layer, lengths, arrays=arrays, softcap=softcap, **kwargs)

  def specs(b, k):
    archive = None if pages is None else Pages(P(), P(None, b, k), P(b, k), None if pages.scales is None else P())
    return P(b, k), P(None, b, k), P(), P(b, k), archive, P(k)

  kv_heads = (kv if pages is None else pages.table).shape[2]
  return _on_shards(call, q.shape[0], kv_heads, specs, P, q, kv, layer, lengths, pages, sinks)


def write_pages(pool, table, slots, rows, *, in_order: bool = True):
  """`pallas_kernels.paged.write_pages`: writes rows of archives into their pages.

  XLA's scatter writes them if the operation has no implementation of the name chosen by `use`.
  `Execution.replicated_writes` says what a mesh changes.

  Args:
    pool: [P, page, cells].
    table: int32 [..., M], pages of each archive.
    slots: int32 [..., X], the archive slot of each row; a row is dropped if there is no such slot.
    rows: [..., X, cells].
    in_order: whether the slots of each archive ascend without gaps; if not, XLA's scatter writes them.
  """
  chosen = (*(dispatch.named(paged.IMPLEMENTATIONS, _choice.get()) if in_order else ()), "xla")
  call = partial(paged.write_pages, implementation=[name for name in paged.IMPLEMENTATIONS if name in chosen])
  if not Execution.choose().replicated_writes:
    return call(pool, table, slots, rows)
  return _on_shards(call, 1, 1, lambda *_: (P(),) * 4, lambda *_: P(), pool, table, slots, rows)


def _chosen(attend: Callable, *args, arrays: dict[str, Any], **options):
  """`attend(*args, **arrays, **options)` by the implementation that `use` chose.

  Under `Execution.jitted_attention` the call is a jitted function of its own.
  """
  choice = _choice.get()
  if not Execution.choose().jitted_attention:
    return attend(*args, **arrays, implementation=choice, **options)
  choice = choice if choice is None or isinstance(choice, str) else tuple(choice)
  target = _hopper(), compat.interpreting()
  return _jitted(args, arrays, attend=attend, choice=choice, target=target, options=tuple(options.items()))


@partial(jax.jit, static_argnames=("attend", "choice", "target", "options"))
def _jitted(args, arrays, *, attend, choice, target, options):
  """See `_chosen`. `target`, the device traced for and whether to interpret, is part of the jit key."""
  return attend(*args, **arrays, implementation=choice, **dict(options))


def _hopper() -> bool:
  """Whether code traced here may use the kernels for Hopper GPUs."""
  try:
    compat.require_hopper()
  except NotImplementedError:
    return False
  return True


def prefill_attention(q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None):
  """`pallas_kernels.prefill.prefill_attention`: a chunk of queries over keys.

  The key in slot s is visible to queries at positions `k_first[s]` .. `k_last[s]`.

  Args:
    q: [B, T, N, H].
    keys, values: [B, K, S, H].
    q_pos: int32 [B, T].
    k_first, k_last: int32 [B, K, S].
    lse: adds the log-sum-exp of each query's scores, float32 [B, T, N].
    query_weights: float32 [B, T]; adds the attention mass of each key, float32 [B, K, S].

  Returns:
    [B, T, N, H], or a tuple with the results added.
  """

  softcap, sinks = _softmax.get()

  def call(*args):
    *args, weights, sinks = args
    arrays = {"query_weights": weights, "sinks": sinks}
    return _chosen(prefill.prefill_attention, *args, arrays=arrays, lse=lse, softcap=softcap)

  def specs(b, k):
    return P(b, None, k), P(b, k), P(b, k), P(b), P(b, k), P(b, k), P(b), P(k)

  def out_spec(b, k):
    results = (P(b, None, k), *([P(b, None, k)] if lse else []), *([] if query_weights is None else [P(b, k)]))
    return results if len(results) > 1 else results[0]

  args = q, keys, values, q_pos, k_first, k_last, query_weights, sinks
  return _on_shards(call, q.shape[0], keys.shape[1], specs, out_spec, *args)


def window_bias_attention(q, k, v, bias, window, segment_ids=None, *, lse: bool = False, by_age: bool = False):
  """`pallas_kernels.window_bias.window_bias_attention`: causal attention with a bias on keys outside the window.

  Args:
    q: [B, T, N, H].
    k, v: [B, T, K, H].
    bias: float32 [B, K, T], or None for no bias.
    window: W in tokens.
    segment_ids: int32 [B, T], or None; tokens of different ids do not see each other.
    lse: adds the log-sum-exp of each query's scores, float32 [B, T, N], without the layer's sinks, which are then left
      out of the output, too.
    by_age: a key's bias is multiplied by the distance i - j from its query.

  Returns:
    [B, T, N, H], or a pair with the log-sum-exp.
  """

  softcap, sinks = _softmax.get()
  sinks = None if lse else sinks

  def call(q, k, v, bias, segment_ids, sinks):
    return window_bias.window_bias_attention(
      q, k, v, bias, window, segment_ids,
      lse=lse, by_age=by_age, softcap=softcap, sinks=sinks, implementation=_choice.get(),
    )  # fmt: skip

  tokens = lambda rows, heads: P(rows, None, heads)
  specs = lambda rows, heads: (*(tokens(rows, heads),) * 3, P(rows, heads), P(rows), P(heads))
  out = (lambda rows, heads: (tokens(rows, heads),) * 2) if lse else tokens
  return _on_shards(call, q.shape[0], k.shape[2], specs, out, q, k, v, bias, segment_ids, sinks)
