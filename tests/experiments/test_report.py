"""The report: margins, styles, charts, results of several runs, refusals, the page, the program."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.methods import pareto, records, trace
from experiments.methods.records import Record
from experiments.reports import charts, page, results, runs, styles
from experiments.tasks import TASKS

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
  series = charts.Series("dms", 1, "square", marks, [(mark.cost, mark.value) for mark in marks])
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


def record(method: str, prompt: int, score: float, cr: float | None = None, **changes) -> Record:
  base = Record(
    method, "needle", 512, {} if cr is None else {"cr": cr}, 1, 64, 42, prompt, 0, "p-c", 600, 6000 / (cr or 1),
    600 / (cr or 1), cr or 1.0, {"score": score}, text=f"<b>{method}</b> & {prompt}",
  )  # fmt: skip
  return dataclasses.replace(base, **changes)


def made_up() -> list[Record]:
  """Made-up records: two budgets of two methods beside the dense one, a task at chance, and two chains of a third."""
  found = [record("vanilla", i, 100.0 * (i < 3)) for i in range(4)]
  found += [record("dms", i, 100.0 * (i < 3 - (cr > 4)), cr) for cr in (4.0, 8.0) for i in range(4)]
  found += [record("h2o", i, 100.0 * (i < 2 - (cr > 4)), cr) for cr in (4.0, 8.0) for i in range(4)]
  likelihood = dict(task="mmlu", length=None, max_tokens=0, reads=None, peak=None, text=None)
  for i in range(8):
    for method, cr in (("vanilla", None), ("dms", 4.0)):
      found.append(record(method, i, 0, cr, grades={"acc": 100.0 * (i % 4 == 0), "answer_loglik": -1.5}, **likelihood))
  chains = dict(task="written", length=None, chains=4, max_tokens=32)
  for i in range(2):
    for chain in range(4):  # the first problem is solved by three chains of four, which agree, the second by none
      right = i == 0 and chain != 1
      graded = dict(grades={"accuracy": 100.0 * right}, answer="7" if right else None)
      found.append(record("vanilla", i, 0, chain=chain, **chains, **graded))
  return found


def write(folder: Path, found: list[Record], config: dict | None = None, traced: bool = False) -> Path:
  records.append(folder / runs.RECORDS, found)
  given = {"checkpoint": "checkpoints/tiny", **(config or {})}
  (folder / runs.CONFIG).write_text(json.dumps({"config": given, "environment": {"device": "cpu", "jax": "0.1"}}))
  if traced:
    for method, budget, share in (("vanilla", {}, 1.0), ("dms", {"cr": 4.0}, 0.25)):
      held = [1.0 if share == 1 else i % 4 / 4 for i in range(12)]
      about = (method, "needle", 512, budget, 1, 64, 42, 0, 0)
      one = trace.Trace(*about, 8, [f"<t{i}> " for i in range(12)], held, [[share, share**1.5], [share] * 2])
      trace.append(folder / trace.FILE, [one])
  return folder


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


# The page -------------------------------------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
  """Tags, their attributes and the text of a page; checks that tags are closed in order."""

  VOID = ("meta", "path", "link", "img", "br")

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict]] = []
    self.words: list[tuple[str, str]] = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and data.strip():
      self.words.append((self.open[-1], data.strip()))

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
  folder = write(tmp_path_factory.mktemp("runs") / "a", made_up(), traced=True)
  text = page.render(results.collect([runs.load(folder)]), TASKS)
  return text, Outline(text)


def test_the_page_stands_alone(shown):
  text, outline = shown
  assert not outline.all("script") and not outline.all("link") and "url(" not in text and "@import" not in text
  for _, attrs in outline.tags:
    assert "src" not in attrs and attrs.get("href", "#").startswith("#")
    assert not any(name.startswith("on") for name in attrs)
  ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
  assert len(ids) == len(set(ids))
  for _, attrs in outline.tags:
    assert attrs.get("aria-labelledby", ids[0]) in ids and attrs.get("href", f"#{ids[0]}")[1:] in ids


def test_the_page_is_accessible(shown):
  text, outline = shown
  assert outline.all("html")[0]["lang"] == "en" and len(outline.all("h1")) == 1 and len(outline.all("main")) == 1
  assert any(attrs.get("name") == "viewport" for attrs in outline.all("meta"))
  for picture in outline.all("svg"):
    assert picture.get("aria-hidden") == "true" or (picture["role"] == "img" and len(picture["aria-label"]) > 20)
  assert all("scope" in attrs for attrs in outline.all("th"))
  tables = outline.all("table")
  assert tables and all("aria-labelledby" in attrs for attrs in tables)
  assert all(attrs.get("tabindex") == "0" for attrs in outline.all("div") if "scroll" in attrs.get("class", ""))
  levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-4]", tag)]
  assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
  assert "prefers-color-scheme: dark" in text


def test_scores_come_first_and_units_stand_in_heads(shown):
  text, outline = shown
  sections = re.findall(r'<h2 id="(\w+)">', text)
  assert sections == ["scores", "differences", "tradeoffs", "retention", "chains", "runs"]
  heads = [word for tag, word in outline.words if tag == "th"]
  assert "needle, T 512: references found, %, n = 4" in heads and "peak tokens a problem" in heads
  cells = [word for tag, word in outline.words if tag in ("td", "strong")]
  assert {"75.0", "25.0", "\u221225.0", "4.00"} <= set(cells)
  assert not any("\u00b1" in cell for cell in cells)  # one quantity a cell


def test_a_task_at_chance_says_so(shown):
  _, outline = shown
  notes = [word for tag, word in outline.words if tag == "p" and "at chance" in word]
  assert notes and all(note.startswith("mmlu: vanilla at chance (25)") for note in notes)


def test_forgotten_tokens_are_greyed(shown):
  text, _ = shown
  assert '<span class="h0">&lt;t0&gt; </span>' in text and '<span class="h3">&lt;t1&gt; </span>' in text
  assert "<t0>" not in text and "A head holds 38% of them at the end; 25% are held by no head." in text
  assert page.level(0.0) == 0 and page.level(0.001) == 1 and page.level(1.0) == len(page.SHADES) - 1
  assert page.spans(["a", "b", "c"], [0.0, 0.0, 1.0]) == [(0, "ab"), (5, "c")]


def test_retention_is_a_map_of_heads(shown):
  _, outline = shown
  cells = outline.all("rect")
  assert [float(cell["fill-opacity"]) for cell in cells] == [0.25, 0.125, 0.25, 0.25]
  assert "dms, CR 4: 22% held" in [word for tag, word in outline.words if tag == "h3"]


def test_without_traces_texts_are_shown_as_they_are(tmp_path):
  text = page.render(results.collect([runs.load(write(tmp_path / "a", made_up()))]), TASKS, title="A & B")
  assert "&lt;b&gt;dms&lt;/b&gt; &amp; 0" in text and "<b>" not in text
  assert "<title>A &amp; B</title>" in text and "--traces=2" in text
  Outline(text)


def test_sweeps_have_a_table_of_their_own(tmp_path):
  more = [record("vanilla", i, 50.0, task="swept", max_tokens=most) for most in (8, 16) for i in range(4)]
  found = results.collect([runs.load(write(tmp_path / "a", made_up() + more))])
  tables = page.overview(found.panels, styles.styles(found.methods, found.baseline), "scores", found.baseline)
  assert [len(table.groups) - 1 for table in tables] == [2, 1, 1]
  assert [row.detail for row in tables[1].rows] == ["W\u00a01, L\u00a032", "W\u00a04, L\u00a032"]
  assert [row.detail for row in tables[2].rows] == ["W\u00a01, L\u00a08", "W\u00a01, L\u00a016"]
  Outline(page.render(found, TASKS))


# The program ----------------------------------------------------------------------------------------------------------


def test_the_program_writes_a_page_pictures_and_margins(tmp_path):
  write(tmp_path / "a", made_up(), traced=True)
  command = [sys.executable, "-m", "experiments.report", f"--output={tmp_path}/out"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  run = lambda *more: subprocess.run(
    [*command, *more], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
  )
  done = run(f"--runs={tmp_path}/a")
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  names = [Path(path).name for path in line["written"]]
  assert names[0] == "index.html" and {"tradeoff-tiny-needle-512.png", "retention.png"} <= set(names)
  assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in names)
  assert json.loads((tmp_path / "out/report.json").read_text())["margins"] == line["margins"]
  (tmp_path / "empty").mkdir()
  refused = run(f"--runs={tmp_path}/a,{tmp_path}/empty")
  assert refused.returncode == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
  assert f"error: --runs={tmp_path}/empty: no results there" in refused.stderr
