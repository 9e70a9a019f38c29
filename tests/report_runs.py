"""Made-up runs for tests of the report, and what a page holds."""

from __future__ import annotations

import dataclasses
import html.parser
import json
from pathlib import Path

from experiments.methods import records, trace
from experiments.methods.records import Record
from experiments.reports import runs


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


def chunks(method: str, cr: float | None, nll: list[float], kl: list[float], settings: str = "t-c") -> list[Record]:
  about = dict(task="text", length=64, max_tokens=0, seed=0, reads=None, peak=None, text=None, settings=settings)
  grades = [{"nll": a, "kl": b} for a, b in zip(nll, kl, strict=True)]
  return [record(method, i, 0, cr, grades=each, **about) for i, each in enumerate(grades)]


def timed() -> list[Record]:
  """DMS reads less and takes half the time of the dense cache, at equal scores."""
  return [
    record(method, i, 100.0 * (i < n), cr, max_tokens=n, reads=n * reads, seconds=n * seconds)
    for method, cr, reads, seconds in (("vanilla", None, 100.0, 0.25), ("dms", 4.0, 25.0, 0.125))
    for n in (1, 2, 3) for i in range(4)
  ]  # fmt: skip


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
