"""The one place where dms_jax chooses attention, and how slots of pages are written: every model and cache calls
through here, into `pallas_kernels`.

`use` forces a choice for a block of code (traced functions keep the choice they were traced with).

Under a mesh (`with jax.set_mesh(dms_jax.sharding.make_mesh(...))`) each device attends to its own rows and KV heads,
by `jax.shard_map`: attention mixes neither, and kernels are not partitioned automatically. KV heads are split over the
mesh axis "tensor" where it divides them, rows over "data", and over "tensor" too where heads are not.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dms_jax.sharding import row_and_head_axes
from pallas_kernels import decode, prefill
from pallas_kernels import window_bias as retrofit
from pallas_kernels.common import compat, dispatch
from pallas_kernels.common.platform import platform
from pallas_kernels.decode import Pages
from pallas_kernels.paged import api as put
from pallas_kernels.prefill import NEVER as NEVER

_choice: contextvars.ContextVar[str | Sequence[str] | None] = contextvars.ContextVar("attention", default=None)


@contextlib.contextmanager
def use(implementation: str | Sequence[str] | None):
  """Forces the implementation ("xla", ...) of every attention traced inside."""
  token = _choice.set(implementation)
  try:
    yield
  finally:
    _choice.reset(token)


def _on_shards(
  call: Callable, rows: int, kv_heads: int, specs: Callable[[Any, Any], tuple], out_spec: Callable[[Any, Any], P], *args
):
  """`call(*args)`, by shards under a mesh; `specs` and `out_spec` get the names of the axes of rows and of KV heads."""
  axes = row_and_head_axes(rows, kv_heads)
  if axes is None:
    return call(*args)
  # Nothing is summed over the mesh, and kernels do not say over which axes their outputs vary.
  return jax.shard_map(call, in_specs=specs(*axes), out_specs=out_spec(*axes), check_vma=False)(*args)


def decode_attention(q, kv, layer, lengths, *, pages: Pages | None = None, **kwargs):
  """`pallas_kernels.decode.decode_attention`: one query a row over the live slots of a cache, its pages, or both.

  Under a mesh every device reads the whole pool of `pages`.
  """

  def call(q, kv, layer, lengths, pages):
    layer = jnp.asarray(layer, jnp.int32) if platform() == "gpu" else layer
    return _chosen(decode.decode_attention, q, kv, layer, lengths, arrays={"pages": pages}, **kwargs)

  def specs(b, k):
    paged = None if pages is None else Pages(P(), P(None, b, k), P(b, k), None if pages.scales is None else P())
    return P(b, k), P(None, b, k), P(), P(b, k), paged

  kv_heads = (kv if pages is None else pages.table).shape[2]
  return _on_shards(call, q.shape[0], kv_heads, specs, P, q, kv, layer, lengths, pages)


def write_pages(pool, table, slots, rows, *, in_order: bool = True):
  """`pallas_kernels.decode.write_pages`: rows of archives written into their pages.

  XLA scatters where the implementation in force is none of this operation's. Under a mesh a kernel writes the whole
  pool on every device.

  Args:
    in_order: the slots of one archive ascend without gaps; if they do not, XLA scatters.
  """
  chosen = (*(dispatch.named(put.IMPLEMENTATIONS, _choice.get()) if in_order else ()), "xla")
  call = partial(put.write_pages, implementation=[name for name in put.IMPLEMENTATIONS if name in chosen])
  if platform() != "tpu":
    return call(pool, table, slots, rows)
  return _on_shards(call, 1, 1, lambda *_: (P(),) * 4, lambda *_: P(), pool, table, slots, rows)


def _chosen(attend: Callable, *args, arrays: dict[str, Any], **options):
  """`attend(*args, **arrays, **options)` by the implementation in force.

  For a GPU as a function of its own in the program: a kernel, which takes seconds to lower and to compile, then does so
  once for all layers of a list.
  """
  choice = _choice.get()
  if platform() != "gpu":
    return attend(*args, **arrays, implementation=choice, **options)
  choice = choice if choice is None or isinstance(choice, str) else tuple(choice)
  target = _hopper(), compat.interpreting()
  return _function(args, arrays, attend=attend, choice=choice, target=target, options=tuple(options.items()))


@partial(jax.jit, static_argnames=("attend", "choice", "target", "options"))
def _function(args, arrays, *, attend, choice, target, options):
  """See `_chosen`. `target` is there to tell apart what is traced for different devices, or for the interpreter."""
  return attend(*args, **arrays, implementation=choice, **dict(options))


def _hopper() -> bool:
  """Whether kernels for Hopper GPUs are chosen from in what is traced here."""
  try:
    compat.require_hopper()
  except NotImplementedError:
    return False
  return True


def prefill_attention(q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None):
  """`pallas_kernels.prefill.prefill_attention`: a chunk of queries over keys with first and last visible position."""

  def call(*args):
    *args, weights = args
    return _chosen(prefill.prefill_attention, *args, arrays={"query_weights": weights}, lse=lse)

  def specs(b, k):
    return P(b, None, k), P(b, k), P(b, k), P(b), P(b, k), P(b, k), P(b)

  def out_spec(b, k):
    results = (P(b, None, k), *([P(b, None, k)] if lse else []), *([] if query_weights is None else [P(b, k)]))
    return results if len(results) > 1 else results[0]

  args = q, keys, values, q_pos, k_first, k_last, query_weights
  return _on_shards(call, q.shape[0], keys.shape[1], specs, out_spec, *args)


def window_bias_attention(q, k, v, bias, window, segment_ids=None):
  """`pallas_kernels.window_bias.window_bias_attention`: causal attention with a bias on keys beyond the window."""

  def call(q, k, v, bias, segment_ids):
    return retrofit.window_bias_attention(q, k, v, bias, window, segment_ids, implementation=_choice.get())

  tokens = lambda rows, heads: P(rows, None, heads)
  specs = lambda rows, heads: (*(tokens(rows, heads),) * 3, P(rows, heads), P(rows))
  return _on_shards(call, q.shape[0], k.shape[2], specs, tokens, q, k, v, bias, segment_ids)
