"""Hyper-scaling: margins and intervals against plain numpy, methods of a sweep, kills, the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil

import jax
import numpy as np
import pytest

from dms_jax import checkpoint, generate, policies
from dms_jax.tokenizer import byte_tokenizer
from experiments import hyperscale
from experiments.common import program
from experiments.hyperscaling import analysis, cells, page, published, tables, timing
from experiments.hyperscaling import methods as sweep_methods
from experiments.hyperscaling.cells import Cell, Sweep
from experiments.methods import pareto, records, run, summary, trace
from experiments.methods.records import Record
from experiments.reports.results import Setting
from experiments.tasks import TASKS
from experiments.tasks.base import Prompt, TasksConfig, WritingTask
from tests.helpers import save_checkpoints

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
  made = [record(p, c, 100.0 * (c == p), "ab"[c], chains=2, reads=10.0 + c) for p in (0, 1) for c in (0, 1)]
  made += [record(p, c, 50.5, None, "dms", 4.0, chains=2) for p in (0, 1) for c in (0, 1)]
  made += [record(0, c, 0.0, None, "tova", 2.0, chains=2) for c in (0, 1)]  # killed before the second problem
  found, remarks = cells.of_records([*made, record(0, 0, 0.0, None, grades={"answer_loglik": -1.0})])
  assert list(found) == [("echo", "vanilla", 1.0, 9), ("echo", "dms", 4.0, 9)]
  assert remarks == ["tova, CR 2, L 9 on echo is left out: 1 of 2 problems are complete"]
  dense = found["echo", "vanilla", 1.0, 9]
  assert dense.problems == (0, 1) and dense.content == "p" and dense.votes.tolist() == [[0, 1], [0, 1]]
  assert dense.reads.tolist() == [10.5, 10.5] and dense.held.tolist() == [10.0, 10.0]
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


# Families and intervals -----------------------------------------------------------------------------------------------


def synthetic(seed, methods=(("vanilla", 1.0, 1.0, 0.0), ("dms", 4.0, 0.5, 0.0)), problems=40, chains=4, task="echo"):
  """A sweep in which a method's chain costs `share` as much and is right with `more` more probability.

  At L tokens a chain is right with probability p of L, reads L^2 * share and holds L * share tokens.
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
      tuple(range(problems)), column(grades), votes, column(most * size), reads, held, held, "p"
    )
  return Sweep(None, found, {key: key[3] * 0.1 / key[2] for key in found}, {}, {})


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
        points.append((float(np.float32(w * cost)), round(score, 9)))
  return points


