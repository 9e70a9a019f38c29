"""Records, their summary and the tables of it; figures come from one module."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from experiments.methods import records
from experiments.methods.records import Record
from experiments.methods.summary import Entry, curves, summarise, total_cost
from experiments.reports import figures_tasks, tables
from experiments.tasks import TASKS

ROOT = Path(__file__).parents[2]


def record(method: str = "original", prompt: int = 0, score: float = 100.0, **changes) -> Record:
  base = Record(
    method, "needle", 128, {}, 1, 128, 42, prompt, 0, "s", 20, 100.0, 20.0, 1.0, {"score": score}, text="so"
  )
  return dataclasses.replace(base, **changes)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_of_records_grows_and_is_read_back(tmp_path):
  path = tmp_path / "new" / "r.jsonl"
  assert records.read(path) == []
  first, second = record(), record("r", budget={"threshold": 0.5}, reads=None, peak=None, text=None, length=None)
  records.append(path, [first])
  records.append(path, [second])
  assert records.read(path) == [first, second] and len(path.read_text().splitlines()) == 2


def test_times_are_optional_and_no_part_of_the_outcome(tmp_path):
  """Files of earlier versions have no times; a chain written again has another."""
  path = tmp_path / "r.jsonl"
  old = {name: value for name, value in vars(record()).items() if name != "seconds"}
  path.write_text(json.dumps(old) + "\n" + json.dumps(vars(record(prompt=1, seconds=1.5))) + "\n")
  found = records.read(path)
  assert [each.seconds for each in found] == [None, 1.5] and found == [record(), record(prompt=1, seconds=9.0)]
  entries = [summarise(part, "original")[0] for part in (found[1:], found)]  # a mean over those that are known
  assert [entry.seconds for entry in entries] == [1.5, 1.5]


def test_a_full_disk_is_named():
  if Path("/dev/full").exists():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
      records.append(Path("/dev/full"), [record()])


def test_a_line_that_was_cut_short_is_removed(tmp_path):
  path = tmp_path / "r.jsonl"
  records.append(path, [record(prompt=0), record(prompt=1)])
  whole = path.read_bytes()
  for length in range(len(whole) // 2 + 2, len(whole)):
    path.write_bytes(whole[:length])
    assert [each.prompt for each in records.read(path)] == [0]
    records.append(path, [record(prompt=1)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("[]", "line 2: a record needs 'method'"),
    (json.dumps({"method": "x"}), "line 2: a record needs 'task'"),
    (json.dumps({k: v for k, v in vars(record(prompt=1)).items() if k != "length"}), "line 2: a record needs 'length'"),
    (json.dumps({k: v for k, v in vars(record(prompt=1)).items() if k != "seed"}), "line 2: a record needs 'seed'"),
    (json.dumps(vars(record(prompt=1, seconds=math.inf))), "line 2: 'seconds' must be a number of 0 to 1e+15, not inf"),
    (json.dumps({**vars(record(prompt=1)), "more": 1}), "line 2: a record has no field 'more'"),
    (json.dumps(vars(record())), "line 2: original on needle, prompt 0, is there already"),
    ("{", "line 2: not valid JSON"),
    ("[" * 100_000, "line 2: JSON nested too deep"),
    (json.dumps(vars(record(prompt=1, text="\ud800"))), "line 2: half of a surrogate pair"),
    (json.dumps(vars(record(prompt=1, score="1"))), """line 2: 'score' of 'grades' must be a number, not "1\""""),
    (json.dumps(vars(record(prompt=1, budget={"cr": None}))), "line 2: 'cr' of 'budget' must be a number, not null"),
    (json.dumps(vars(record(prompt=1, budget={"cr": [2]}))), "line 2: 'cr' of 'budget' must be a number, not [2]"),
    (json.dumps(vars(record(prompt=1, reads=math.nan))), "line 2: 'reads' must be a number of 0 to 1e+15, not nan"),
    (json.dumps(vars(record(prompt=1, shared=10**40))), "line 2: 'shared' must be a number of 0 to 1e+15"),
    (
      json.dumps(vars(record(prompt=1, achieved_cr=1e-300))),
      "line 2: 'achieved_cr' must be a number above 0, to 1e+15",
    ),
    (json.dumps(vars(record(prompt=1, achieved_cr=0))), "line 2: 'achieved_cr' must be a number above 0"),
  ],
)
def test_what_is_no_record_is_named(tmp_path, line, message):
  path = tmp_path / "r.jsonl"
  records.append(path, [record()])
  path.write_text(path.read_text() + line + "\n")
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    records.read(path)
  assert str(caught.value).startswith(f"--output={path}")


