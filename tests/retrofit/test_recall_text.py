"""Made-up documents: what the end asks for stands in the middle, sizes, resumption, refusals."""

from __future__ import annotations

import collections
import csv
import io
import itertools
import json
import re

import numpy as np
import pytest

from dms_jax.retrofit import DataConfig, RecallTextConfig, recall_text
from dms_jax.retrofit.data import load_sources
from dms_jax.tokenizer import byte_tokenizer
from experiments.tasks import needle, tracking

MANY = 60
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def chat_tokenizer():
  tokenizer = byte_tokenizer()
  tokenizer.settings["chat_template"] = TEMPLATE
  return tokenizer


def made(kind: str, tokens=(200, 2000), filler=(), seed=0):
  config = RecallTextConfig(MANY, tokens=tokens, kinds=(kind,), seed=seed)
  lines, tokenizer = recall_text.Filler(filler), chat_tokenizer()
  return [recall_text.document(config, tokenizer, lines, number) for number in range(MANY)]


def whole(record: dict) -> str:
  return record.get("text") or "\n".join(message["content"] for message in record["messages"])


@pytest.mark.parametrize("kind", recall_text.KINDS)
def test_a_document_depends_on_its_number_and_has_about_its_size(kind):
  assert tuple(recall_text.KINDS) == RecallTextConfig().kinds
  found = made(kind)
  assert found == made(kind) and found != made(kind, seed=1)
  assert len({whole(each) for each in found}) == MANY
  sizes = np.array([len(whole(each).encode()) for each in found])  # a byte is a token
  assert sizes.min() < 700 and sizes.max() > 1300 and np.median(sizes) < 1600


@pytest.mark.parametrize("kind", recall_text.KINDS)
def test_no_wording_is_a_benchmarks(kind):
  texts = "\n".join(whole(each) for each in made(kind))
  for own in ("special magic", "VAR ", *re.split(r"(?<=\.) ", needle.NOISE), tracking.QUESTION[:40]):
    assert own not in texts


def test_values_asked_for_were_said():
  """Read back with regular expressions: what the end says of a thing is what a fact says of it."""
  forms = "weighs|costs|has the serial number|was made in batch|is kept on shelf|opens with code"
  for each in made("facts"):
    said = dict(re.findall(rf"The (\w+ \w+) (?:{forms}) ([\d,]+)", each["text"]))
    asked = re.findall(r"of the (\w+ \w+)(?:\?\nA:| =|:| is) ([\d,]+)", each["text"])
    assert asked and all(said[thing] == value for thing, value in asked)


def test_aliases_are_all_names_of_a_value():
  """Each list at the end is what following the assignments, in their order, gives; half begin with an example."""
  examples = 0
  for each in made("aliases"):
    at = re.search(r"(\n(All that equal|# value|Which have) [^\n]*)+\n$", each["text"]).start()
    body, end = each["text"][:at], each["text"][at:]
    examples += bool(re.search(r"^(All that equal|# value|Which have) ", body, re.M))
    holds: dict[str, str] = {}
    pattern = (
      r"let (\w+) be (\d+)\.|^(\w+) :?= (\d+)$|Cell (\w+) holds (\d+)\.|(\w+) chose the number (\d+)\.|"
      r"\b(\w+) is the same as (\w+)\.|^(\w+) :?= (\w+)$|Cell (\w+) copies cell (\w+)\.|(\w+) chose the same as (\w+)\."
    )
    for match in re.finditer(pattern, body, re.M):
      name, other = [group for group in match.groups() if group]
      holds[name] = other if other.isdigit() else holds[other]
    groups = collections.defaultdict(list)
    for name, value in holds.items():
      groups[value].append(name)
    asked = re.findall(r"(?:equal |value |have )(\d+)[:?] ([\w, ]+)", end)
    assert asked
    for value, names in asked:
      assert sorted(names.split(", ")) == sorted(groups[value])
  assert MANY // 4 < examples < 3 * MANY // 4