@pytest.mark.parametrize("vote", [False, True])
def test_margins_and_intervals_by_their_definitions(vote):
  """Every resample's margin against the scalar function on points that plain loops make."""
  sweeps, widths, count = [synthetic(0), synthetic(1)], (1, 2, 4), 100
  found, remarks = analysis.family(sweeps, "echo", widths, vote)
  alone = [[analysis.family([sweep], "echo", widths, vote)[0]] for sweep in sweeps]
  assert remarks == [] and found.seeds == 2 and found.scores.shape == (18, 40)
  assert found.settings[0] == Setting("vanilla", (), 1, 10) and found.achieved[0] == pytest.approx(1.0)
  made = {(m.task, m.axis, m.scale): m for m in analysis.margins([found], alone, count)}
  assert set(made) == set(itertools.product(("echo", ""), ("reads", "peak", "seconds"), ("linear", "log")))
  weights = analysis.resampled(40, count, 0)
  assert np.allclose(weights.sum(axis=1), 1) and np.allclose(weights[0], 1 / 40)
  assert (weights[1:] * 40 == np.round(weights[1:] * 40)).all()
  for (task, axis, scale), margin in made.items():
    pair = lambda which, row, axis=axis: [plain_points(which, m, widths, vote, row, axis) for m in ("dms", "vanilla")]
    edges = [np.array(plain_frontier(points)).T for points in pair(sweeps, weights[0])]
    low, high = max(edge[0][0] for edge in edges), min(edge[0][-1] for edge in edges)
    draws = []
    for row in weights[1:]:
      # Both frontiers at midpoints of the costs of the estimate, constant beyond their own ends.
      to, back = (np.log, np.exp) if scale == "log" else (np.asarray, np.asarray)
      at = back(to(low) + (to(high) - to(low)) * (np.arange(20_000) + 0.5) / 20_000)
      one, other = (np.interp(to(at), to(x), y) for x, y in (np.array(plain_frontier(p)).T for p in pair(sweeps, row)))
      draws.append(np.mean(one - other))
    # Costs are float32, whose last bit is 6e-8 of them; margins are below 100. Midpoints err by 1e-3 of a step.
    exact = lambda which, pair=pair, scale=scale: pareto.margin(*pair(which, weights[0]), scale == "log")
    assert margin.margin == pytest.approx(exact(sweeps), abs=1e-4)
    assert (margin.low, margin.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=5e-3)
    assert margin.costs == (None if not task else pytest.approx((low, high), rel=1e-6))
    assert margin.seeds == pytest.approx([exact([sweep]) for sweep in sweeps], abs=1e-4)
    assert margin.families == (() if task else ("echo",))


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
        tuple(range(problems)), grades, np.zeros((problems, 1), np.int16), flat(most), costs, costs, costs, "p"
      )
  one, _ = analysis.family([Sweep(None, found, {}, {}, {})], "a", (1,), False)
  # Frontiers: dense 0 at 10 to b at 30, DMS 0 at 5 to a at 15. On 10..15 DMS rises from a/2 to a, dense from 0 to b/4.
  a, b = (found["a", method, cr, 30].grades.mean() for method, cr in (("dms", 2.0), ("vanilla", 1.0)))
  margin = next(m for m in analysis.margins([one], [], 4000) if (m.task, m.axis, m.scale) == ("a", "reads", "linear"))
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
  every = analysis.margins(families, [], 200)
  made = {(m.task, m.method, m.over): m for m in every if (m.axis, m.scale) == ("reads", "log")}
  assert set(made) == {
    (task, *pair) for task in ("echo", "b", "") for pair in (("dms", "vanilla"), ("tova", "vanilla"), ("dms", "tova"))
  }  # fmt: skip
  assert made["b", "dms", "vanilla"].margin is None and made["", "dms", "vanilla"].families == ("echo",)
  assert made["", "dms", "vanilla"].margin == made["echo", "dms", "vanilla"].margin
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
  made = analysis.margins([found], [], 100)
  look = hyperscale.styles.styles(["vanilla", "dms"], "vanilla")
  text = tables.plain(tables.margins(made, "reads", "linear", look))
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


# Methods --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Letters(WritingTask):
  """A text is right if its first character comes before "a"; chains vote by it."""

  name = "letters"
  metrics = ("accuracy",)
  new_tokens = 9

  def prompts(self, config, tokenizer, length, max_positions):
    texts = [f"{i} {'abcdefgh' * (i + 1)}"[: 9 + 5 * i] for i in range(config.limit or 3)]
    return [Prompt(text, tokenizer.encode(text), ()) for text in texts]

  def answer(self, text):
    return text[:1] or None

  def grade(self, text, prompt):
    return {"accuracy": 100.0 * (text[:1] < "a")}


@dataclasses.dataclass(frozen=True)
class Verified(Letters):
  """The same, where the best of several chains counts."""

  name = "verified"
  best_of_all = True

  def answer(self, text):
    return None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def letters(*lengths, task=None, chains=(2,)):
  config = TasksConfig(limit=3, chains=chains, temperature=1.0)
  (job,) = run.prepare([task or Letters()], config, (), byte_tokenizer(), 4096, lengths)
  return job


def built(checkpoints, names, crs=(2.0,), retrofits=()):
  base, retrofit = map(str, checkpoints)
  original = checkpoint.load(base, dtype="float32")
  entries = [f"{cr:g}:{retrofit}" for cr in retrofits]
  return sweep_methods.build(names, base, original, entries, crs, "float32")


