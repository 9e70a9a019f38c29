"""Oracle of prefill attention: plain loops in float64 from the formula."""

from __future__ import annotations

import numpy as np


def prefill_attention(q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None, softcap=None):
  """Key j is visible to query i iff k_first[j] <= q_pos[i] <= k_last[j]; a query that sees nothing gives zeros.

  Args: q [B, T, N, H], keys and values [B, K, S, H], q_pos [B, T], k_first and k_last [B, K, S], query_weights [B, T]
  or None. All in float64. Returns what `api.prefill_attention` does.
  """
  q = np.asarray(q, np.float64)
  b, t, n, h = q.shape
  group = n // keys.shape[1]
  out, logs, mass = np.zeros((b, t, n, h)), np.full((b, t, n), -np.inf), np.zeros(np.shape(k_first))
  for row in range(b):
    for head in range(n):
      kv = head // group
      for i in range(t):
        seen = (np.asarray(k_first[row, kv]) <= q_pos[row, i]) & (q_pos[row, i] <= np.asarray(k_last[row, kv]))
        if not seen.any():
          continue
        scores = np.asarray(keys[row, kv], np.float64)[seen] @ q[row, i, head] / np.sqrt(h)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[row, i, head] = weights @ np.asarray(values[row, kv], np.float64)[seen] / weights.sum()
        logs[row, i, head] = scores.max() + np.log(weights.sum())
        if query_weights is not None:
          mass[row, kv, seen] += float(query_weights[row, i]) * weights / weights.sum()
  results = (out, *([logs] if lse else []), *([] if query_weights is None else [mass]))
  return results if len(results) > 1 else out
