"""Backward kernels of window-bias attention on TPUs: one for dq, one for dk, dv and dbias.

With p = exp2(s - lse), dp = dout v^T, delta = rowsum(out * dout): ds = p (dp - delta), dq = scale ds k,
dk = scale ds^T q, dv = p^T dout, dbias_j = sum of ds over the queries further than the window from key j and over the
group's heads, each ds times i - j where a bias grows with age. If scores are capped, ds is multiplied by the cap's
slope for dq and dk. Each output is summed by one core in a fixed order: two runs agree bit for bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.softmax import LOG2E, before_cap
from pallas_kernels.window_bias import tpu_common
from pallas_kernels.window_bias.tpu_common import Variant


def gradients(variant: Variant, q, k, v, bias, start, out, lse, dout, dlogs):
  """(dq, dk, dv, dbias or None), laid out and typed as `tpu.forward`'s arguments; dlogs, the natural log-sum-exp's
  cotangent [B, K, G, T], or None."""
  b, heads, size, t = k.shape
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).reshape(b, heads, -1, size, t).sum(axis=3)
  delta = delta if dlogs is None else delta - dlogs  # d log-sum-exp / d scores are the weights p
  bias = None if bias is None else bias * LOG2E
  inputs = [("q", q), ("kv", k), ("kv", v), ("kv", bias), ("q", start), ("q", dout), ("q", lse), ("q", delta)]
  return query_gradient(variant, inputs), *key_gradients(variant, inputs)


def query_gradient(variant: Variant, inputs: list[tuple]):
  """dq [B, K, G * H, T]; `inputs`: q, k, v, bias in units of log 2, start, dout, lse and delta float32 [B, K, G, T]."""
  q, k, start = (inputs[i][1] for i in (0, 1, 4))
  b, _, size, t = k.shape
  group = q.shape[2] // size
  tile = variant.blocks.dq

  def body(step, q_ref, k_ref, v_ref, bias_ref, start_ref, dout_ref, lse_ref, delta_ref, dq_ref, acc_ref):
    @pl.when(step.first)
    def _begin():
      acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(kind):
      keys, values = k_ref[...].T, v_ref[...].T
      added, _ = tpu_common.added_to_scores(variant, tile, step, kind, bias_ref, start_ref)

      def head(one, rows):
        s, capped = tpu_common.scores(variant, keys, q_ref[rows, :], added)
        ds = jnp.exp2(s - lse_ref[one, :]) * (tpu_common.dot(values, dout_ref[rows, :]) - delta_ref[one, :])
        ds = before_cap(ds, capped, variant.softcap)
        acc_ref[rows, :] += tpu_common.dot(k_ref[...], ds.astype(q.dtype))

      tpu_common.for_heads(group, size, head)

    tpu_common.for_kind(variant, step, attend)

    @pl.when(step.last)
    def _end():
      dq_ref[...] = (acc_ref[...] * size**-0.5).astype(dq_ref.dtype)

  pairs = tpu_common.visible_pairs(variant, tile, b, t, start, by_keys=False)
  output, scratch = ("q", jax.ShapeDtypeStruct(q.shape, q.dtype)), ((group * size, tile.q), jnp.float32)
  return tpu_common.launch(body, pairs, inputs, [output], [scratch], "window_bias_dq")[0]


def key_gradients(variant: Variant, inputs: list[tuple]):
  """(dk, dv [B, K, H, T], dbias float32 [B, K, 1, T] or None), each summed over the group's query heads."""
  q, k, v, bias, start = (x for _, x in inputs[:5])
  b, _, size, t = k.shape
  group = q.shape[2] // size
  tile = variant.blocks.dkv
  lanes = min(tpu_common.LANES, tile.q)  # a key's part of dbias is summed over lanes at the end only

  def body(step, q_ref, k_ref, v_ref, bias_ref, start_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *refs):
    dbias_ref, dk_acc, dv_acc, dbias_acc = refs if variant.has_bias else (None, *refs, None)

    @pl.when(step.first)
    def _begin():
      for acc_ref in (dk_acc, dv_acc, *([dbias_acc] if variant.has_bias else [])):
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(kind):
      keys, values = k_ref[...].T, v_ref[...].T
      added, times = tpu_common.added_to_scores(variant, tile, step, kind, bias_ref, start_ref)

      def head(one, rows):
        s, capped = tpu_common.scores(variant, keys, q_ref[rows, :], added)
        p = jnp.exp2(s - lse_ref[one, :])
        dv_acc[...] += tpu_common.dot(p.astype(q.dtype), dout_ref[rows, :], (1, 1))
        ds = p * (tpu_common.dot(values, dout_ref[rows, :]) - delta_ref[one, :])
        of_scores = before_cap(ds, capped, variant.softcap)
        dk_acc[...] += tpu_common.dot(of_scores.astype(q.dtype), q_ref[rows, :], (1, 1))
        if variant.has_bias and kind != tpu_common.FREE:
          ds = ds if times is None else ds * times
          dbias_acc[...] += sum(ds[:, at : at + lanes] for at in range(0, tile.q, lanes))

      tpu_common.for_heads(group, size, head)

    tpu_common.for_kind(variant, step, attend)

    @pl.when(step.last)
    def _end():
      dk_ref[...] = (dk_acc[...].T * size**-0.5).astype(dk_ref.dtype)
      dv_ref[...] = dv_acc[...].T.astype(dv_ref.dtype)
      if variant.has_bias:
        dbias_ref[...] = dbias_acc[...].T.sum(axis=0, keepdims=True)

  outputs = [("kv", jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in (k, v)]
  scratch = [((tile.kv, size), jnp.float32)] * 2
  if variant.has_bias:
    outputs.append(("kv", jax.ShapeDtypeStruct(bias.shape, jnp.float32)))
    scratch.append(((tile.kv, lanes), jnp.float32))
  pairs = tpu_common.visible_pairs(variant, tile, b, t, start, by_keys=True)
  return (*tpu_common.launch(body, pairs, inputs, outputs, scratch, "window_bias_dkv"), None)[:3]
