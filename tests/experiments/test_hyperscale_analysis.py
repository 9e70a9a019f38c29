"""The analysis of a sweep: margins and intervals against plain numpy; cells and tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from experiments import hyperscale
from experiments.common import program
from experiments.hyperscaling import analysis, cells, page, published, tables
from experiments.hyperscaling.cells import Cell, Sweep
from experiments.methods import pareto, summary
from experiments.methods.records import Record
from experiments.reports import styles
from experiments.reports.results import Setting
from experiments.tasks.base import TasksConfig

# Frontiers and margins, against plain definitions ---------------------------------------------------------------------


def plain_frontier(points):
  """Points that no other point matches or beats at no more cost; of equal points one."""
  found = sorted(set(points))
  beaten = lambda c, v: any((c2 < c and v2 >= v) or (c2 == c and v2 > v) for c2, v2 in found)
  return [(c, v) for c, v in found if not beaten(c, v)]


def plain_margin(a, b, log):
  """The mean gap over 200,000 midpoints of the common interval; None without one."""
  scale = np.log if log else np.asarray
  (xa, ya), (xb, yb) = (np.array(plain_frontier(points)).T for points in (a, b))
  low, high = scale(max(xa[0], xb[0])), scale(min(xa[-1], xb[-1]))
  if low >= high:
    return None
  at = low + (high - low) * (np.arange(200_000) + 0.5) / 200_000
  return float(np.mean(np.interp(at, scale(xa), ya) - np.interp(at, scale(xb), yb)))


def margins(a, b, log=False):
  return pareto.margins(a, b, *pareto.common(a, b), log)


def test_many_frontiers_by_hand():
  costs = np.array([[1.0, 3.0, 2.0, 4.0, 5.0, 1.0], [2.0, 1.0, 3.0, 4.0, 5.0, 6.0], [7.0, 7.0, 7.0, 7.0, 7.0, 7.0]])
  values = np.array(
    [[10.0, 30.0, 5.0, 30.0, 40.0, 8.0], [1.0, 9.0, 9.0, 8.0, 2.0, 3.0], [1.0, 2.0, 3.0, 2.0, 1.0, 0.0]]
  )
  found = pareto.frontiers(costs, values)
  assert found.counts.tolist() == [3, 1, 1]
  assert found.costs.tolist() == [[1, 3, 5], [1, math.inf, math.inf], [7, math.inf, math.inf]]
  assert found.values.tolist() == [[10, 30, 40], [9, 9, 9], [3, 3, 3]]
  assert found.at(np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, [7.0] * 5])).tolist() == [
    [10, 20, 30, 35, 40], [9] * 5, [3] * 5,
  ]  # fmt: skip
  flat = pareto.frontiers(np.array([[2.0, 6.0]] * 3), np.array([[10.0, 50.0]] * 3))  # on 2..5: 10 to 40
  assert margins(found, flat)[0] == pytest.approx(((10 + 10) / 2 * 1 + (10 + 0) / 2 * 2) / 3)
  assert np.isnan(margins(found, flat)[1:]).all()
  # Over 0..7: 10 before its first point, 40 after its last; the other is 10 up to 2, and 50 from 6.
  own, steps = (10 + 2 * 20 + 2 * 35 + 2 * 40) / 7, (2 * 10 + 4 * 30 + 50) / 7
  assert pareto.margins(found, flat, 0.0, 7.0)[0] == pytest.approx(own - steps)
  one, other = (pareto.frontiers(np.array([[1.0, 4.0]]), np.array([[0.0, top]])) for top in (2.0, 1.0))
  assert margins(one, other, log=True)[0] == pytest.approx(0.5)
  with pytest.raises(ValueError, match="costs above 0"):
    margins(pareto.frontiers(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])), one, log=True)


@pytest.mark.parametrize("log", [False, True])
def test_many_margins_are_those_of_each_row(log):
  """Against the mean over midpoints (error below 1e-5) and the exact integral of one pair (equal but for rounding)."""
  rng = np.random.default_rng(3)
  # Rounded, so that costs and values are equal now and then.
  draw = lambda count: (np.round(10 ** rng.uniform(0, 1.5, (12, count)), 1), np.round(rng.random((12, count)), 1))
  (ca, va), (cb, vb) = draw(9), draw(5)
  found = margins(pareto.frontiers(ca, va), pareto.frontiers(cb, vb), log)
  for row, value in enumerate(found):
    a, b = ([*zip(c[row].tolist(), v[row].tolist(), strict=True)] for c, v in ((ca, va), (cb, vb)))
    plain, exact = plain_margin(a, b, log), pareto.margin(a, b, log)
    assert (exact is None) == np.isnan(value) == (plain is None)
    if exact is not None:
      assert value == pytest.approx(exact, abs=1e-12) and value == pytest.approx(plain, abs=1e-5)


# Cells ----------------------------------------------------------------------------------------------------------------


def record(prompt, chain, grade, answer, method="vanilla", cr=None, most=9, chains=3, task="echo", **changes):
  made = Record(
    method, task, None, {} if cr is None else {"cr": cr}, chains, most, 0, prompt, chain, f"p-{method}{cr}", 20, 10.0,
    5.0, 2.0, {"accuracy": grade}, None, answer,
  )  # fmt: skip
  return dataclasses.replace(made, **changes)


def test_scores_over_subsets_are_those_of_the_summary():
  rng = np.random.default_rng(0)
  grades, names = rng.integers(0, 2, (7, 5)) * 100.0, rng.integers(-1, 3, (7, 5))
  answer = lambda code: None if code < 0 else "xyz"[code]
  found, _ = cells.of_records(
    record(p, c, grades[p, c], answer(names[p, c]), chains=5) for p, c in itertools.product(range(7), range(5))
  )
  (cell,) = found.values()
  for width in range(1, 6):
    subsets = [list(each) for each in itertools.combinations(range(5), width)]
    for p in range(7):
      best = np.mean([max(grades[p, each]) for each in subsets])
      voted = []
      for each in subsets:
        given = [answer(names[p, i]) for i in each]
        counts = {name: given.count(name) for name in given if name is not None}
        top = [name for name in counts if counts[name] == max(counts.values())]
        voted.append(grades[p, each[given.index(top[0])]] if top else 0.0)
      assert cell.scores(width, vote=False)[p] == pytest.approx(best)
      assert cell.scores(width, vote=True)[p] == pytest.approx(np.mean(voted) if width > 1 else grades[p].mean())
      own = [answer(code) for code in names[p]]
      assert cell.scores(width, vote=False)[p] == pytest.approx(summary.best_of(grades[p], width))
      if width > 1:
        assert cell.scores(width, vote=True)[p] == pytest.approx(summary.majority(grades[p], own, width))
  with pytest.raises(ValueError, match="--chains=6: the records have 5 chains"):
    cell.scores(6, vote=True)


def test_cells_of_records(tmp_path):
  made = [record(p, c, 100.0 * (c == p), "ab"[c], chains=2, reads=10.0 + c, shared=3.0) for p in (0, 1) for c in (0, 1)]
  made += [record(p, c, 50.5, None, "dms", 4.0, chains=2) for p in (0, 1) for c in (0, 1)]
  made += [record(0, c, 0.0, None, "tova", 2.0, chains=2) for c in (0, 1)]  # killed before the second problem
  found, remarks = cells.of_records([*made, record(0, 0, 0.0, None, grades={"answer_loglik": -1.0})])
  assert list(found) == [("echo", "vanilla", 1.0, 9), ("echo", "dms", 4.0, 9)]
  assert remarks == ["tova, CR 2, L 9 on echo is left out: 1 of 2 problems are complete"]
  dense = found["echo", "vanilla", 1.0, 9]
  assert dense.problems == (0, 1) and dense.content == "p" and dense.votes.tolist() == [[0, 1], [0, 1]]
  assert dense.reads.tolist() == [10.5, 10.5] and dense.held.tolist() == [10.0, 10.0]
  assert dense.shared.tolist() == [3.0, 3.0] and found["echo", "dms", 4.0, 9].shared.tolist() == [0.0, 0.0]
  cells.save(tmp_path / cells.CELLS, found)
  again = cells.load(tmp_path / cells.CELLS, "sets")
  for key, cell in found.items():
    for field in dataclasses.fields(Cell):
      one, other = getattr(cell, field.name), getattr(again[key], field.name)
      assert np.array_equal(one, other) and type(one) is type(other)
  (tmp_path / cells.CELLS).write_bytes(b"PK no")
  with pytest.raises(ValueError, match=r"--sets=\S+cells.npz: not cells of a sweep, or damaged"):
    cells.load(tmp_path / cells.CELLS, "sets")
  with pytest.raises(ValueError, match="different --chains, --seed, prompts or checkpoints"):
    cells.of_records([*made, record(2, 0, 0.0, None, chains=1)])


def save_part(folder, found):
  folder.mkdir(parents=True)
  cells.save(folder / cells.CELLS, cells.of_records(found)[0])


def test_an_analysis_of_some_tasks_and_chains(tmp_path, monkeypatch):
  """Of records of two chains; tasks and chains that they have not are refused."""
  save_part(tmp_path / "s", [record(p, c, 100.0 * (c == p), "ab"[c], chains=2) for p in (0, 1) for c in (0, 1)])
  config = hyperscale.Config(sets=(str(tmp_path / "s"),), output=str(tmp_path / "out"), resamples=100)
  settings = {hyperscale.Config: config}
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls] if cls in settings else cls())
  monkeypatch.setattr(program, "flag_values", lambda **_: {})
  for chosen, message in (
    (dict(chains=(3, 4)), "--chains=3,4: the records have 2 chains of a problem"),
    (dict(tasks=("programs",)), r"--tasks: \S+/s has no 'programs'; there are echo"),
  ):
    settings[TasksConfig] = TasksConfig(temperature=1.0, **chosen)
    with pytest.raises(ValueError, match=message):
      hyperscale.main()


def test_a_sweep_in_parts(tmp_path):
  right = lambda p, c, *rest, **more: record(p, c, 100.0 * (c == p), "ab"[c], *rest, chains=2, **more)
  every = [(p, c) for p in (0, 1) for c in (0, 1)]
  save_part(tmp_path / "s/dense", [right(*each) for each in every])
  save_part(tmp_path / "s/dms", [right(*each, *how) for each in every for how in ((), ("dms", 4.0))])
  save_part(tmp_path / "s/tova", [right(0, c, "tova", 2.0) for c in (0, 1)])  # not finished
  sweep, remarks = cells.read(tmp_path / "s")
  assert list(sweep.cells) == [("echo", "vanilla", 1.0, 9), ("echo", "dms", 4.0, 9)]
  assert remarks == ["tova, CR 2, L 9 on echo is left out: 1 of 2 problems are complete"]
  assert sweep.parts == tuple(tmp_path / "s" / name for name in ("dense", "dms", "tova"))
  assert list(cells.only(sweep, methods=["dms"]).cells) == [("echo", "dms", 4.0, 9)]
  with pytest.raises(ValueError, match=r"--methods: \S+ has no 'h2o'; there are vanilla, dms"):
    cells.only(sweep, methods=["dms", "h2o"])
  assert cells.only(sweep).cells == sweep.cells == cells.only(sweep, ["echo"]).cells
  with pytest.raises(ValueError, match=r"--tasks: \S+ has no 'other'; there are echo"):
    cells.only(sweep, ["other"], ["dms"])
  for part, model in (("dense", "a"), ("dms", "b")):
    (tmp_path / "s" / part / "config.json").write_text(json.dumps({"model": model}))
  with pytest.raises(
    ValueError, match="dense and dms are of different checkpoints or --dtype; model seeds are separate"
  ):
    cells.read(tmp_path / "s")
  (tmp_path / "s/dms/config.json").write_text(json.dumps({"model": "a"}))
  assert cells.read(tmp_path / "s")[0].model == "a"
  save_part(tmp_path / "s/other", [record(p, c, 0.0, None, chains=2) for p, c in every])
  with pytest.raises(ValueError, match=r"vanilla, CR 1, L 9 on echo is in another part too, with other grades"):
    cells.read(tmp_path / "s")


def test_records_with_texts_stay_without_the_others(tmp_path):
  kept = record(1, 0, 0.0, None, text="a b")
  lines = [json.dumps(dataclasses.asdict(each)) for each in (record(0, 0, 0.0, None), kept)]
  (tmp_path / cells.RECORDS).write_text("\n".join(lines) + "\n")
  cells.save_short(tmp_path, {})
  assert [each.prompt for each in page.with_texts(tmp_path)] == [1]
  (tmp_path / cells.RECORDS).unlink()
  assert page.with_texts(tmp_path) == [kept]


# Families and intervals -----------------------------------------------------------------------------------------------


def synthetic(seed, methods=(("vanilla", 1.0, 1.0, 0.0), ("dms", 4.0, 0.5, 0.0)), problems=40, chains=4, task="echo"):
  """A sweep in which a method's chain costs `share` as much and is right with `more` more probability.

  At L tokens a chain is right with probability p of L, reads L^2 * share and holds L * share tokens, 2 * share of them
  in common with the other chains.
  """
  rng = np.random.default_rng(seed)
  found = {}
  for (method, cr, share, more), (most, right) in itertools.product(methods, ((10, 0.2), (20, 0.35), (40, 0.6))):
    grades = 100.0 * (rng.random((problems, chains)) < right + more)
    size = rng.uniform(0.8, 1.2, problems)
    column = lambda value: np.asarray(value, np.float32)
    votes = np.where(grades > 0, 0, rng.integers(1, 4, grades.shape)).astype(np.int16)
    reads, held = column(most**2 * share * size), column(most * share * size)
    found[task, method, cr, most] = Cell(
      tuple(range(problems)),
      column(grades),
      votes,
      column(most * size),
      reads,
      held,
      held,
      column(size * 0 + 2 * share),
      "p",
    )
  return Sweep(None, found, {key: key[3] * 0.1 / key[2] for key in found}, {}, {}, 2.0)


def plain_points(sweeps, method, width, vote, weights, axis):
  """(cost, score) of a method's cells in one resample, by the definitions."""
  points = []
  for key in sweeps[0].cells:
    if key[1] == method:
      for w in width:
        score = np.mean([np.dot(weights, s.cells[key].scores(w, vote)) for s in sweeps]) / weights.sum()
        if axis == "seconds":
          cost = np.mean([s.times[key] for s in sweeps])
        else:
          cost = np.mean([np.dot(weights, getattr(s.cells[key], axis).astype(float)) for s in sweeps]) / weights.sum()
        once = float(sweeps[0].cells[key].shared[0]) * (w - 1) / w if axis == "peak" else 0  # held in common
        points.append((float(np.float32(w * (cost - once))), round(score, 9)))
  return points