def test_the_methods_of_a_sweep(checkpoints):
  found = built(checkpoints, ("vanilla", "dms", "prompt_window", "quest"), (2.0, 8.0), (8.0, 4.0))
  assert [method.label for method in found] == [
    "vanilla", "dms, CR 4", "dms, CR 8", "prompt_window, CR 2", "prompt_window, CR 8", "quest, CR 2", "quest, CR 8",
  ]  # fmt: skip
  assert [method.given.follows_length for method in found] == [False] * 3 + [True] * 4
  assert found[1].checkpoint != found[2].checkpoint and found[1].model.dms is not None is found[0].model.dms
  assert sweep_methods.split(["8:a:b", "w64=8:d", "2.5:c"]) == [
    ("dms", 2.5, "c"), ("dms", 8.0, "a:b"), ("dms w64", 8.0, "d"),
  ]  # fmt: skip
  assert cells.order(["rkv", "dms w64", "vase", "dms", "keydiff"], sweep_methods.DEFAULT) == [
    "dms", "dms w64", "rkv", "keydiff", "vase",
  ]  # fmt: skip
  assert sweep_methods.styled(["vanilla", "dms", "tova", "h2o", "quest"]) == ["vanilla", "tova", "h2o", "dms", "quest"]


def test_the_sinks_of_prompt_window_are_the_prompt_of_each_request(checkpoints):
  """Each prompt's chains are those of StreamingLLM with as many sinks, which holds (prompt + L) / CR on average."""
  (_, method) = built(checkpoints, ("vanilla", "prompt_window"), (1.5,))
  job = letters(60)
  lengths = [len(prompt.tokens) for prompt in job.asked]
  (group,), remark = method.fitted(job, 60)
  held = [length + group.policy.window + 1 for length in lengths]
  assert remark == "" and group.numbers == {"sinks": lengths} and len(set(lengths)) == 3
  assert np.mean(held) == pytest.approx(np.mean([math.ceil((length + 60) / 1.5) for length in lengths]), abs=0.5)
  (small,), remark = dataclasses.replace(method, given=dataclasses.replace(method.given, cr=8.0)).fitted(job, 60)
  assert small.policy.window == 15
  assert remark == "L 60: the budget leaves -4 tokens beside the prompt, the window holds 16"
  made = [record for part in run.run(job, [method], byte_tokenizer(), width=4) for record in part]
  assert len(made) == 6 and {each.budget["cr"] for each in made} == {1.5}
  fold = jax.random.fold_in
  keys = [fold(fold(fold(jax.random.key(job.seed), each.prompt), each.chain), 0) for each in made]  # 0: a single row
  sinks = np.array([lengths[each.prompt] for each in made])
  whole = generate(
    method.model, [job.asked[each.prompt].tokens for each in made], temperature=1.0, max_new_tokens=60, cache="masked",
    policy=policies.StreamingLLM(window=group.policy.window, sinks=sinks), key=jax.numpy.stack(keys),
    tokenizer=byte_tokenizer(),
  )  # fmt: skip
  for row, each in enumerate(made):
    assert each.text == whole.text[row]
    assert each.tokens / each.achieved_cr == pytest.approx(min(held[each.prompt], each.tokens))
  assert len({each.tokens for each in made if each.tokens > 40}) > 1  # texts long enough to fill their caches


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(methods=("dms",)), "--methods: vanilla is missing"),
    (dict(methods=("vanilla", "vanilla")), "--methods: vanilla is listed twice"),
    (dict(methods=("vanilla", "h3o")), "--methods: unknown method 'h3o'"),
    (dict(methods=("vanilla", "trimkv")), "--methods=trimkv: a sweep has no gates but those of dms"),
    (dict(methods=("vanilla", "dms")), "--methods, --retrofit: dms and its retrofits"),
    (dict(methods=("vanilla",), retrofit=("8:x",)), "--methods, --retrofit: dms and its retrofits"),
    (dict(methods=("vanilla", "dms"), retrofit=("x",)), "--retrofit=x: give CR:FOLDER"),
    (dict(methods=("vanilla", "dms"), retrofit=("=8:x",)), "--retrofit==8:x: give CR:FOLDER or NAME=CR:FOLDER"),
    (dict(methods=("vanilla", "dms"), retrofit=("8:x", "8:y")), "--retrofit: two retrofits of CR 8 for dms"),
    (dict(methods=("vanilla", "tova"), cr=()), "--cr=2,4,8 is needed: the budgets of tova"),
    (dict(methods=("vanilla",), cr=(1.0,)), "--cr, --compare_cr: 1 must be above 1"),
    (dict(methods=("vanilla",), max_tokens=(1,)), "--max_tokens=1 must be 2 or more tokens"),
    (dict(methods=("vanilla",), max_tokens=(4, 4)), "--max_tokens=4,4: a number twice"),
    (dict(methods=("vanilla",), timed=True), "--timed needs --kv_budget_gib"),
    (dict(methods=("vanilla",), kv_budget_gib=math.nan), "--kv_budget_gib=nan must be a number above 0"),
    (dict(methods=("vanilla",), resamples=3), "--resamples=3 must be 100 or more"),
    (dict(methods=("vanilla",), sets=("x",)), "give either --checkpoint=FOLDER"),
    (dict(checkpoint="", sets=("x",)), "--output=FOLDER is needed with --sets"),
    (dict(checkpoint="", sets=("x", "x"), output="y"), "--sets: x is listed twice"),
  ],
)
def test_what_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    hyperscale.Config(**{"checkpoint": "c", **settings})


