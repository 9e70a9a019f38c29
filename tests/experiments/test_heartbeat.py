"""Programs speak: a heartbeat in silence, and a forecast of long work on a CPU."""

from __future__ import annotations

import time

import pytest

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.retrofit import RetrofitConfig, ScheduleConfig
from experiments.common import forecast, heartbeat


def test_silence_is_broken_until_something_is_said():
  lines: list[str] = []
  with heartbeat.Heartbeat(lines.append, patience=0.2):
    heartbeat.spoke("compiling (kept in x) ...")
    time.sleep(0.75)
    told = list(lines)
    for _ in range(8):  # busy lines
      heartbeat.spoke("step 3/400: loss 0.2")
      time.sleep(0.05)
    assert lines == told
  assert 2 <= len(told) <= 3 and all(line.startswith("... at work, ") for line in told)
  assert told[0].endswith("since 'compiling'")
  time.sleep(0.3)
  assert lines == told


BIG = ModelConfig(num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152)


def line(monkeypatch, steps: int, speed: float, **settings) -> str:
  monkeypatch.setattr(forecast, "on_cpu", lambda: True)
  monkeypatch.setattr(forecast, "product_speed", lambda dtype: speed)
  retrofit = RetrofitConfig(schedule=ScheduleConfig(steps=steps), **settings)
  return forecast.retrofit_line(BIG, DMSConfig(window=64), LoRAConfig(rank=16), retrofit, steps)


def test_a_long_retrofit_is_told_what_is_quick(monkeypatch):
  told = line(monkeypatch, 400, 50e9)
  assert told.startswith("400 steps of 2 x 4,096 tokens: about ") and " h " in told
  assert "--retrofit.seq_len=512 --retrofit.batch_size=1 --retrofit.schedule.steps=" in told
  assert "; " not in line(monkeypatch, 10, 1e15, seq_len=256)
  assert line(monkeypatch, 0, 50e9) == ""


def test_the_forecast_is_that_of_the_operations(monkeypatch):
  monkeypatch.setattr(forecast, "product_speed", lambda dtype: 1e12)
  retrofit = RetrofitConfig(batch_size=1, seq_len=256)
  seconds = forecast.step_seconds(BIG, DMSConfig(window=64), LoRAConfig(rank=16), retrofit)
  matrices = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536) + 49152 * 576
  assert seconds == pytest.approx(6 * matrices * 256 / (forecast.SHARE * 1e12), rel=0.1)  # teacher 2, student 2 + 2


def test_other_devices_get_no_forecast(monkeypatch):
  monkeypatch.setattr(forecast, "on_cpu", lambda: False)
  retrofit = RetrofitConfig(schedule=ScheduleConfig(steps=400))
  assert forecast.retrofit_line(BIG, DMSConfig(window=64), LoRAConfig(rank=16), retrofit, 400) == ""
  assert forecast.reading_seconds(None, 100, 1) is None
