"""The benchmark of the kernels runs anywhere at tiny shapes, and a failure stops no other case."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import numpy as np
import pytest

from experiments import bench_kernels, tune_kernels
from experiments.bench import cases, flex_attention, kernel_cases, kernel_tuning
from experiments.bench.cases import Bar
from experiments.common import program
from experiments.reports import figures_bench
from pallas_kernels import prefill
from pallas_kernels.common import bench, tuned
from pallas_kernels.common.platform import tracing_for
from pallas_kernels.decode import gpu

SMALL = {name: case.shrunk() for name, case in kernel_cases.CASES.items()}


@pytest.fixture(autouse=True)
def short_chains(monkeypatch):
  monkeypatch.setattr(kernel_cases, "CALLS", 4)


def test_ragged_lengths_have_the_mean_asked_for():
  lengths = bench.ragged_lengths(32, 8, 8192, 8)
  assert lengths.shape == (32, 8) and lengths.dtype == np.int32
  assert abs(lengths.mean() / 1024 - 1) < 0.01 and lengths.min() >= 1 and lengths.max() <= 8192
  assert (bench.ragged_lengths(2, 2, 64, 1) == 64).all()


def test_cases_are_chosen_by_name_or_beginning():
  config = bench_kernels.Config
  assert set(bench_kernels.selected(config())) == set(kernel_cases.CASES)
  assert set(bench_kernels.selected(config(cases=("prefill_cr", "decode_b32_cr1")))) == {
    "prefill_cr8",
    "prefill_cr1",
    "decode_b32_cr1",
  }
  growth = bench_kernels.selected(config(cases=("growth",)))
  assert growth["growth_cr_16"][0] == "CR" and growth["growth_length_131072"][2].slots == 131072
  assert set(growth) < set(bench_kernels.selected(config(growth=True)))
  with pytest.raises(ValueError, match="--cases: no case is called dekode"):
    bench_kernels.selected(config(cases=("dekode",)))


def test_bars_are_judged_where_measured():
  assert cases.judged({"of_floor": 0.96}, (Bar("of_floor", 0.95),))["reached"]
  row = cases.judged({"dense_slowdown": 1.9, "flex_ratio": 20.0}, kernel_cases.CASES["retrofit_t8192"].bars)
  assert row["bar"] == "dense_slowdown <= 1.8, flex_ratio >= 15" and not row["reached"]
  assert cases.judged({"us": 1.0}, (Bar("flex_ratio", 13),)) == {"us": 1.0}


@pytest.mark.standard_promotion  # JAX's own dense attention mixes dtypes
@pytest.mark.parametrize("name", ["decode_b32_cr8", "pages_ring_int8_b32_cr8"])
def test_a_decode_case_measures_time_and_floor(name):
  case = SMALL[name]
  row = kernel_cases.measure_decode(case, 1e10, "xla")
  assert row["us"] > 0 and row["of_floor"] == row["floor_us"] / row["us"]
  assert row["dense_ratio"] == row["dense_us"] / row["us"] and row["difference"] == 0
  lengths = bench.ragged_lengths(case.batch, case.heads, case.slots, case.cr)
  size = 4 * case.size if case.stored == "bfloat16" else 2 * case.size + 2 * 4
  slots = np.where(np.arange(case.slots) < case.ring, 4 * case.size, size)
  floor = sum(slots[:length].sum() for length in lengths.flat)
  assert row["floor_us"] == pytest.approx(floor / 1e10 * 1e6)
  assert ("contiguous_ratio" in row) == (case.pages > 0)


@pytest.mark.standard_promotion
def test_a_case_with_mass_is_measured_beside_one_without():
  row = bench_kernels.measure(SMALL["pages_ring_mass_b32"], 1e10, bench_kernels.Config(), "xla")
  assert row["slowdown"] == row["us"] / row["plain_us"] and row["xla_ratio"] == row["xla_us"] / row["us"]
  assert row["difference"] == row["mass_difference"] == 0 and "contiguous_us" not in row


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["decode_sinks", "prefill_softcap", "retrofit_sinks", "retrofit_age"])
def test_other_softmaxes_and_a_bias_by_age_are_measured_beside_a_plain_softmax(name):
  row = bench_kernels.measure(SMALL[name], 1e10, bench_kernels.Config(), "xla")
  assert row["slowdown"] == row["us"] / row["plain_us"] and row["xla_ratio"] == row["xla_us"] / row["us"]
  assert str(SMALL[name]).endswith(name.split("_")[1]) and not any(key.startswith("flex") for key in row)


def test_pages_hold_what_is_live_and_no_more():
  case = SMALL["pages_b32_cr8"]
  lengths = np.array([[1, 128], [16, 17]], np.int32)
  pages = kernel_cases.paged(case, lengths)
  assert pages.pool.shape == (case.layers * (1 + 8 + 1 + 2), 16, 256)
  used = np.asarray(pages.table) >= 0
  np.testing.assert_array_equal(used.sum(-1), np.broadcast_to([[1, 8], [1, 2]], (case.layers, 2, 2)))
  assert len(set(np.asarray(pages.table)[used].tolist())) == pages.pool.shape[0]


def test_a_prefill_case_has_the_compression_asked_for():
  for name, visible in (("prefill_cr8", 0.14), ("prefill_cr1", 1.0)):
    text = kernel_cases.CASES[name]
    _, last = kernel_cases.evictions(text)
    outside = last[..., : -text.window - 1]
    held = text.window + 1 + (outside == prefill.NEVER).sum(axis=-1).mean()
    assert abs(text.tokens / held / text.cr - 1) < 0.02
    seen = np.minimum(last, text.tokens - 1).astype(np.int64) - np.arange(text.tokens) + 1
    assert seen.mean() * 2 / (text.tokens + 1) == pytest.approx(visible, abs=0.01)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["prefill_cr8", "retrofit_t8192"])
def test_a_text_case_is_measured_beside_dense_attention(name):
  case = SMALL[name]
  row = bench_kernels.measure(case, 1e10, bench_kernels.Config(flex=False), "xla")
  assert row["dense_ratio"] == row["dense_us"] / row["us"] > 0 and "reached" not in row


def test_flex_attention_says_why_it_was_not_measured(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  shape = {"batch": 1, "tokens": 256, "queries": 4, "heads": 2, "size": 64, "window": 16}
  assert "PyTorch" in flex_attention.measure(**shape)["skipped"]


def test_pictures_show_what_was_measured(tmp_path):
  pytest.importorskip("matplotlib")
  row = {"name": "decode_b32_cr8", "us": 60.0, "dense_us": 350.0, "floor_us": 43.0}
  growth = [{"name": f"growth_cr_{cr}", "axis": "CR", "value": cr, "us": 9.0, "floor_us": 5.0} for cr in (1, 4)]
  failed = {"name": "prefill_cr8", "error": "no"}
  assert figures_bench.kernels(tmp_path / "bench.png", [row, failed, *growth], "cpu")
  assert figures_bench.growth(tmp_path / "growth.png", [row, failed, *growth], "cpu")
  assert figures_bench.kernels(tmp_path / "none.png", growth, "cpu") is None
  assert figures_bench.growth(tmp_path / "none.png", [row], "cpu") is None
  assert all((tmp_path / name).stat().st_size > 0 for name in ("bench.png", "growth.png"))


def test_the_search_keeps_the_fastest_and_passes_over_failures():
  default = gpu.Blocks(64, 3, 512, 264)

  def clock(sizes):
    if sizes.block == 128:
      raise RuntimeError("does not fit")
    return abs(sizes.split - 192) + abs(sizes.stages - 4) + abs(sizes.workers - 132)

  groups = kernel_tuning.decode_candidates(132)
  best, us = kernel_tuning.search(default, groups, clock, time.monotonic() + 60)
  assert best == gpu.Blocks(64, 4, 192, 132) and us == 0
  best, us = kernel_tuning.search(default, kernel_tuning.decode_candidates(132), clock, 0.0)
  assert best == default


def test_tuning_writes_a_winner_once_a_class(tmp_path, monkeypatch):
  """In a table that other entries stay in; the first case of a class of shapes decides."""
  path, done = tmp_path / "tuned.json", set()
  path.write_text(json.dumps({"other": {"decode": {}}}))
  monkeypatch.setattr(
    kernel_cases, "decode_us", lambda case, override, attend: (float(attend.keywords["blocks"].split), 0)
  )
  about = {"device": "here", "jax": "0", "date": "today"}
  for name in ("decode_b32_cr8", "decode_b32_cr1", "pages_b32_cr8"):
    kernel_tuning.tune(name, kernel_cases.CASES[name], path, time.monotonic() + 60, about, done)
  entries = json.loads(path.read_text())["here"]["decode"]
  assert set(entries) == {"pairs256 H128 S8192", "pairs256 H128 S0 page32 of bfloat16"}
  entry = entries["pairs256 H128 S8192"]
  assert entry["us"] == entry["blocks"]["split"] == 128 and entry["measured"].startswith("today, jax 0, decode_b32_cr8")
  assert "other" in json.loads(path.read_text())


def test_the_program_tunes_the_cases_asked_for(tmp_path, monkeypatch, capsys):
  tried = []

  def tune(name, work, path, end, about, done):
    tried.append((name, path))
    done.add(("decode", name))

  monkeypatch.setattr(kernel_tuning, "tune", tune)
  config = tune_kernels.Config(cases=("decode_b32",), table=tmp_path / "t.json")
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  monkeypatch.setattr(program, "flag_values", lambda changed_only=False: {})
  tune_kernels.main()
  assert tried == [(name, tmp_path / "t.json") for name in ("decode_b32_cr8", "decode_b32_cr1")]
  assert json.loads(capsys.readouterr().out)["classes"] == ["decode decode_b32_cr1", "decode decode_b32_cr8"]


@pytest.mark.parametrize("name", sorted(kernel_cases.CASES))
def test_tuned_cases_have_sizes_and_a_class(name):
  case = kernel_cases.CASES[name]
  operation, shapes, default, groups, _ = kernel_tuning.subject(case)
  kind = name.split("_")[0].replace("pages", "decode").replace("retrofit", "window_bias")
  assert operation == kind and "H" in shapes
  candidates = [sizes for group in groups for sizes in group(default)]
  assert len(candidates) > 5 and all(isinstance(sizes, type(default)) for sizes in candidates)


def test_measured_winners_fit_their_kernels():
  """Every entry of the shipped table names fields that there are, and says where it was measured."""
  kinds = {"decode": gpu.Blocks, "prefill": kernel_tuning.prefill_gpu.Blocks}
  kinds["window_bias"] = kernel_tuning.retrofit_gpu.Blocks
  for operations in tuned.table().values():
    for operation, entries in operations.items():
      for entry in entries.values():
        assert set(entry["blocks"]) <= {field.name for field in dataclasses.fields(kinds[operation])}
        assert entry["us"] > 0 and entry["measured"]
  assert tuned.shape_class(pairs=200, H=128, of=" int8") == "pairs256 H128 of int8"
  default = gpu.Blocks(64, 3, 512, 264)
  with tracing_for("cpu"):  # no such device, whatever is attached
    assert tuned.blocks("decode", "pairs256 H128 S8192", default) is default
  assert tuned.merged({"a": {"x": {"s": 1}}}, "a", "x", "t", {"us": 2}) == {"a": {"x": {"s": 1, "t": {"us": 2}}}}
