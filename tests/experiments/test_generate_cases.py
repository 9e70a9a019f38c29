"""bench_generate's cases: caches filled directly equal those that reading leaves; all cases run."""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax.config import ModelConfig
from dms_jax.generation import decode as decoding
from dms_jax.generation.decode import StopCriteria
from dms_jax.generation.sampling import Sampling
from experiments import bench_generate
from experiments.bench import cases, generate_cases, static_transformers, synthetic
from experiments.bench.generate_points import Bench, Energy, Point, Programs, Shape
from experiments.reports import figures_bench, tables
from pallas_kernels.common import compat
from pallas_kernels.common.platform import tracing_for

TINY, SHAPE = generate_cases.TINY, generate_cases.SMALL.shape
WINDOW = SHAPE.window


@pytest.fixture(scope="module")
def model():
  return synthetic.random_model(TINY, window=WINDOW, dtype=jnp.float32)


def policy(tokens: int = 64, cr: float = 4):
  return synthetic.sampled_policy(TINY, tokens=tokens, cr=cr, window=WINDOW)


# What is timed --------------------------------------------------------------------------------------------------------


def test_heads_hold_what_was_asked_for():
  """On the average as the CR says, each by its own rate, and none less than its window."""
  config = ModelConfig(num_layers=16, num_kv_heads=8, num_heads=8)
  model = dms_jax.model.Model({}, config, dms_jax.config.DMSConfig(window=64))
  sampled = synthetic.sampled_policy(config, tokens=4096, cr=8, window=64)
  archived, _ = synthetic.left_by(model, sampled, 4096)
  held = archived + 65
  assert held.mean() == pytest.approx(512, rel=0.02) and held.min() >= 65
  assert np.log(held).std() == pytest.approx(synthetic.SPREAD, abs=0.15)
  again = synthetic.policy_of(held, tokens=4096, window=64)
  np.testing.assert_allclose(again.rates, sampled.rates, atol=0.02)
  with pytest.raises(ValueError, match="CR 8 at 512 tokens leaves 64 a head, not more than the window's 65"):
    synthetic.sampled_policy(config, tokens=512, cr=8, window=64)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_filled_cache_is_as_reading_leaves_it(model, kind):
  """All that says where it stands; keys and values are random."""
  tokens, sampled = 57, policy()
  ids = np.random.default_rng(0).integers(0, TINY.vocab_size, tokens).tolist()
  real = dms_jax.generate(model, [ids] * 2, policy=sampled, max_new_tokens=0, cache=kind).conversation.cache
  if kind == "contiguous":
    shape = synthetic.slots_shape(model, sampled, batch=2, longest=64)
  else:
    pages = 2 * synthetic.pages_for(model, sampled, tokens, 4)
    shape = synthetic.pages_shape(model, sampled, batch=2, longest=64, pages=pages, page=4)
  filled = synthetic.filled(shape, model, sampled, tokens=tokens)
  for name in ("archived", "evicted", "seen"):
    np.testing.assert_array_equal(getattr(filled, name), getattr(real, name), err_msg=name)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), filled) == jax.tree.map(lambda x: (x.shape, x.dtype), shape)
  assert synthetic.nbytes(shape) == filled.nbytes