def test_fields_asked_for_are_in_the_table():
  for each in made("records"):
    (*body,) = each["text"].split("\n")
    rows = {}
    for line in body:
      if line.startswith("{"):
        rows[json.loads(line)["name"]] = json.loads(line)
      elif match := re.fullmatch(r"(\w+) of (\w+) owns the (\w+ \w+) with the number (\d+)\.", line):
        rows[match[1]] = dict(zip(("town", "object", "number"), match.groups()[1:], strict=True))
      elif len(cells := next(csv.reader(io.StringIO(line)), [])) == 4 and cells[0] != "name":
        rows[cells[0]] = dict(zip(("town", "object", "number"), cells[1:], strict=True))
    asked = re.findall(r"^(town|object|number) of (\w+): (.*)$", each["text"], re.M)
    assert asked and all(rows[name][field] == value for field, name, value in asked)


def test_events_quotes_and_dialogues_repeat_what_was_said():
  for each in made("events"):
    log = re.findall(r"\[(\d\d:\d\d)\] (\w+) (\w+) the (\w+ \w+)\.", each["text"])
    assert all(a[0] < b[0] for a, b in itertools.pairwise(log))
    asked = re.findall(r"Who (\w+) the (\w+ \w+)\? (\w+), at (\d\d:\d\d)\.", each["text"])
    assert asked and all((time, who, verb, thing) in log for verb, thing, who, time in asked)
    first, last = re.search(r"first entry was at (\d\d:\d\d), the last was by (\w+)\.", each["text"]).groups()
    assert (first, last) == (log[0][0], log[-1][1])
  for each in made("quotes"):
    said = dict(re.findall(r'The letter from (\w+) reads: "([^"]*)"', each["text"]))
    label, text = re.search(r'To repeat the letter from (\w+): "([^"]*)"', each["text"]).groups()
    assert said[label] == text
  for each in made("dialogue"):
    roles = [message["role"] for message in each["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    trait, value = re.search(r"Your|You said that your (.*) is (.*)\.", each["messages"][-1]["content"]).groups()
    assert f"My {trait} is {value}." in each["messages"][0]["content"]


@pytest.mark.parametrize("filler", [(), ["Line number five says 'no\\' to \"all\" of it.", "and ) a ] third }"]])
def test_a_session_shows_what_its_module_gives(filler):
  asked = 0
  for each in made("code", filler=filler):
    module, *session = each["text"].split("\n>>> ")
    names: dict = {}
    exec(module, names)
    for line in session:
      expression, value = line.strip().split("\n")
      assert str(eval(expression, names)) == value
      asked += 1
  assert asked > MANY


def test_facts_hide_in_the_lines_of_other_texts():
  filler = [f"Line number {number} of a text of its own." for number in range(50)]
  found = [each["text"] for each in made("facts", filler=filler)]
  hidden = [filler[0][:11] in text for text in found]
  assert 0.3 < np.mean(hidden) < 0.7


def test_documents_are_a_source_of_a_retrofit(tmp_path):
  tokenizer, config = chat_tokenizer(), RecallTextConfig(14, tokens=(64, 256))
  path = tmp_path / "recall_text.jsonl"
  recall_text.write(tokenizer, config, path)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(lines) == 14 and sum("messages" in line for line in lines) == 2
  (source,) = load_sources(DataConfig(recall_text=config), tokenizer, {"recall_text": path})
  assert source.name == "recall_text" and source.document[-1] == 14
  recall_text.write(byte_tokenizer(), config, path)  # without a chat template: no dialogue
  assert not any("messages" in json.loads(line) for line in path.read_text().splitlines())
  with pytest.raises(ValueError, match=r"kinds=dialogue needs .*template"):
    recall_text.write(byte_tokenizer(), RecallTextConfig(1, kinds=("dialogue",)), path)
  with pytest.raises(ValueError, match=r"recall_text\.rows=0"):
    recall_text.write(tokenizer, RecallTextConfig(), path)


@pytest.mark.parametrize(
  "wrong", [dict(rows=-1), dict(tokens=(9, 3)), dict(tokens=(5,)), dict(kinds=()), dict(kinds=("x",))]
)
def test_refusals_name_the_setting(wrong):
  with pytest.raises(ValueError, match=rf"recall_text\.{next(iter(wrong))}="):
    RecallTextConfig(**wrong)
  with pytest.raises(ValueError, match=r"data\.recall_text"):
    DataConfig(families=("countdown",), recall_text=RecallTextConfig(1))
