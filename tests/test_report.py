"""The demo's reading and writing: its figures against the whole text at once, its texts and tables, its picture."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import masks
from dms_jax.evaluation import text_quality
from dms_jax.model import Eviction, forward, unembed
from experiments import plots, report
from tests import tiny

T, NEW = 61, 9


@pytest.fixture(scope="module")
def models():
  cfg = tiny.config(num_layers=3)
  original = tiny.model(cfg)
  retrofit = tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0))
  params = {**original.params, "layers": {**original.params["layers"]}}
  for name in ("dms_norm", "dms_proj"):
    params["layers"][name] = retrofit.params["layers"][name]
  params["layers"]["v_proj"] = params["layers"]["v_proj"] * 1.2  # a retrofit's weights are not the original's
  return original, retrofit.replace(params=params)


@pytest.fixture(scope="module")
def tokens(models):
  return np.asarray(tiny.tokens(models[0].config, 1, T)[0])


@pytest.fixture(scope="module")
def compared(models, tokens):
  return report.compare(*models, tokens, new_tokens=NEW, chunk=16)


def test_quality_equals_the_whole_text_at_once(models, tokens, compared):
  """Float32: chunked and whole differ by summation order alone."""
  whole = text_quality(*models, tokens, T)
  assert compared["dense"]["perplexity"] == pytest.approx(whole["perplexity_original"], rel=1e-5)
  assert compared["dms"]["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
  assert compared["dms"]["kl"] == pytest.approx(whole["kl"], rel=1e-4, abs=1e-7)
  assert compared["dense"]["kl"] == 0.0


def test_written_tokens_and_live_curve_follow_the_masked_formula(models, tokens, compared):
  """Greedy tokens of one full forward pass; live tokens of every length by the definition of held tokens."""
  for name, model in zip(("dense", "dms"), models, strict=True):
    run = compared[name]
    text = jnp.asarray(np.append(tokens, run["written"]), jnp.int32)[None]
    hidden, z = forward(model, text, eviction=Eviction(threshold=0.0) if model.dms else None)
    greedy = jnp.argmax(unembed(model, hidden), axis=-1)[0]
    np.testing.assert_array_equal(greedy[T - 1 : -1], run["written"])
    for position, live in zip(run["position"], run["live"], strict=True):
      if model.dms is None:
        assert (live == position).all()
        continue
      evicted = masks.about_key(z[..., :position] > 0, model.dms.shift, False)
      np.testing.assert_array_equal(live, masks.held_tokens(evicted, model.dms.window)[:, 0])


def test_metrics(models, compared):
  dense, dms = compared["dense"]["metrics"], compared["dms"]["metrics"]
  assert dense.achieved_cr == pytest.approx(1.0) and dms.achieved_cr > 1.2
  assert dense.kv_reads == sum(range(T + 1, T + NEW + 1)) > dms.kv_reads
  assert dense.peak_tokens == T + NEW == dense.seen[0]
  assert dms.achieved_cr == pytest.approx((T + NEW) / compared["dms"]["live"][-1].mean())
  assert dense.bytes_live == (T + NEW) * 3 * 2 * 2 * 16 * 4 <= dense.bytes_allocated


def test_a_cache_that_starts_small_grows(models, tokens, compared, monkeypatch):
  """Room is added as heads need it, and changes nothing that is computed."""
  monkeypatch.setattr(report, "GROWTH", 24)
  grown = report.compare(*models, tokens, new_tokens=NEW, chunk=16)["dms"]
  assert grown["metrics"].bytes_allocated in [strides * 24 * 3 * 2 * 2 * 16 * 4 for strides in (2, 3, 4)]
  assert grown["kl"] == pytest.approx(compared["dms"]["kl"], rel=1e-4)
  np.testing.assert_array_equal(grown["written"], compared["dms"]["written"])


def test_columns_and_table(compared):
  shown = report.side_by_side("one two three", "four\n\nfive", width=8).splitlines()
  assert shown == ["dense    | DMS", "-------- | --------", "one two  | four", "three    |", "         | five"]
  runs = [{**run, **run["metrics"].to_json()} for run in (compared["dense"], compared["dms"])]
  text = report.table(*runs)
  for words in (
    "perplexity of what was read",
    "KL to the original",
    f"achieved CR at T = {T + NEW}",
    "cache, live",
    "x less",
  ):
    assert words in text


def test_picture(compared, tmp_path):
  pytest.importorskip("matplotlib")
  path = plots.live_tokens(tmp_path / "new" / "a.png", compared["dense"], compared["dms"], read=T, title="tiny")
  assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG") and path.endswith("a.png")


def test_own_text_is_the_documents_first_and_enough():
  text = report.own_text()
  assert text.startswith("# dms_jax") and "Dynamic Memory Sparsification" in text
  assert len(text) > 40_000  # some 10,000 tokens


def test_settings_are_checked():
  with pytest.raises(ValueError, match="--chunk=1 must be 2 or more"):
    report.Config(chunk=1)
