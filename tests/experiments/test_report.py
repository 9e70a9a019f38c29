"""The report: margins, styles, charts, results of several runs, times, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.common import program
from experiments.methods import pareto, records
from experiments.methods.summary import summarise
from experiments.reports import charts, page, results, runs, styles
from experiments.tasks import TASKS
from tests.report_runs import Outline, chunks, made_up, record, timed, write

ROOT = Path(__file__).parents[2]


# Frontiers and margins ------------------------------------------------------------------------------------------------


def test_a_frontier_holds_what_no_cheaper_point_reaches():
  points = [(3.0, 5.0), (1.0, 2.0), (2.0, 2.0), (1.0, 1.0), (4.0, 4.0), (5.0, 6.0)]
  expected = [
    (cost, value)
    for cost, value in sorted(points)
    if not any((c, -v) < (cost, -value) and v >= value for c, v in points)
  ]  # fmt: skip
  assert pareto.frontier(points) == expected == [(1.0, 2.0), (3.0, 5.0), (5.0, 6.0)]
  assert pareto.frontier([]) == []


@pytest.mark.parametrize("log", [False, True])
def test_a_margin_is_the_mean_gap_over_the_common_costs(log):
  """Compared with the mean over a fine grid of the common interval; midpoints of 100,000 cells err below 1e-6."""
  rng = np.random.default_rng(0)
  scale = np.log if log else np.asarray
  for _ in range(20):
    a, b = (
      [(float(x), float(y)) for x, y in zip(10 ** rng.uniform(0, 2, n), rng.random(n), strict=True)] for n in (9, 6)
    )
    (xa, ya), (xb, yb) = (np.array(pareto.frontier(points)).T for points in (a, b))
    low, high = max(scale(xa[0]), scale(xb[0])), min(scale(xa[-1]), scale(xb[-1]))
    if low >= high:
      assert pareto.margin(a, b, log) is None
      continue
    grid = low + (high - low) * (np.arange(100_000) + 0.5) / 100_000
    expected = np.mean(np.interp(grid, scale(xa), ya) - np.interp(grid, scale(xb), yb))
    assert pareto.margin(a, b, log) == pytest.approx(expected, abs=1e-6)
    assert pareto.margin(b, a, log) == pytest.approx(-expected, abs=1e-6)


def test_a_margin_without_a_common_interval_is_none():
  assert pareto.margin([(1, 1), (2, 2)], [(3, 1), (4, 2)]) is None
  assert pareto.margin([(1, 1), (2, 2)], [(2, 1), (4, 2)]) is None  # a single cost
  assert pareto.margin([(1, 1)], [(1, 1)]) is None and pareto.margin([], [(1, 1), (2, 2)]) is None
  with pytest.raises(ValueError, match="above 0"):
    pareto.margin([(0, 1), (2, 2)], [(1, 1), (2, 2)], log=True)


# Styles and charts ----------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
  """WCAG 2's contrast ratio of two colours."""

  def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


def test_methods_look_different_and_stand_out_from_the_page():
  template = (page.TEMPLATES / "report.html").read_text()
  papers = re.findall(r"--paper: (#\w+)", template)
  white, dark = (paper if len(paper) == 7 else "#" + "".join(2 * digit for digit in paper[1:]) for paper in papers)
  look = styles.styles([f"m{i}" for i in range(20)], "m7")
  assert (look["m7"].light, look["m7"].number) == (styles.NEUTRAL[0], 0)
  assert len({(style.light, style.marker) for style in look.values()}) == 20
  for style in look.values():
    assert contrast(style.light, white) >= 3 and contrast(style.dark, dark) >= 3
  bands = re.findall(r"--band: (#\w+)", template)
  for name, least in (("ink", 7), ("soft", 4.5), ("gone", 4.5), ("link", 4.5)):
    for colour, background, band in zip(re.findall(rf"--{name}: (#\w+)", template), (white, dark), bands, strict=True):
      assert contrast(colour, background) >= least and contrast(colour, band) >= min(least, 4.3), (name, colour)