def plain_ends(pair, ends):
  """The interval of costs of two methods' points."""
  if ends == "frontier":
    pair = [plain_frontier(points) for points in pair]
  return max(min(points)[0] for points in pair), min(max(points)[0] for points in pair)


def plain_mean(pair, low, high, log, count=20_000):
  """The mean gap of two frontiers at midpoints of low .. high, constant beyond their ends; NaN for no interval."""
  to, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
  if low >= high:
    return math.nan
  at = back(to(low) + (to(high) - to(low)) * (np.arange(count) + 0.5) / count)
  one, other = (np.interp(to(at), to(x), y) for x, y in (np.array(plain_frontier(points)).T for points in pair))
  return float(np.mean(one - other))


@pytest.mark.parametrize("vote", [False, True])
def test_margins_and_intervals_by_their_definitions(vote):
  """Every resample's margin, with its own ends, against midpoints over points that plain loops make."""
  sweeps, widths, count = [synthetic(0), synthetic(1)], (1, 2, 4), 40
  found, remarks = analysis.family(sweeps, "echo", widths, vote)
  assert remarks == [] and found.seeds == 2 and found.scores.shape == (18, 40)
  assert found.settings[0] == Setting("vanilla", (), 1, 10) and found.achieved[0] == pytest.approx(1.0)
  made = {(m.task, m.axis, m.scale, m.ends): m for m in analysis.margins([found], count)}
  axes = ("reads", "peak", "seconds")
  assert set(made) == set(itertools.product(("echo", ""), axes, ("linear", "log"), ("frontier", "measured")))
  weights = analysis.resampled(40, count, 0)
  assert np.allclose(weights.sum(axis=1), 1) and np.allclose(weights[0], 1 / 40)
  assert (weights[1:] * 40 == np.round(weights[1:] * 40)).all()
  for axis in axes:
    points = lambda which, row, axis=axis: [plain_points(which, m, widths, vote, row, axis) for m in ("dms", "vanilla")]
    own, by_seed = points(sweeps, weights[0]), [points([sweep], weights[0]) for sweep in sweeps]
    drawn = [points(sweeps, row) for row in weights[1:]]
    for task, scale, ends in itertools.product(("echo", ""), ("linear", "log"), ("frontier", "measured")):
      margin, log = made[task, axis, scale, ends], scale == "log"
      mean = lambda pair, log=log, ends=ends: plain_mean(pair, *plain_ends(pair, ends), log)
      # Costs are float32, whose last bit is 6e-8 of them; margins are below 100. Midpoints err by 1e-3 of a step.
      assert margin.margin == pytest.approx(mean(own), abs=5e-3)
      draws = [mean(pair) for pair in drawn]
      assert (margin.low, margin.high) == pytest.approx(tuple(np.nanpercentile(draws, [2.5, 97.5])), abs=5e-3)
      assert margin.resolved == 1 - np.isnan(draws).mean()
      assert margin.costs == (None if not task else pytest.approx(plain_ends(own, ends), rel=1e-6))
      assert margin.seeds == pytest.approx([mean(pair) for pair in by_seed], abs=5e-3)
      assert margin.families == (() if task else ("echo",)) and margin.without == ()
      if ends == "frontier":
        assert margin.margin == pytest.approx(pareto.margin(*own, log), abs=1e-4)