def test_tasks_that_cannot_be_swept():
  for names, message in (([], "--tasks=NAME,NAME is needed"), (["needle"], "--tasks=needle: a sweep needs tasks whose"),
                         (["mmlu"], "--tasks=mmlu: a sweep needs tasks whose")):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      hyperscale.check_tasks([TASKS[name]() if name != "mmlu" else TASKS[name]("x") for name in names])


# The program ----------------------------------------------------------------------------------------------------------


def test_a_width_that_does_not_fit_is_halved(checkpoints):
  """Down to the chains of one prompt; other errors pass."""
  (method,) = built(checkpoints, ("vanilla",))
  widths = []

  def begin(width, memory):
    widths.append(width)
    if width == 2 and memory > 10_000:
      return iter([["a"], ["b"]])
    return run.run(letters(9), [method], byte_tokenizer(), width=width, memory=memory)

  # 40,000 bytes: the empty rows alone take more, at least one page of each head each.
  assert [*timing.narrowing(lambda width: begin(width, 40_000), 16, 2)] == [["a"], ["b"]] and widths == [16, 8, 4, 2]
  with pytest.raises(ValueError, match="--kv_budget_gib, with --width=2"):
    list(timing.narrowing(lambda width: begin(width, 100), 8, 2))
  with pytest.raises(ValueError, match="other"):
    list(timing.narrowing(lambda width: (_ for _ in ()).throw(ValueError("other")), 8, 2))