def test_numbers_are_short_and_carry_their_unit():
  assert [styles.short(x) for x in (None, 0.5, 950, 9500, 999_700, 1.2e6, 3e9)] == [
    "", "0.5", "950", "9.5 k", "1 M", "1.2 M", "3 G",
  ]  # fmt: skip
  assert styles.number("accuracy", -1.25, "+") == "\u22121.2" and styles.number("kl", 0.02264) == "0.0226"
  assert styles.named("accuracy") == "accuracy, %" and styles.named("answer_loglik").endswith(", nats a token")
  assert styles.limit({}) == styles.limit({"threshold": 0.0}) == "" and styles.limit({"cr": 4.0}) == "CR 4"
  assert styles.limit({"budget": 1024.0, "threshold": 0.5}) == "1,024 tokens, threshold 0.5"


def test_ticks_cover_what_they_measure():
  for low, high in ((0, 1), (37.2, 38.1), (-1.4, -1.1), (3, 970)):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) <= 9
    assert np.allclose(np.diff(found), found[1] - found[0])
  for low, high in ((1, 1.3), (95, 105), (120, 90_000), (1, 1e9)):
    found = charts.log_ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] < found[-1] <= high


def test_labels_do_not_overlap():
  rng = np.random.default_rng(1)
  for count in (1, 2, 5, 12):
    wanted = list(rng.uniform(0, 260, count) if count < 12 else np.full(count, 130.0))
    found = charts.spread(wanted, 14, 0, 260)
    gaps = np.diff(sorted(found))
    assert min(found) >= -1e-6 and max(found) <= 260 + 1e-6 and (count == 1 or gaps.min() > 13.9)
    assert np.argsort(found, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
  assert charts.spread([10.0, 200.0], 14, 0, 260) == [10.0, 200.0]


def test_a_chart_places_points_by_the_log_of_their_cost():
  marks = [charts.Mark(cost, value, 1.0, "") for cost, value in ((10, 0.0), (100, 50.0), (1000, 100.0))]
  look = styles.styles(["dms"], "vanilla")["dms"]
  series = charts.Series("dms", look, marks, [(mark.cost, mark.value) for mark in marks])
  drawn = charts.tradeoff([series], x="reads", y="accuracy, %", show=styles.short, chance=25.0, percent=True)
  x, y = ([point[axis] for point in drawn["series"][0]["points"]] for axis in ("x", "y"))
  assert x[1] == pytest.approx((x[0] + x[2]) / 2) and drawn["left"] <= x[0] < x[2] <= drawn["right"]
  assert y[1] == pytest.approx((y[0] + y[2]) / 2) and drawn["top"] <= y[2] < y[0] <= drawn["bottom"]
  up, down = drawn["series"][0]["points"][0]["error"]
  assert up < y[0] < down and drawn["chance"][0] == pytest.approx(y[0] + (y[2] - y[0]) / 4)
  one = charts.tradeoff([dataclasses.replace(series, marks=marks[:1], frontier=[(10, 0.0)])], x="", y="", show=str)
  assert [text for _, text in drawn["up"]] == ["0", "20", "40", "60", "80", "100"]
  assert math.isfinite(one["series"][0]["points"][0]["x"])
  top = dataclasses.replace(series, marks=[charts.Mark(10, 100.0, 0.0, "")], frontier=[(10, 100.0)])
  shown = charts.tradeoff([top], x="", y="", show=str, percent=True)["up"]
  assert [text for _, text in shown] == ["95", "96", "97", "98", "99", "100"]


# Results of runs ------------------------------------------------------------------------------------------------------


def test_each_setting_is_a_point_with_paired_differences(tmp_path):
  found = results.collect([runs.load(write(tmp_path / "a", made_up()))])
  assert found.baseline == "vanilla" and found.methods == ["vanilla", "dms", "h2o"]
  needle, mmlu, written = found.panels
  assert (needle.metric, mmlu.metric, needle.name) == ("score", "acc", "needle, T 512")
  assert (needle.axes(), mmlu.axes()) == (["reads", "peak"], ["held"])
  by_name = {str(point.setting): point for point in needle.points}
  assert list(by_name)[:2] == ["vanilla, L\u00a064", "dms, CR\u00a04, L\u00a064"]
  entry = by_name["dms, CR\u00a08, L\u00a064"].entries["score"]
  assert (entry.method, entry.mean, entry.difference, entry.samples) == ("dms", 50.0, -25.0, 4)
  assert entry.difference_se == pytest.approx(np.std([0, 0, -100, 0], ddof=1) / 2)
  assert by_name["h2o, CR\u00a04, L\u00a064"].costs == {"reads": 1500.0, "peak": 150.0}
  assert [(p.setting.chains, p.metric, p.main.mean, p.costs["reads"]) for p in written.points] == [
    (1, "accuracy", 37.5, 6000.0), (4, "majority@4", 50.0, 24000.0),
  ]  # fmt: skip
  two = results.collect([runs.load(write(tmp_path / "b", made_up(), {"chains": [1, 2, 4]}))]).panels[2]
  assert [point.setting.chains for point in two.points] == [1, 2, 4]
  assert mmlu.points[1].costs == {"held": 150.0}


def test_a_baseline_of_equal_budget_is_preferred(tmp_path):
  found = results.collect([runs.load(write(tmp_path / "a", made_up()))], baseline="h2o")
  points = {str(point.setting): point.entries["score"] for point in found.panels[0].points}
  assert (
    points["dms, CR\u00a08, L\u00a064"].difference == 25.0 and points["dms, CR\u00a04, L\u00a064"].difference == 25.0
  )
  assert points["vanilla, L\u00a064"].difference is None  # it has no budget, and h2o has two


def test_the_metric_of_several_chains():
  metrics = ["accuracy", "pass@4", "majority@4"]
  assert results.main_metric(metrics) == "majority@4" and results.main_metric(metrics, best_of_all=True) == "pass@4"
  assert results.main_metric(["answer_loglik", "acc", "acc_norm"]) == "acc_norm" and results.main_metric(["x"]) == "x"


def test_margins_compare_frontiers(tmp_path):
  cheap = [record("dms", i, 100.0 * (i < n), reads=100.0 * n, max_tokens=n) for n in (1, 2, 3) for i in range(4)]
  dear = [record("vanilla", i, 100.0 * (i < n), reads=150.0 * n, max_tokens=n) for n in (1, 2, 3) for i in range(4)]
  (panel,) = results.collect([runs.load(write(tmp_path / "a", cheap + dear))]).panels
  # Over 150 .. 300: 25 x / 100 against 25 x / 150, so the gap is x / 12, its mean 225 / 12.
  assert panel.margin("reads", "dms", "vanilla") == pytest.approx(225 / 12)


def test_runs_are_joined(tmp_path):
  """What both hold is taken once; a method with another checkpoint gets its retrofit's name."""
  one = [record("vanilla", 0, 100.0), record("dms", 0, 100.0, 4.0, settings="p-r4")]
  two = [record("vanilla", 0, 100.0), record("dms", 0, 0.0, 4.0, settings="p-r8")]
  a, b = (
    runs.load(write(tmp_path / name, own, {"retrofit": [f"retrofits/cr{cr}"]}))
    for name, own, cr in (("a", one, 4), ("b", two, 8))
  )
  found = results.collect([a, b])
  assert found.methods == ["vanilla", "dms (cr4)", "dms (cr8)"]
  assert [point.entries["score"].mean for point in found.panels[0].points] == [100.0, 100.0, 0.0]
  same = dataclasses.replace(b, config={**b.config, "retrofit": a.config["retrofit"]})
  assert results.collect([a, same]).methods == ["vanilla", "dms (a)", "dms (b)"]
  other = dataclasses.replace(b, config={"checkpoint": "big"})
  assert [panel.model for panel in results.collect([a, other]).panels] == ["tiny", "big"]


def test_texts_come_from_the_summary(tmp_path):
  folder = write(tmp_path / "a", made_up())
  rows = [
    {"method": m, "task": "text", "length": 64, "metric": "kl", "samples": 2, "mean": 0.1} for m in ("vanilla", "dms")
  ]
  rows.append({**rows[0], "task": "needle"})  # has records
  (folder / runs.SUMMARY).write_text(json.dumps({"summary": rows}))
  found = results.collect([runs.load(folder)])
  assert [(panel.model, panel.name, len(panel.points)) for panel in found.texts] == [("tiny", "text, T 64", 2)]
  assert '<td class="n">0.1000</td>' in page.render(found, TASKS)


@pytest.mark.parametrize("recorded", [True, False])
def test_differences_on_a_text_are_from_the_baseline_that_is_asked_for(tmp_path, recorded):
  """From the chunks, paired; from a summary alone only as far as its means tell."""
  nll = {"vanilla": [1.0, 2.0, 3.0], "dms": [1.1, 2.1, 3.4], "h2o": [1.2, 2.5, 3.2]}
  kl = {"vanilla": [0.0] * 3, "dms": [0.1, 0.2, 0.6], "h2o": [0.3, 0.3, 0.3]}
  made = [
    each
    for name, cr in (("vanilla", None), ("dms", 4.0), ("h2o", 4.0))
    for each in chunks(name, cr, nll[name], kl[name])
  ]
  folder = write(tmp_path / "a", made_up() if recorded else [], {"text": "data/wiki.raw"})
  if recorded:
    records.append(folder / runs.TEXTS, made)
  (folder / runs.SUMMARY).write_text(json.dumps(program.to_plain({"summary": summarise(made, "vanilla")})))
  for baseline in ("vanilla", "h2o"):
    found = results.collect([runs.load(folder)], baseline)
    (panel,) = found.texts
    assert panel.name == "wiki.raw, T 64"
    points = {point.setting.method: point.entries for point in panel.points}
    own, base = (np.array(nll[name]) for name in ("dms", baseline))
    entry, divergence = points["dms"]["perplexity"], points["dms"]["kl"]
    assert entry.difference == pytest.approx(np.exp(own.mean()) - np.exp(base.mean()))
    assert divergence.difference == pytest.approx(np.mean(kl["dms"]) - np.mean(kl[baseline]))
    assert points[baseline]["perplexity"].difference is None
    if recorded or baseline == "vanilla":
      spread = own * np.exp(own.mean()) - base * np.exp(base.mean())  # to first order
      assert entry.difference_se == pytest.approx(spread.std(ddof=1) / math.sqrt(3))
      spread = np.subtract(kl["dms"], kl[baseline])
      assert divergence.difference_se == pytest.approx(spread.std(ddof=1) / math.sqrt(3))
    else:
      assert entry.difference_se is divergence.difference_se is None
    text = page.render(found, TASKS)
    Outline(text)
    assert f"Differences are from {baseline}, paired chunk by chunk" in text and "<h3>wiki.raw, T 64</h3>" in text
    section = text.partition('<h2 id="text">')[2].partition("</section>")[0]
    assert section.count(">difference</th>") == (1 if baseline == "vanilla" else 2)


def test_divergence_on_a_text_is_drawn_with_the_lowest_as_best(tmp_path):
  """A frontier of the KL falls with the cost; the original's KL of 0 has no place on a log axis."""
  made = [dataclasses.replace(each, reads=100.0) for each in chunks("vanilla", None, [1.0, 2.0], [0.0, 0.0])]
  for cr, kl, reads in ((8.0, 0.4, 20.0), (4.0, 0.5, 30.0), (2.0, 0.1, 60.0)):
    made += [dataclasses.replace(each, reads=reads) for each in chunks("dms", cr, [1.1, 2.1], [kl, kl + 0.02])]
  folder = write(tmp_path / "a", made[:1], {"text": "wiki.raw"})
  records.append(folder / runs.TEXTS, made)
  (panel,) = (found := results.collect([runs.load(folder)])).texts
  shown = panel.divergence()
  assert shown.axes() == ["reads", "held"] and shown.axis_name("reads") == "KV reads a chunk"
  assert {point.setting.method for point in shown.points} == {"dms"}
  assert shown.frontier("reads", "dms") == [(20.0, pytest.approx(0.41)), (60.0, pytest.approx(0.11))]
  assert [cost for cost, _ in shown.frontier("held", "dms")] == [600 / 8, 600 / 2]
  drawn = page.tradeoff(shown, "reads", styles.styles(found.methods, found.baseline), None)
  assert drawn["y"] == "KL from the original, nats a token, log scale" and "dms down to 0.1100" in drawn["alt"]
  by_cost = sorted(drawn["series"][0]["points"], key=lambda point: point["x"])
  assert [point["best"] for point in by_cost] == [True, False, True]
  up = [point["y"] for point in by_cost]  # downwards on the page
  assert (up[2] - up[0]) / (up[1] - up[0]) == pytest.approx(math.log(0.11 / 0.41) / math.log(0.51 / 0.41))
  section = page.render(found, TASKS).partition('<h2 id="text">')[2].partition("</section>")[0]
  assert section.count('<svg class="chart') == 2


def test_texts_of_other_content_are_apart(tmp_path):
  one, two = chunks("vanilla", None, [1.0], [0.0]), chunks("vanilla", None, [2.0], [0.0], "u-c")
  folders = [write(tmp_path / name, [], {"text": f"{name}.txt"}) for name in ("a", "b")]
  for folder, made in zip(folders, (one, two), strict=True):
    records.append(folder / runs.TEXTS, made)
  found = results.collect([runs.load(folder) for folder in folders])
  assert [(panel.name, panel.points[0].main.mean) for panel in found.texts] == [
    ("a.txt, T 64", pytest.approx(math.e)), ("b.txt, T 64", pytest.approx(math.e**2)),
  ]  # fmt: skip
  assert found.methods == ["vanilla"] and "#scores" not in page.render(found, TASKS)


# Times and grades that are no numbers ---------------------------------------------------------------------------------


def test_scores_are_drawn_against_time(tmp_path):
  found = results.collect([runs.load(write(tmp_path / "a", timed(), {"width": 8}))])
  (panel,) = found.panels
  assert panel.axes() == ["reads", "peak", "seconds"]
  assert panel.pairs("seconds", "dms") == [(0.125, 25.0), (0.25, 50.0), (0.375, 75.0)]
  # Over 0.25 .. 0.375 seconds: 200 x against 100 x.
  assert panel.margin("seconds", "dms", "vanilla") == pytest.approx(100 * 0.3125)
  text = page.render(found, TASKS)
  assert (
    "chain-seconds a problem, log scale" in text and "at equal time" in text and "0.125 chain-seconds a problem" in text
  )
  assert results.time_remark(found.runs) == ""


def test_times_of_unlike_runs_are_told_apart(tmp_path):
  old = [dataclasses.replace(each, method="old", seconds=None) for each in timed() if each.method == "dms"]
  wide = [dataclasses.replace(each, method="wide") for each in timed()]
  given = ((timed(), 8), (old, 8), (wide, 64))
  found = results.collect(
    [runs.load(write(tmp_path / f"r{i}", own, {"width": width})) for i, (own, width) in enumerate(given)]
  )
  (panel,) = found.panels
  assert panel.pairs("seconds", "old") == [] and len(panel.pairs("reads", "old")) == 3
  assert panel.margin("seconds", "old", "vanilla") is None
  text = page.render(found, TASKS)
  assert "different --width, so their times differ too (r0: cpu, width 8; r1: cpu, width 8; r2: cpu, width 64)" in text
  assert "Some records of r1 have no times" in text
  Outline(text)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_grade_that_is_no_number_is_shown_and_the_rest_stands(tmp_path, wrong):
  made = timed()
  made[12] = dataclasses.replace(made[12], grades={"score": wrong})  # of dms, L 1
  text = chunks("vanilla", None, [1.0, 2.0], [0.0, 0.0]) + chunks("dms", 4.0, [1.0, wrong], [0.1, wrong])
  folder = write(tmp_path / "a", made)
  records.append(folder / runs.TEXTS, text)
  found = results.collect([runs.load(folder)])
  assert found.warnings == [
    "dms, CR 4 on needle: score is no finite number in 1 of 12 records",
    "dms, CR 4 on text: nll is no finite number in 1 of 2 records",
    "dms, CR 4 on text: kl is no finite number in 1 of 2 records",
  ]
  (panel,) = found.panels
  assert [value for _, value in panel.pairs("reads", "dms")] == [50.0, 75.0]
  assert panel.margin("seconds", "dms", "vanilla") == pytest.approx(100 * 0.3125)
  shown = page.render(found, TASKS)
  Outline(shown)
  assert shown.count('<td class="n">NaN</td>') > 3 and f"{found.warnings[0]}; {found.warnings[1]}" in shown
  assert "nan" not in re.sub(r"<title>.*?</title>", "", shown)


WRONG_ENTRY = {"method": "x", "task": "t", "length": 1, "metric": "m", "samples": 1}


def broken(folder: Path, name: str, content: str) -> Path:
  write(folder, made_up())
  (folder / name).write_text(content)
  return folder


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("config.json", '{"config": 1}', r"config\.json: 'config' must be a JSON object"),
    ("config.json", "{", r"config\.json: not valid JSON"), ("config.json", "[]", "expected a JSON object, found list"),
    ("summary.json", '{"summary": [{"method": "x"}]}', r"summary\.json: 'summary' holds a row that is no entry"),
    ("records.jsonl", "", "no results there: records.jsonl is missing or empty"),
    ("records.jsonl", '{"method": "x"}\n', "line 1: a record needs 'task'"),
    ("records.jsonl", '{"method": ', "its last line is unfinished"),
    ("traces.jsonl", "{}\n", "line 1: a record needs 'method'"),
    ("text.jsonl", "{}\n", "line 1: a record needs 'method'"),
    ("text.jsonl", '{"method": ', "its last line is unfinished"),
    ("summary.json", json.dumps({"summary": [{**WRONG_ENTRY, "mean": "x"}]}), "number 0: 'mean' is of another type"),
  ],
)  # fmt: skip
def test_a_folder_that_is_no_run_is_named(tmp_path, name, content, message):
  folder = broken(tmp_path / "a", name, content)
  before = {path: path.read_bytes() for path in folder.iterdir()}
  with pytest.raises(ValueError, match=message) as caught:
    runs.load(folder)
  assert str(caught.value).startswith(f"--runs={folder}") and "\n" not in str(caught.value)
  assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_compared_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    runs.load(tmp_path / "nothing")
  run = runs.load(write(tmp_path / "a", made_up()))
  with pytest.raises(ValueError, match="--baseline=tova: no run has this method; there are vanilla, dms, h2o"):
    results.collect([run], "tova")
  other = runs.load(write(tmp_path / "b", [record("tova", 0, 1.0, settings="q-c")]))
  with pytest.raises(ValueError, match="tiny on needle have different prompts"):
    results.collect([run, other])
