"""Oracle of window-bias attention: the whole T x T score matrix in float64, from the formula."""

from __future__ import annotations

import numpy as np


def window_bias_attention(
  q, k, v, bias, window, segment_ids, *, lse: bool = False, softcap=None, sinks=None, by_age=False
):
  """softmax(q k^T / sqrt(H) + bias[j] where i - j > window), causal and within a segment, times v.

  With `by_age`, bias[j] is multiplied by i - j. A head's sink is one more score, of a key without a value.

  Args: q [B, T, N, H], k and v [B, T, K, H], bias [B, K, T] or None, segment_ids [B, T] or None. All in float64.
  Returns what `api.window_bias_attention` does.
  """
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  bias = None if bias is None else np.asarray(bias, np.float64)
  segment_ids = None if segment_ids is None else np.asarray(segment_ids)
  b, t, n, h = q.shape
  group = n // k.shape[2]
  i, j = np.arange(t)[:, None], np.arange(t)[None]
  out, logs = np.zeros_like(q), np.zeros((b, t, n))
  sinks = np.full(n, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
  for row in range(b):
    visible = j <= i
    if segment_ids is not None:
      ids = segment_ids[row]
      visible = visible & (ids[:, None] == ids[None])
    for head in range(n):
      scores = q[row, :, head] @ k[row, :, head // group].T / np.sqrt(h)
      scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
      if bias is not None:
        far = i - j > window
        added = np.broadcast_to(bias[row, head // group], far.shape)
        scores = scores + np.where(far, added * np.where(far, i - j, 1) if by_age else added, 0.0)
      scores = np.where(visible, scores, -np.inf)
      top = np.maximum(scores.max(axis=1, keepdims=True), sinks[head])
      weights = np.exp(scores - top)
      total = weights.sum(axis=1, keepdims=True) + np.exp(sinks[head] - top)
      out[row, :, head] = weights @ v[row, :, head // group] / total
      logs[row, :, head] = (top + np.log(total))[:, 0]
  return (out, logs) if lse else out