def test_a_grade_that_is_no_number_stays_one(tmp_path):
  records.append(tmp_path / "r.jsonl", [record(score=math.nan, text="\U0001f600")])
  (found,) = records.read(tmp_path / "r.jsonl")
  assert math.isnan(found.grades["score"]) and found.text == "\U0001f600"


def test_records_of_other_settings_are_refused(tmp_path):
  found = [record(), record("mine")]
  original, mine = (("original", (), "needle", 128), ("mine", (), "needle", 128))
  records.check_settings(tmp_path, found, {original: "s", ("mine", (("cr", 2.0),), "needle", 128): "t"})
  with pytest.raises(ValueError, match="records of mine on needle made with other settings"):
    records.check_settings(tmp_path, found, {original: "s", mine: "t"})


# The summary ----------------------------------------------------------------------------------------------------------


def test_pairs_and_their_standard_errors():
  before, after = (100.0, 0.0, 100.0, 100.0), (100.0, 0.0, 0.0, 100.0)
  found = [record("original", i, score) for i, score in enumerate(before)]
  found += [record("folder/r at 0.5", i, score, achieved_cr=4.0) for i, score in enumerate(after)]
  original, row = summarise(found, "original")
  assert original.mean == 75 and row.mean == 50 and row.difference == -25 and row.achieved_cr == 4
  assert original.standard_error == pytest.approx(25) and row.standard_error == pytest.approx(28.8675, abs=1e-4)
  assert row.difference_se == pytest.approx(25) and original.difference is None
  shown = tables.scores([original, row], "original", TASKS).splitlines()
  assert "below" not in shown[2] and "| r at 0.5 | 50.0 +- 28.9 | -25.0 +- 25.0 | 4.00 |" in shown[3]
  alone = Entry("original", "mmlu", None, "acc", 400, 24.2, 2.1)
  (line,) = tables.scores([alone], "original", TASKS).splitlines()[2:]
  assert line.startswith("| mmlu |") and "original at chance (25)" in line
  better = dataclasses.replace(alone, mean=33.0)
  assert "chance" not in tables.scores([better], "original", TASKS)


def test_means_over_chains_and_over_what_both_answered():
  found = [record("original", i, score) for i, score in enumerate((10.0, 20.0))]
  found += [record("r", 0, 30.0, chain=0), record("r", 0, 50.0, chain=1), record("r", 1, 0.0), record("r", 2, 90.0)]
  original, own = summarise(found, "original")
  assert original.samples == 2 and own.samples == 3 and own.mean == pytest.approx(130 / 3)
  assert own.difference == pytest.approx(((40 - 10) + (0 - 20)) / 2)
  halves = [record(prompt=i, achieved_cr=cr, reads=None) for i, cr in enumerate((2.0, 6.0))]
  (entry,) = summarise(halves, "original")
  assert entry.achieved_cr == pytest.approx(3.0) and entry.reads is None and entry.peak == 20.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_grade_that_is_no_number_spoils_its_own_method_alone(wrong):
  found = [record(method, i, 100.0 * i) for method in ("original", "fine") for i in range(3)]
  found += [record("broken", i, wrong if i == 1 else 100.0) for i in range(3)]
  original, fine, broken = summarise(found, "original")
  assert (original.mean, fine.mean, fine.difference) == (100.0, 100.0, 0.0)
  assert not any(map(math.isfinite, (broken.mean, broken.difference, broken.standard_error, broken.difference_se)))
  shown = tables.scores([original, fine, broken], "original", TASKS).splitlines()
  assert f" {wrong} +- nan |" in shown[4] and len(set(map(len, shown))) == 1
  text = [
    record(method, i, task="text", grades={"nll": wrong if method == "broken" and not i else 2.0, "kl": 0.0})
    for method in ("original", "broken") for i in range(2)
  ]  # fmt: skip
  entries = {(e.method, e.metric): e for e in summarise(text, "original")}
  assert entries["original", "perplexity"].mean == pytest.approx(math.e**2)
  assert entries["broken", "perplexity"].mean in (0, math.inf) or math.isnan(entries["broken", "perplexity"].mean)
  scored = [dataclasses.replace(e, reads=1.0) for e in (original, fine, broken)]
  assert set(curves(scored, "reads")) == {"original", "fine"}