def saturated(rng, problems, rises=(0.3, 0.8, 0.8), costs=(1.0, 2.0, 8.0)):
  """A family in which both methods gain nothing from the costliest of three settings, the other at 0.6 of the cost."""
  settings = [Setting(name, (), 1, i) for name in ("vanilla", "dms") for i in range(3)]
  each = 100.0 * (rng.random((6, problems)) < np.array([*rises, *rises])[:, None])
  price = np.repeat(np.array([*costs, *(0.6 * c for c in costs)])[:, None], problems, axis=1)
  return analysis.Family("a", False, settings, each, {"reads": price}, np.ones(6))


def test_intervals_cover_the_margins_that_they_estimate():
  """Of 200 samples of problems about 190 have an interval that covers the margin of all problems: 176 to 199.

  Outside with probability 1e-5 (binomial, 0.95) over the measured costs. Where frontiers are saturated, the ends that
  both cover jump from sample to sample, and the bootstrap covers about 90 % (binomial, 0.9: above 160). With the ends
  of the estimate in all resamples it would cover 48 %.
  """
  whole = saturated(np.random.default_rng(0), 400_000)
  truth = {(m.scale, m.ends): m.margin for m in analysis.margins([whole], 0) if m.task}
  covered, rng = dict.fromkeys(truth, 0), np.random.default_rng(1)
  for _ in range(200):
    for margin in analysis.margins([saturated(rng, 150)], 200):
      if margin.task:
        covered[margin.scale, margin.ends] += margin.low <= truth[margin.scale, margin.ends] <= margin.high
  for scale in ("linear", "log"):
    assert 176 <= covered[scale, "measured"] <= 199 and 160 < covered[scale, "frontier"], covered


