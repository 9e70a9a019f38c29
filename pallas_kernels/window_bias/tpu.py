"""Window-bias attention on TPUs: the forward kernel and the differentiable function.

Tokens lie in the lanes, [rows, T]: head size 64 then wastes no memory on padding to 128 lanes. Scores are [keys,
queries], so that a query's own numbers (maximum, sum, log-sum-exp) are a row and softmax adds along sublanes, which
needs no exchange between lanes. `tpu_common` says which blocks are visited.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import compat_tpu, dispatch
from pallas_kernels.common.softmax import LOG2E, LOWEST, in_log2
from pallas_kernels.window_bias import tpu_backward, tpu_common
from pallas_kernels.window_bias.common import padded, saved, segment_bounds
from pallas_kernels.window_bias.tpu_common import Blocks, Variant, default_blocks


def window_bias_attention(
  q, k, v, bias, window, segment_ids, lse=False, softcap=None, by_age=False, blocks: Blocks | None = None
):
  """See `api.window_bias_attention`; bfloat16 or float32, head sizes that are multiples of 16 up to 256.

  Raises:
    NotImplementedError: another device, dtype or head size, or a text too long for the list of pairs of blocks.
  """
  compat_tpu.require_tpu()
  b, t, n, h = q.shape
  heads = k.shape[2]
  dispatch.supports(("bfloat16", "float32"), q=q, k=k, v=v)
  if h % 16 or h > 256:
    raise NotImplementedError(f"head size {h}: only multiples of 16 up to 256")
  blocks = blocks or default_blocks(t, n // heads, h, q.dtype.itemsize)
  pad = -t % blocks.multiple
  pairs = max(tpu_common.triangle(t + pad, tile) for tile in (blocks.forward, blocks.dq, blocks.dkv))
  pairs *= 1 if segment_ids is None else b
  if 8 * pairs > tpu_common.SCALAR_BYTES:
    raise NotImplementedError(f"{pairs} pairs of blocks of {b} x {t} tokens are more than fit the scalar memory")
  last = lambda x: jnp.moveaxis(x, 1, -1)  # tokens into the lanes
  q, k, v = last(q).reshape(b, heads, -1, t), last(k), last(v)
  bias = None if bias is None else bias.astype(jnp.float32)[:, :, None]
  start = None if segment_ids is None else segment_bounds(segment_ids)[0][:, None, None]
  # Zeros behind the last token, in the last segment: no real query sees them, and no gradient reaches them.
  variant = Variant(int(window), bias is not None, blocks, in_log2(softcap), by_age)
  args = *(padded(x, 3, pad) for x in (q, k, v, bias)), padded(start, 3, pad, mode="edge")
  first = lambda x, *shape: jnp.moveaxis(x[..., :t].reshape(b, n, *shape, t), -1, 1)
  if not lse:
    return first(_attention(variant, False, *args), h)
  out, logs = _attention(variant, True, *args)
  return first(out, h), first(logs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(variant, with_logs: bool, q, k, v, bias, start):
  """out, or the pair (out, log-sum-exp float32 [B, K, G, T])."""
  out, lse = forward(variant, q, k, v, bias, start)
  return (out, lse * (1 / LOG2E)) if with_logs else out


def _attention_fwd(variant, with_logs, q, k, v, bias, start):
  out, lse = saved(forward(variant, q, k, v, bias, start))
  return (out, lse * (1 / LOG2E)) if with_logs else out, (q, k, v, bias, start, out, lse)


def _attention_bwd(variant, with_logs, saved, cotangent):
  dout, dlogs = cotangent if with_logs else (cotangent, None)
  return *tpu_backward.gradients(variant, *saved, dout, dlogs), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def forward(variant: Variant, q, k, v, bias, start):
  """(out [B, K, G * H, T], log-sum-exp float32 [B, K, G, T] in units of log 2).

  Args:
    q: [B, K, G * H, T]; k and v: [B, K, H, T]; T a multiple of `blocks.multiple`.
    bias: float32 [B, K, 1, T] or None.
    start: int32 [B, 1, 1, T], the first position of each token's segment; None where there is one segment.
  """
  b, heads, size, t = k.shape
  group = q.shape[2] // size
  tile = variant.blocks.forward

  def body(step, q_ref, k_ref, v_ref, bias_ref, start_ref, out_ref, lse_ref, acc_ref, top_ref, total_ref):
    @pl.when(step.first)
    def _begin():
      acc_ref[...] = jnp.zeros_like(acc_ref)
      top_ref[...] = jnp.full_like(top_ref, LOWEST)
      total_ref[...] = jnp.zeros_like(total_ref)

    def attend(kind):
      keys = k_ref[...].T
      added, _ = tpu_common.added_to_scores(variant, tile, step, kind, bias_ref, start_ref)

      def head(one, rows):
        s, _ = tpu_common.scores(variant, keys, q_ref[rows, :], added)
        top = top_ref[one, :]
        new_top = jnp.maximum(top, s.max(axis=0, keepdims=True))
        shrink, p = jnp.exp2(top - new_top), jnp.exp2(s - new_top)
        top_ref[one, :] = new_top
        total_ref[one, :] = total_ref[one, :] * shrink + p.sum(axis=0, keepdims=True)
        acc_ref[rows, :] = acc_ref[rows, :] * shrink + tpu_common.dot(v_ref[...], p.astype(q.dtype))

      tpu_common.for_heads(group, size, head)

    tpu_common.for_kind(variant, step, attend)

    @pl.when(step.last)
    def _end():
      def head(one, rows):
        out_ref[rows, :] = (acc_ref[rows, :] / total_ref[one, :]).astype(out_ref.dtype)

      tpu_common.for_heads(group, size, head)
      lse_ref[...] = top_ref[...] + jnp.log(total_ref[...]) * LOG2E

  pairs = tpu_common.visible_pairs(variant, tile, b, t, start, by_keys=False)
  row = ((group, tile.q), jnp.float32)
  inputs = [("q", q), ("kv", k), ("kv", v), ("kv", None if bias is None else bias * LOG2E), ("q", start)]
  shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, group, t), jnp.float32)
  scratch = [((group * size, tile.q), jnp.float32), row, row]
  return tpu_common.launch(body, pairs, inputs, [("q", x) for x in shapes], scratch, "window_bias_forward")
