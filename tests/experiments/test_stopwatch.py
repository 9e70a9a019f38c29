"""Times: the stopwatch leaves out what JAX compiles, and chains have the seconds of their steps."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from experiments.methods import stopwatch
from experiments.methods.stopwatch import Stopwatch


def test_compilation_does_not_count(monkeypatch):
  """Spans that JAX reports, (end, seconds): tracing within tracing, a span of another kind, one begun before."""
  clock = [10.0]
  monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])
  watch = Stopwatch()

  def spend(events):
    with watch.running():
      for end, seconds, name in events:
        clock[0] = end
        jax.monitoring.record_event_duration_secs(name, seconds)
      clock[0] += 1.0

  kinds = [f"{stopwatch.COMPILATION}{name}" for name in ("jaxpr_trace_duration", "backend_compile_duration")]
  spend([(12.0, 1.0, kinds[0]), (13.0, 2.5, kinds[0]), (14.0, 9.0, "/jax/other"), (20.0, 2.0, kinds[1])])
  assert watch.seconds == pytest.approx(11.0 - 2.5 - 2.0)
  clock[0] = 30.0
  jax.monitoring.record_event_duration_secs(kinds[0], 5.0)  # nothing runs
  spend([(31.0, 4.0, kinds[1])])  # begun before this block, which it fills up to there
  assert watch.seconds == pytest.approx(6.5 + 1.0)


def test_a_first_call_takes_no_longer_than_what_it_computes():
  """Compiling 200 matrix products takes far longer than their 200 * 16^3 multiplications."""

  @jax.jit
  def long(x):
    for _ in range(200):
      x = jnp.tanh(x @ x)
    return x

  x, watch = jnp.ones((16, 16)), Stopwatch()
  start = time.perf_counter()
  with watch.running():
    long(x).block_until_ready()
  assert 0 < watch.seconds < 0.5 * (time.perf_counter() - start)
