"""The report's page and program: what stands on the page, what is written, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import report
from experiments.common import program
from experiments.reports import figures_report, page, results, runs, styles
from experiments.tasks import TASKS
from tests.report_runs import Outline, made_up, record, timed, write

ROOT = Path(__file__).parents[2]


# The page -------------------------------------------------------------------------------------------------------------


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
  marks = page.noted(["a", " note", " b", " ;", "c"], ("note", ";"))
  assert marks == [False, True, True, True, False] and not any(page.noted(["note", ";"], None))
  assert page.spans(["a", "b", "c"], [0.0, 0.0, 1.0], [False] * 3) == [(0, "ab", False), (5, "c", False)]
  assert page.spans(["a", "b"], [0.0, 0.0], [False, True]) == [(0, "a", False), (0, "b", True)]


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


@pytest.mark.parametrize(
  ("output", "message"),
  [
    ("file", "--output=file must be a folder: a page and pictures are written into it"),
    ("page.html", "--output=page.html must be a folder"), ("", "--output=FOLDER is needed"),
  ],
)  # fmt: skip
def test_an_output_that_is_no_folder_is_refused(tmp_path, monkeypatch, output, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("kept")
  with pytest.raises(ValueError, match=re.escape(message)):
    report.Config(("a",), output)
  assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
  ("output", "message"),
  [("file/below", "no folder can be made there (Not a directory)"), ("taken", "cannot be written")],
)
def test_what_cannot_be_written_names_the_flag(tmp_path, monkeypatch, output, message):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "a", timed())
  (tmp_path / "file").write_text("kept")
  (tmp_path / "taken" / "index.html" / "x").mkdir(parents=True)
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: cls(("a",), output))
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    report.main()
  assert str(caught.value).startswith(f"--output={output}: ") and "\n" not in str(caught.value)


def test_what_cannot_be_read_names_the_flag(monkeypatch):
  def denied(folder):
    raise PermissionError(13, "Permission denied", str(folder / "records.jsonl"))

  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: cls(("a",), "out"))
  monkeypatch.setattr(runs, "load", denied)
  with pytest.raises(ValueError, match=r"--runs: a/records.jsonl cannot be read \(Permission denied\)"):
    report.main()


def test_the_program_warns_in_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "a", [record(f"m{i}", 0, math.nan) for i in range(5)])
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: cls(("a",), "out"))
  monkeypatch.setattr(program, "flag_values", dict)
  monkeypatch.setattr(figures_report, "tradeoff", lambda *a: None)
  report.main()
  shown = capsys.readouterr()
  assert shown.err.count("\n") == 1 and shown.err.startswith(
    "warning: m0 on needle: score is no finite number in 1 of 1"
  )
  assert "and 2 more" in shown.err and len(json.loads(shown.out)["warnings"]) == 5
