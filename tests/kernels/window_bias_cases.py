"""Inputs and gradients in float64 for the tests of the window-bias kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def inputs(b, t, n, k, h, dtype, bias, segments):
  """Queries, keys, values, bias, segment ids and the output's cotangent; every seventh key of a head is evicted."""
  rng = np.random.default_rng(0)
  q, dout = (jnp.asarray(rng.normal(size=(b, t, n, h)), dtype) for _ in range(2))
  keys, values = (jnp.asarray(rng.normal(size=(b, t, k, h)), dtype) for _ in range(2))
  rows = -np.exp(2 * rng.normal(size=(b, k, t))).astype(np.float32)
  rows[..., ::7] = -np.inf
  ids = np.sort(rng.integers(0, 4, size=(b, t)), axis=1).astype(np.int32)
  return q, keys, values, jnp.asarray(rows) if bias else None, jnp.asarray(ids) if segments else None, dout


def gradients(q, k, v, bias, window, segment_ids, dout, *, softcap=None, sinks=None, dlogs=None, by_age=False):
  """(dq, dk, dv, dbias, dsinks) in float64 from the formula, with the whole score matrix of each head; without what
  there is no argument for.

  Args: dlogs, the log-sum-exp's cotangent [B, T, N].
  """
  q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
  b, t, n, h = q.shape
  group = n // k.shape[2]
  i, j = np.arange(t)[:, None], np.arange(t)[None]
  far = i - j > window
  times = np.where(far, i - j, 0) if by_age else far.astype(int)  # of a key's bias in the scores
  dq, dk, dv, dbias = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((b, k.shape[2], t))
  dsinks, with_sinks = np.zeros(n), sinks is not None
  sinks = np.asarray(sinks, np.float64) if with_sinks else np.full(n, -np.inf)
  dlogs = np.zeros((b, t, n)) if dlogs is None else np.asarray(dlogs, np.float64)
  for row in range(b):
    visible = j <= i
    if segment_ids is not None:
      visible = visible & (np.asarray(segment_ids[row])[:, None] == np.asarray(segment_ids[row])[None])
    for head in range(n):
      kv = head // group
      s = q[row, :, head] @ k[row, :, kv].T / np.sqrt(h)
      slope = np.ones_like(s)
      if softcap is not None:
        slope = 1 - np.tanh(s / softcap) ** 2
        s = softcap * np.tanh(s / softcap)
      if bias is not None:
        s = s + np.where(far, np.asarray(bias[row, kv], np.float64) * np.maximum(times, 1), 0.0)
      s = np.where(visible, s, -np.inf)
      top = np.maximum(s.max(axis=1, keepdims=True), sinks[head])
      p, of_sink = np.exp(s - top), np.exp(sinks[head] - top)
      total = p.sum(axis=1, keepdims=True) + of_sink
      p, of_sink = p / total, of_sink / total
      dp = dout[row, :, head] @ v[row, :, kv].T
      # The sink's dp is 0: it has no value. The log-sum-exp's derivatives are the weights.
      change = dlogs[row, :, head, None] - (p * dp).sum(axis=1, keepdims=True)
      ds = p * (dp + change)
      dsinks[head] += (of_sink * change).sum()
      dbias[row, kv] += (times * ds).sum(axis=0)
      ds = ds * slope
      dq[row, :, head] = ds @ k[row, :, kv] / np.sqrt(h)
      dk[row, :, kv] += ds.T @ q[row, :, head] / np.sqrt(h)
      dv[row, :, kv] += p.T @ dout[row, :, head]
  return dq, dk, dv, *([] if bias is None else [dbias]), *([dsinks] if with_sinks else [])


def close(got, want, tolerance):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