def test_a_known_margin_and_its_interval():
  """Right answers at half the cost of a straight frontier: the margin has a closed form; so has its standard error."""
  problems, chains = 400, 1
  rng = np.random.default_rng(5)
  found = {}
  flat = lambda value: np.full(problems, value, np.float32)
  for method, cr, share in (("vanilla", 1.0, 1.0), ("dms", 2.0, 0.5)):
    for most, right in ((10, 0.0), (30, 1.0)):
      grades = (100.0 * (rng.random((problems, chains)) < (0.5 if right else 0.0))).astype(np.float32)
      costs = flat(most * share)
      found["a", method, cr, most] = Cell(
        tuple(range(problems)), grades, np.zeros((problems, 1), np.int16), flat(most), costs, costs, costs, flat(0), "p"
      )
  one, _ = analysis.family([Sweep(None, found, {}, {}, {})], "a", (1,), False)
  # Frontiers: dense 0 at 10 to b at 30, DMS 0 at 5 to a at 15. On 10..15 DMS rises from a/2 to a, dense from 0 to b/4.
  a, b = (found["a", method, cr, 30].grades.mean() for method, cr in (("dms", 2.0), ("vanilla", 1.0)))
  about = ("a", "reads", "linear", "frontier")
  margin = next(m for m in analysis.margins([one], 4000) if (m.task, m.axis, m.scale, m.ends) == about)
  assert margin.margin == pytest.approx(0.75 * a - 0.125 * b, abs=1e-4)  # float32 costs
  deviation = float(np.std(
    0.75 * found["a", "dms", 2.0, 30].grades - 0.125 * found["a", "vanilla", 1.0, 30].grades
  )) / math.sqrt(problems)  # fmt: skip
  # 4,000 resamples estimate a percentile to about 3 % of the standard error; the normal law is off by less.
  assert margin.low == pytest.approx(margin.margin - 1.96 * deviation, abs=0.15 * deviation)
  assert margin.high == pytest.approx(margin.margin + 1.96 * deviation, abs=0.15 * deviation)