def test_a_sweep_from_flags_to_page(checkpoints, tmp_path, monkeypatch, capfd):
  """Killed in the middle of a line again and again, it ends with the records and figures of an unbroken run."""
  base, retrofit = map(str, checkpoints)
  config = hyperscale.Config(
    checkpoint=base, retrofit=(f"8:{retrofit}",), methods=("vanilla", "dms", "prompt_window"), cr=(2.0,),
    max_tokens=(4, 9), width=4, dtype="float32", resamples=100, traces=1, kv_budget_gib=0.01, timed=True,
    output=str(tmp_path / "whole"),
  )  # fmt: skip
  chosen = TasksConfig(("letters", "verified"), limit=3, chains=(1, 2), temperature=1.0)
  settings = {hyperscale.Config: config, TasksConfig: chosen}
  finished = []
  for task in (Letters, Verified):
    monkeypatch.setitem(TASKS, task.name, task)
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls] if cls in settings else cls())
  monkeypatch.setattr(program, "flag_values", lambda: {"checkpoint": base, "chains": [1, 2]})
  monkeypatch.setattr(program, "finish", finished.append)
  hyperscale.main()
  shown = capfd.readouterr()
  assert "3 methods and CRs x 2 tasks: 72 records to make (0 are there)" in shown.err
  assert "12 cells to time in 0.01 GiB" in shown.err and "letters, 3 problems" in shown.out
  assert finished[-1]["records_made"] == 72
  assert {m.axis for m in finished[-1]["margins"]} <= {"reads", "peak", "seconds"}

  settings[hyperscale.Config] = dataclasses.replace(config, output=str(tmp_path / "killed"))
  append, calls = records.append, itertools.count()

  def dying(path, found):
    append(path, found)
    if next(calls) % 2:
      path.write_bytes(path.read_bytes()[:-9])  # within the last line
      raise KeyboardInterrupt

  monkeypatch.setattr(records, "append", dying)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      hyperscale.main()
  monkeypatch.setattr(records, "append", append)
  hyperscale.main()
  one, other = ({r.key: r for r in records.read(tmp_path / name / cells.RECORDS)} for name in ("whole", "killed"))
  assert one == other and len(one) == 72
  kept = [r for r in one.values() if r.text is not None]
  assert {(r.prompt, r.chain, r.max_tokens) for r in kept} == {(0, 0, 9)} and len(kept) == 6
  whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
  for name in ("points", "margins"):
    untimed = lambda found, name=name: [
      {k: v for k, v in each.items() if k != "seconds"} for each in found[name] if each.get("axis") != "seconds"
    ]
    assert untimed(whole) == untimed(killed)
  assert len(whole["points"]) == 2 * 3 * 2 * 2 and all(point["seconds"] > 0 for point in whole["points"])
  traced = [trace.read("sets", tmp_path / name / trace.FILE) for name in ("whole", "killed")]
  assert {r.key for r in page.with_texts(tmp_path / "whole" / cells.RECORDS)} == {r.key for r in kept}
  assert traced[0] == traced[1] and {each.method for each in traced[0]} == {"vanilla", "dms"}  # CR 2 is not compared

  # The cells alone, as they are kept where records are too large, and a second model seed beside them.
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for file in (cells.CELLS, cells.TIMES, "config.json", "traces.jsonl"):
      shutil.copy(tmp_path / "whole" / file, tmp_path / name / file)
  settings[hyperscale.Config] = hyperscale.Config(
    sets=(str(tmp_path / "a"), str(tmp_path / "b")), resamples=100, output=str(tmp_path / "both"), title="Both <seeds>"
  )
  hyperscale.main()
  both = json.loads((tmp_path / "both" / "summary.json").read_text())
  assert [{**p, "standard_error": None, "difference_se": None} for p in both["points"]] == [
    pytest.approx({**p, "standard_error": None, "difference_se": None}) for p in whole["points"]
  ]
  assert all(len(m["seeds"]) == 2 for m in both["margins"]) and len(both["seeds"]) == 2
  html = (tmp_path / "both" / "index.html").read_text()
  parts = ('id="margins"', 'id="frontiers"', 'id="equal"', "AIME24", "right if any of W", "Written")
  for part in ("Both &lt;seeds&gt;", *parts):
    assert part in html, part
  assert "http" not in html.replace("http://www.w3.org", "") and html.count("<svg") > 6
  for name in ("margins-linear.png", "frontiers-letters.png"):
    assert (tmp_path / "both" / name).read_bytes()[:4] == b"\x89PNG"

  settings[hyperscale.Config] = dataclasses.replace(config, dtype="bfloat16")
  with pytest.raises(ValueError, match="holds records of vanilla on letters made with other settings"):
    hyperscale.main()
  settings[hyperscale.Config] = config
  settings[TasksConfig] = dataclasses.replace(settings[TasksConfig], chains=(1, 3))
  with pytest.raises(ValueError, match="holds records of 2 chains at seed 42"):
    hyperscale.main()
