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

  kinds = [f"{stopwatch.EVENTS}{name}" for name in ("jaxpr_trace_duration", "backend_compile_duration")]
  spend([(12.0, 1.0, kinds[0]), (13.0, 2.5, kinds[0]), (14.0, 9.0, "/jax/other"), (20.0, 2.0, kinds[1])])
  assert (watch.seconds, watch.compiling) == pytest.approx((11.0 - 2.5 - 2.0, 4.5))
  clock[0] = 30.0
  jax.monitoring.record_event_duration_secs(kinds[0], 5.0)  # nothing runs
  spend([(31.0, 4.0, kinds[1])])  # begun before this block, which it fills up to there
  assert (watch.seconds, watch.compiling) == pytest.approx((6.5 + 1.0, 4.5 + 1.0))


def test_what_jax_compiles_is_noticed():
  """In a first call, and no longer in a second one."""
  double, x = jax.jit(lambda x: x + x), jnp.ones((3, 5))
  first, second = Stopwatch(), Stopwatch()
  start = time.perf_counter()
  for watch in (first, second):
    with watch.running():
      double(x).block_until_ready()
  assert first.compiling > 0 == second.compiling and min(first.seconds, second.seconds) > 0
  assert first.compiling + first.seconds + second.seconds < time.perf_counter() - start