def test_families_without_a_common_interval_and_means_over_families():
  apart = synthetic(2, (("vanilla", 1.0, 100.0, 0.0), ("dms", 8.0, 0.01, 0.0), ("tova", 8.0, 0.02, 0.0)), task="b")
  one = synthetic(3, (("vanilla", 1.0, 1.0, 0.0), ("dms", 8.0, 0.25, 0.2), ("tova", 8.0, 0.5, 0.0)))
  both = Sweep(None, {**one.cells, **apart.cells}, {}, {}, {})
  families = [analysis.family([both], task, (1, 2), False)[0] for task in both.tasks]
  every = analysis.margins(families, 200)
  made = {(m.task, m.method, m.over): m for m in every if (m.axis, m.scale, m.ends) == ("reads", "log", "frontier")}
  assert set(made) == {
    (task, *pair) for task in ("echo", "b", "") for pair in (("dms", "vanilla"), ("tova", "vanilla"), ("dms", "tova"))
  }  # fmt: skip
  assert made["b", "dms", "vanilla"].margin is None and made["", "dms", "vanilla"].families == ("echo",)
  assert made["", "dms", "vanilla"].margin == made["echo", "dms", "vanilla"].margin
  assert made["", "dms", "vanilla"].without == ("b",) and made["", "dms", "tova"].without == ()
  look = styles.styles(["vanilla", "dms", "tova"], "vanilla")
  shown = tables.plain(tables.margins(every, "reads", "log", "frontier", look)).split("\n")
  (cells_of,) = [[cell.strip(" *") for cell in line.split("|")] for line in shown if "| dms over vanilla" in line]
  echo = made["echo", "dms", "vanilla"]
  rare = dataclasses.replace(echo, margin=2.0, low=1.0, high=3.0, resolved=0.83)
  assert tables.said(rare) == "+2.0 [+1.0, +3.0] (83%)" and not tables._clear(rare)
  assert tables._clear(dataclasses.replace(rare, resolved=0.97)) and tables.over_families(rare) == "none"
  assert cells_of[2:6] == [tables.said(echo), "1, not b", tables.signed(echo.margin), "NA"]
  over = [made[task, "dms", "tova"] for task in ("echo", "b", "")]
  assert over[2].margin == pytest.approx((over[0].margin + over[1].margin) / 2)
  # Families are resampled apart, so the interval of their mean is narrower than their mean interval.
  width = [m.high - m.low for m in over]
  assert 0.4 * (width[0] + width[1]) / 2 < width[2] < 0.95 * (width[0] + width[1]) / 2
  assert all(m.seeds == () for m in made.values())


