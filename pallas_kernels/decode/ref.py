"""Oracle of decode attention: plain loops in float64 from the formula."""

from __future__ import annotations

import numpy as np


def decode_attention(q, kv, layer, lengths) -> np.ndarray:
  """softmax(q k^T / sqrt(H)) v over slots 0 .. lengths-1 of each (row, KV head); zeros where the length is 0.

  Args: q [B, N, H], kv [L, B, K, S, 2H], layer int, lengths [B, K]. Returns float64 [B, N, H].
  """
  q, kv, lengths = np.asarray(q, np.float64), np.asarray(kv), np.asarray(lengths)
  b, n, h = q.shape
  group = n // kv.shape[2]
  out = np.zeros((b, n, h))
  for row in range(b):
    for head in range(n):
      live = int(lengths[row, head // group])
      if live == 0:
        continue
      slots = np.asarray(kv[layer, row, head // group, :live], np.float64)
      scores = slots[:, :h] @ q[row, head] / np.sqrt(h)
      weights = np.exp(scores - scores.max())
      out[row, head] = weights @ slots[:, h:] / weights.sum()
  return out
