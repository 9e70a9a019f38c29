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


def gradients(q, k, v, bias, window, segment_ids, dout):
  """(dq, dk, dv, dbias) in float64 from the formula, with the whole score matrix of each head."""
  q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
  b, t, n, h = q.shape
  group = n // k.shape[2]
  i, j = np.arange(t)[:, None], np.arange(t)[None]
  far = i - j > window
  dq, dk, dv, dbias = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((b, k.shape[2], t))
  for row in range(b):
    visible = j <= i
    if segment_ids is not None:
      visible = visible & (np.asarray(segment_ids[row])[:, None] == np.asarray(segment_ids[row])[None])
    for head in range(n):
      kv = head // group
      s = q[row, :, head] @ k[row, :, kv].T / np.sqrt(h)
      if bias is not None:
        s = s + np.where(far, np.asarray(bias[row, kv], np.float64), 0.0)
      s = np.where(visible, s, -np.inf)
      p = np.exp(s - s.max(axis=1, keepdims=True))
      p = p / p.sum(axis=1, keepdims=True)
      dp = dout[row, :, head] @ v[row, :, kv].T
      ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
      dq[row, :, head] = ds @ k[row, :, kv] / np.sqrt(h)
      dk[row, :, kv] += ds.T @ q[row, :, head] / np.sqrt(h)
      dv[row, :, kv] += p.T @ dout[row, :, head]
      dbias[row, kv] += np.where(far, ds, 0.0).sum(axis=0)
  return (dq, dk, dv) if bias is None else (dq, dk, dv, dbias)


def close(got, want, tolerance):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