def test_equal_l_and_w_and_tables(monkeypatch):
  sweep = synthetic(4, (("vanilla", 1.0, 1.0, 0.0), ("dms", 8.0, 0.2, 0.1)))
  found, _ = analysis.family([sweep], "echo", (1, 4), False)
  panel = analysis.panel(found, "tiny")
  points = {point.setting: point for point in panel.points}
  for most, width in itertools.product((10, 20, 40), (1, 4)):
    own, base = (sweep.cells["echo", *key, most].scores(width, False) for key in (("dms", 8.0), ("vanilla", 1.0)))
    entry = points[Setting("dms", (("cr", 8.0),), width, most)].main
    assert (entry.mean, entry.difference) == pytest.approx((own.mean(), (own - base).mean()))
    assert entry.standard_error == pytest.approx(own.std(ddof=1) / math.sqrt(40))
    assert entry.difference_se == pytest.approx((own - base).std(ddof=1) / math.sqrt(40))
  table = tables.equal(panel, "dms", 8.0)
  assert [row.name for row in table.rows] == ["L 10", "L 20", "L 40"] and table.columns[1:] == ["W 1", "W 4"]
  assert tables.equal(panel, "dms", 4.0) is None
  assert page.uncrowded(panel) is panel and len(panel.points) == 12
  monkeypatch.setattr(page, "CROWD", 5)
  for axis in ("reads", "peak"):
    shown = page.uncrowded(panel, [axis])
    assert [plain_frontier(shown.pairs(axis, name)) for name in ("vanilla", "dms")] == [
      sorted(shown.pairs(axis, name)) for name in ("vanilla", "dms")
    ] == [plain_frontier(panel.pairs(axis, name)) for name in ("vanilla", "dms")]  # fmt: skip
  made = analysis.margins([found], 100)
  look = styles.styles(["vanilla", "dms"], "vanilla")
  text = tables.plain(tables.margins(made, "reads", "linear", "frontier", look))
  assert "dms over vanilla" in text and text.startswith("| comparison") and "echo" in text
  paper = tables.plain(tables.beside(made, look))
  assert "+12.5" in paper and "peak tokens" in paper and paper.count("dms over vanilla") == 3
  assert [round(value, 1) for value in published.means("dms", "vanilla", "reads")] == [12.5, 2.3, 5.8, 8.3]
  assert published.means("dms", "quest", "reads")[2] is None and published.means("rkv", "vanilla", "reads") == []


