"""Oracle of prefill attention: plain loops in float64 from the formula."""

from __future__ import annotations

import numpy as np


def prefill_attention(
  q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None, softcap=None, sinks=None
):
  """Key j is visible to query i iff k_first[j] <= q_pos[i] <= k_last[j]; a query that sees nothing gives zeros.

  A head's sink is one more score, of a key without a value.

  Args: q [B, T, N, H], keys and values [B, K, S, H], q_pos [B, T], k_first and k_last [B, K, S], query_weights [B, T]
  or None. All in float64. Returns what `api.prefill_attention` does.
  """
  q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
  q_pos, k_first, k_last = (np.asarray(x) for x in (q_pos, k_first, k_last))
  query_weights = None if query_weights is None else np.asarray(query_weights, np.float64)
  b, t, n, h = q.shape
  group = n // keys.shape[1]
  out, mass = np.zeros((b, t, n, h)), np.zeros(k_first.shape)
  sinks = np.full(n, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
  logs = np.tile(sinks, (b, t, 1))
  for row in range(b):
    for head in range(n):
      kv = head // group
      for i in range(t):
        seen = (k_first[row, kv] <= q_pos[row, i]) & (q_pos[row, i] <= k_last[row, kv])
        if not seen.any():
          continue
        scores = keys[row, kv, seen] @ q[row, i, head] / np.sqrt(h)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        top = max(scores.max(), sinks[head])
        total = np.exp(scores - top).sum() + np.exp(sinks[head] - top)
        weights = np.exp(scores - top) / total
        out[row, i, head] = weights @ values[row, kv, seen]
        logs[row, i, head] = top + np.log(total)
        if query_weights is not None:
          mass[row, kv, seen] += query_weights[row, i] * weights
  results = (out, *([logs] if lse else []), *([] if query_weights is None else [mass]))
  return results if len(results) > 1 else out