# Tables and figures ---------------------------------------------------------------------------------------------------


def test_tables_are_padded_and_numbers_aligned_to_the_right():
  shown = tables.markdown(["name", "ms"], [["a longer name", "1.5"], ["b", ""]])
  assert shown.splitlines() == [
    "| name          |  ms |",
    "|---------------|----:|",
    "| a longer name | 1.5 |",
    "| b             |     |",
  ]
  rows = [{"name": "a", "us": 1.23456}, {"name": "b", "error": "no"}, {"name": "c", "skipped": "late", "us": 2.0}]
  shown = tables.of_mappings(rows, ("name", "us")).splitlines()
  cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in shown]
  assert cells[0] == ["us", "not measured"] and cells[2:] == [["1.235", ""], ["", "no"], ["2", "late"]]


def test_names_are_short_while_they_differ():
  assert tables.short_names(["a/x", "original"]) == {"a/x": "x", "original": "original"}
  assert tables.short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}


def test_texts_are_tabled_by_length():
  entries = [
    Entry("original", "text", 1024, "perplexity", 9, 20.0),
    Entry("a/r", "text", 1024, "perplexity", 9, 21.0, difference=1.0, achieved_cr=3.5, reads=1024 * 1025 / 4),
    Entry("a/r", "text", 1024, "kl", 9, 0.0312, 0.0021, achieved_cr=3.5),
  ]
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.texts(entries).splitlines()]
  assert lines[2] == ["text", "1,024", "original", "20.000", "", "", "1.00", ""]
  assert lines[3] == ["text", "1,024", "r", "21.000", "0.0312 +- 0.0021", "+5.00%", "3.50", "2.00"]


def test_a_baseline_has_its_name_wherever_it_stands(tmp_path, monkeypatch):
  """No method but the dense one is called dense, and no change is without its baseline."""
  plt = pytest.importorskip("matplotlib.pyplot")
  drawn = []
  monkeypatch.setattr(plt, "close", drawn.append)
  entries = [Entry(method, "mmlu", None, "acc", 9, 30.0) for method in ("dms", "a/tova")]
  assert figures_tasks.tasks(tmp_path / "tasks.png", entries, "a/tova", "")
  assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["tova", "dms"]
  monkeypatch.undo()
  plt.close(drawn[0])
  text = [Entry("tova", "text", 64, "perplexity", 9, 20.0), Entry("dms", "text", 64, "perplexity", 9, 21.0, 0.1, 1.0)]
  assert "| change from tova |" in tables.texts(text) and "| perplexity change |" in tables.texts(text[1:])


def test_one_module_imports_matplotlib():
  importing = re.compile(r"^\s*(import|from) matplotlib", re.MULTILINE)
  found = [path for path in (ROOT / "experiments").rglob("*.py") if importing.search(path.read_text())]
  assert found == [ROOT / "experiments/reports/plots.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/results/quality").glob("*-*.json")), ids=lambda p: p.stem)
def test_committed_results_have_the_summary_s_schema(path):
  entries = [Entry(**row) for row in json.loads(path.read_text())["summary"]]
  table = tables.texts if path.stem.endswith("-text") else tables.scores
  shown = table(entries, *([] if path.stem.endswith("-text") else ["original", TASKS])).splitlines()
  assert len(shown) > 2 and len({len(line) for line in shown}) == 1


def test_a_foreign_file_keeps_its_last_line(tmp_path):
  """Only what begins as a record does is cut off; another file is refused as it is."""
  path = tmp_path / "notes.txt"
  path.write_text("first line\nno end of line")
  with pytest.raises(ValueError):
    records.read(path)
  assert path.read_text() == "first line\nno end of line"


def test_chains_that_share_a_prompt_hold_it_once():
  """Three chains of 20, 20 and 26 tokens, 5 of them in common: 22 on average, 22 + 2 x 17 together."""
  each = dict(chains=3, shared=5.0, grades={"accuracy": 100.0})
  found = [record(chain=chain, peak=peak, **each) for chain, peak in enumerate((20.0, 20.0, 26.0))]
  peaks = {entry.chains: entry.peak for entry in summarise(found, "original")}
  assert peaks == {1: 22.0, 3: 56.0}
  assert [total_cost(found, name, 2) for name in ("peak", "reads")] == [39.0, 2 * found[0].reads]
  earlier = [dataclasses.replace(each, shared=None) for each in found]
  assert total_cost(earlier, "peak", 3) == 66.0