def test_seeds_must_fit_together():
  one, other = synthetic(0), synthetic(1, problems=30)
  with pytest.raises(ValueError, match="the problems of echo differ between sweeps or methods"):
    analysis.family([one, other], "echo", (1,), False)
  fewer = dataclasses.replace(one, cells={k: c for k, c in one.cells.items() if k[3] != 40})
  found, remarks = analysis.family([one, fewer], "echo", (1,), False)
  assert remarks == ["echo: 2 cells are left out, as some seeds lack them"] and len(found.settings) == 4


def test_chains_that_cost_nothing_have_no_margin_on_a_log_axis():
  settings = [Setting(name, (), 1, i) for name in ("vanilla", "dms") for i in range(2)]
  scores = np.array([[0.0, 100.0], [100.0, 100.0]] * 2)
  found = analysis.Family("a", False, settings, scores, {"reads": np.array([[0.0, 0.0], [4.0, 4.0]] * 2)}, np.ones(4))
  made = {(m.scale, m.ends): m.margin for m in analysis.margins([found], 100) if m.task}
  assert made["linear", "measured"] == 0.0 and made["log", "measured"] is made["log", "frontier"] is None


def test_times_of_some_seeds_or_of_other_memory_are_left_out():
  """Without an error, and with a remark."""
  one, other = synthetic(0), synthetic(1)
  more = synthetic(1, (("vanilla", 1.0, 1.0, 0.0), ("dms", 4.0, 0.5, 0.0), ("tova", 4.0, 0.5, 0.0)))
  untimed = {key: seconds for key, seconds in more.times.items() if key[1] != "tova"}
  for sweeps, axes, why in (
    ([one, dataclasses.replace(more, times=untimed)], 3, ["echo: 3 cells are left out, as some seeds lack them"]),
    ([one, dataclasses.replace(other, times={}, gib=None)], 2, ["some cells lack them"]),
    ([one, dataclasses.replace(other, gib=4.0)], 2, ["different memory"]),
    ([dataclasses.replace(more, times=untimed)], 2, ["some cells lack them"]),
  ):
    found, remarks = analysis.family(sweeps, "echo", (1, 2), False)
    assert len(remarks) == len(why) and all(map(str.__contains__, remarks, why))
    made = analysis.margins([found], 100)
    assert len({m.axis for m in made}) == axes and all(len(m.seeds) == (len(sweeps) > 1) * 2 for m in made)


def test_times_are_of_one_memory(tmp_path):
  cells.save(tmp_path / cells.CELLS, synthetic(0).cells)
  line = lambda most, gib, seconds: json.dumps(
    {
      "task": "echo",
      "method": "vanilla",
      "cr": 1.0,
      "max_tokens": most,
      "gib": gib,
      "seconds": seconds,
      "full": most < 40,
    }
  )
  lines = [line(10, 2, 1.0), line(40, 2, 2.0), line(10, 4, 0.5), line(10, 2, 3.0)]
  for text, config, gib, times in (
    (lines, {"kv_budget_gib": 4.0}, 4.0, [0.5]), (lines, {}, 2.0, [3.0, 2.0]), (lines[:3], {}, 4.0, [0.5]),
    (lines, {"kv_budget_gib": 8.0}, 2.0, [3.0, 2.0]),
  ):  # fmt: skip
    (tmp_path / cells.TIMES).write_text("\n".join(text) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    sweep, remarks = cells.read(tmp_path)
    assert (sweep.gib, [*sweep.times.values()]) == (gib, times)
    assert len(remarks) == (len(times) == 2) and all("1 of 2 times are of all chains at once" in r for r in remarks)