@pytest.mark.parametrize("shared", [False, True])
def test_a_filled_pool_is_sound(model, shared):
  """A page has as many owners as refer to it; chains of one text refer to its full pages together."""
  sampled, batch, size = policy(), 3, 4
  pages = batch * synthetic.pages_for(model, sampled, 64, size) + 5
  shape = synthetic.pages_shape(model, sampled, batch=batch, longest=64, pages=pages, page=size)
  cache = synthetic.filled(shape, model, sampled, tokens=64, shared=shared)
  table, owned = np.asarray(cache.table.pages), np.asarray(cache.table.owned)
  np.testing.assert_array_equal(owned, -(-np.asarray(cache.archived) // size))
  used = table[np.arange(table.shape[-1]) < owned[..., None]]
  np.testing.assert_array_equal(cache.table.pool.owners, np.bincount(used, minlength=pages))
  free = np.asarray(cache.table.pool.free[: int(cache.table.pool.count)])
  assert set(free) | set(used) == set(range(pages)) and not set(free) & set(used)
  full = np.asarray(cache.archived[0, 0, 0]) // size
  first = table[0, :, 0, :full]
  assert full > 0 and (first == first[0]).all() == shared
  with pytest.raises(ValueError, match="rows of 64 tokens need"):
    synthetic.filled(shape.replace(), model, policy(cr=1.5), tokens=64)


def test_a_point_goes_on_from_the_same_state_every_time():
  bench = Bench(SHAPE, 1e10, Programs(2), Energy(), 0.01)
  point = Point("dms", 2, 64, 96)
  row = bench.point(point)
  assert bench.point(point) is row and row["joules_per_token"] is None
  archived, _ = synthetic.left_by(bench.model("dms"), SHAPE.policy("dms", 64), 64)
  held = archived.mean() + WINDOW + 1
  assert row["CR"] == pytest.approx(64 / held, rel=1e-6)
  assert row["kv_bytes"] == held * archived.size * point.batch * 2 * TINY.head_dim * 4
  weights = sum(x.nbytes for x in jax.tree.leaves(bench.model("dms").params))
  assert row["roofline_ms"] == pytest.approx((weights + row["kv_bytes"]) / 1e10 * 1e3)
  assert row["of_roofline"] == pytest.approx(row["roofline_ms"] / row["ms"])
  chains = bench.point(Point("dms", 2, 64, 96, chains=True))
  assert chains["kv_bytes"] == row["kv_bytes"] and chains["used_bytes"] < row["used_bytes"]
  dense = bench.point(Point("dense", 2, 64, 64))
  assert dense["CR"] == 1 and "dms_norm" not in bench.model("dense").params["layers"][0]


def test_what_does_not_compile_says_so_where_it_is_used():
  programs = Programs(1)
  programs.start("bad", lambda: 1 / 0)
  programs.wait(60)
  with pytest.raises(ZeroDivisionError):
    programs.get("bad", None)


def test_energy_says_why_there_is_none():
  energy = Energy()
  assert energy() is None and "cpu" in energy.why


@pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11")
def test_kernels_are_lowered_once_for_a_list_of_layers():
  config = ModelConfig(num_layers=3, d_model=64, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=128)
  with compat.assume_hopper(), tracing_for("gpu"):
    bench = Bench(Shape(config, window=64, cr=2, page=32), 1e10, Programs(1), Energy())
    cache = bench.cache_shape("dms", 2, 512)
    rows = jax.eval_shape(lambda: synthetic.running_rows(2))
    shapes = jax.eval_shape(lambda: (bench.model("dms"), StopCriteria(jnp.zeros(0, jnp.int32))))
    traced = decoding.decode_block.trace(
      shapes[0], bench.shape.policy("dms", 512), cache, rows, Sampling(), shapes[1], steps=2, history=False
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("decode_pages32_") > 0 and text.count("stablehlo.custom_call @mosaic_gpu") == 2


# Cases ----------------------------------------------------------------------------------------------------------------


def test_cases_are_chosen_by_name_or_beginning():
  names = generate_cases.names(generate_cases.FULL)
  smollm2 = {"step_smollm2_b32_8k", "step_smollm2_by_cr_b1_8k", "step_smollm2_by_cr_b32_8k"}
  assert smollm2 | {"memory_8k", "step_b1_8k", "step_b128_32k", "first_token_32k", "transformers"} < set(names)
  assert cases.chosen(names, ()) == names
  assert cases.chosen(names, ("energy", "step_b1_")) == ["step_b1_8k", "step_b1_32k", "energy_equal", "energy_budget"]
  with pytest.raises(ValueError, match="--cases: no case is called stap"):
    cases.chosen(names, ("stap",))


def test_cases_are_guarded_and_judged():
  run = cases.Runner(60, {"jax": "0"})
  run("bad", {}, lambda: 1 / 0)
  run("good", {"case": "b"}, lambda: cases.judged({"x": 1.0, "y": 2.0}, (cases.Bar("x", 1), cases.Bar("y", 1, True))))
  run.end = 0.0
  run("late", {}, lambda: {"x": 1.0})
  bad, good, late = run.rows.values()
  assert "ZeroDivisionError" in bad["error"] and late["skipped"] == "out of time" and good["jax"] == "0"
  assert good["bar"] == "x >= 1, y <= 1" and not good["reached"]
  assert [cases.measured(row) for row in (bad, good, late)] == [False, True, False]
  assert cases.judged({"x": None}, (cases.Bar("x", 1),)) == {"x": None}
  text = tables.of_mappings(list(run.rows.values()), ("name", "case", "x"))
  assert "ZeroDivisionError" in text and "| good | b | 1 |" in re.sub(" +", " ", text)


def test_later_runs_add_to_earlier_ones(tmp_path):
  path = tmp_path / "cases.json"
  old = [{"name": name, "x": 1.0, "device": "A", "scale": "full"} for name in ("b", "a")]
  path.write_text(json.dumps({"rows": old}))
  new = {"a": {"name": "a", "error": "no"}, "b": {"name": "b", "x": 2.0}, "c": {"name": "c", "skipped": "late"}}
  rows = cases.merged(path, new, ["a", "b", "c"])
  assert [(row["name"], row.get("x")) for row in rows] == [("a", 1.0), ("b", 2.0), ("c", None)]
  cases.check_same(path, {"device": "A", "scale": "full"})
  with pytest.raises(ValueError, match="--output="):
    cases.check_same(path, {"device": "B", "scale": "full"})


def test_all_cases_run_at_tiny_shapes(tmp_path, monkeypatch, capsys):
  """transformers apart; and a second run adds to the first."""
  monkeypatch.setattr(generate_cases, "run_transformers", lambda setup: {"tokens_per_s": 10.0, "step_s": 0.2})
  config = bench_generate.Config(cases=("all",), scale="small", workers=2, output=str(tmp_path))
  bench_generate.run_cases(config)
  rows = {row["name"]: row for row in json.loads((tmp_path / "cases.json").read_text())["rows"]}
  assert list(rows) == generate_cases.names(generate_cases.SMALL)
  for name, row in rows.items():
    assert cases.measured(row) != name.startswith("energy_"), row
  assert rows["memory_64"]["CR"] > 3 and rows["memory_64"]["bytes_ratio"] < rows["memory_64_int8"]["bytes_ratio"]
  assert "dense_ratio" in rows["step_b2_64"] and "dense_ratio" not in rows["step_b2_96"]
  by_cr, merged = rows["step_smollm2_by_cr_b2_96"], rows["step_smollm2_b2_96"]
  assert by_cr["merged_ms"] == merged["ms"] and by_cr["over_merged"] == by_cr["ms"] / merged["ms"]
  assert by_cr["kv_bytes"] == merged["kv_bytes"] and by_cr["roofline_ms"] > merged["roofline_ms"]
  assert rows["concurrency"]["cache_bytes"] <= generate_cases.SMALL.budget
  assert rows["first_token_48"]["slowdown"] > 0 and rows["transformers"]["transformers_ratio"] > 0
  assert [point[2] for point in rows["scaling_budget"]["series"]["dense"]] == [1, 2]
  line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  assert len(line["rows"]) == len(rows) and line["config"]["scale"] == "small"
  for name in ("cases.png", "scaling.png"):
    assert not line["png"] or (tmp_path / name).stat().st_size > 1000


def test_pictures_show_what_was_measured(tmp_path):
  pytest.importorskip("matplotlib")
  step = {"name": "step_b1_8k", "case": "B1 T8192", "ms": 1.2, "roofline_ms": 0.9, "of_roofline": 0.75}
  judged = {"name": "concurrency", "bar": "rows_ratio >= 7.5", "rows_ratio": 7.6, "reached": True}
  failed = {"name": "memory_8k", "error": "no"}
  assert figures_bench.decode_steps(tmp_path / "a.png", [step, judged, failed], "here")
  assert figures_bench.decode_steps(tmp_path / "none.png", [failed], "here") is None
  series = {"dms": [[1.0, 10.0, 1, 1.0], [2.0, 20.0, 2, 1.5]], "dense": [[1.0, 5.0, 1, 1.0]]}
  assert figures_bench.scaling(tmp_path / "b.png", [{"name": "scaling_budget", "series": series}, failed], "here")
  assert figures_bench.scaling(tmp_path / "none.png", [failed], "here") is None
  assert not (tmp_path / "none.png").exists()


def test_flags_say_what_is_missing():
  for settings in ({}, {"checkpoint": "a", "cases": ("all",)}):
    with pytest.raises(ValueError, match="give either --checkpoint, whose speed is measured, or --cases"):
      bench_generate.Config(**settings)


def test_transformers_says_why_it_was_not_measured(monkeypatch):
  monkeypatch.setitem(sys.modules, "transformers", None)
  assert "transformers" in static_transformers.measure({}, 1, 1, 1, "float32")["skipped"]


@pytest.mark.slow
def test_transformers_runs_in_a_process_of_its_own():
  pytest.importorskip("transformers")
  found = generate_cases.run_transformers(generate_cases.SMALL)
  assert found["tokens_per_s"] == pytest.approx(2 / found["step_s"]) and found["on"] in ("cpu", "cuda")


def test_programs_compile_side_by_side():
  programs = Programs(2)
  lower = lambda: jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
  assert float(programs.get("a", lower)(jnp.zeros(3))[0]) == 1
