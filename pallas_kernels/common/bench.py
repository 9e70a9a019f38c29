"""Shared by the benchmarks of all kernels: a clock, measured read bandwidth, and ragged lengths."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def clock(f: Callable, *args, seconds: float = 0.15, rounds: int = 3) -> float:
  """Seconds a call of the compiled `f` takes on the device: the best of `rounds`, calls queued back to back."""
  jax.block_until_ready(f(*args))
  begin = time.perf_counter()
  jax.block_until_ready(f(*args))
  once = time.perf_counter() - begin
  calls = max(3, min(200, int(seconds / max(once, 1e-6))))
  best = float("inf")
  for _ in range(rounds):
    begin = time.perf_counter()
    for _ in range(calls):
      out = f(*args)
    jax.block_until_ready(out)
    best = min(best, (time.perf_counter() - begin) / calls)
  return best


def read_bandwidth(size: int = 2**30) -> float:
  """Bytes a second at which XLA's best reduction reads `size` bytes."""
  x = jnp.ones((size // 4096, 1024), jnp.int32)
  reductions = (lambda x: x.sum(), lambda x: x.sum(axis=1), lambda x: x.max())
  return max(size / clock(jax.jit(f), x) for f in reductions)


def ragged_lengths(batch: int, heads: int, slots: int, cr: float | int, seed: int = 0) -> np.ndarray:
  """int32 [B, K]: exp(0.8 N(0, 1)) times a mean of slots / cr, within 1 and `slots`; all `slots` at cr 1."""
  if cr == 1:
    return np.full((batch, heads), slots, np.int32)
  live = np.exp(0.8 * np.random.default_rng(seed).normal(size=(batch, heads)))
  for _ in range(20):  # the clip moves the mean
    live = np.clip(live / live.mean() * slots / cr, 1, slots)
  return live.astype(np.int32)
