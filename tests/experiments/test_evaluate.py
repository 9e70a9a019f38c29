"""experiments.evaluate: methods and budgets from flags, chains, resumption, summaries, margins."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.evaluation import likelihood
from dms_jax.evaluation.text import text_quality
from dms_jax.tokenizer import byte_tokenizer
from experiments import evaluate
from experiments.common import program
from experiments.methods import budgets, pareto, records, run, stopwatch, summary, trace
from experiments.methods import method as methods
from experiments.methods.budgets import Budget, fitted
from experiments.methods.estimate import Estimate, duration
from experiments.methods.records import Record
from experiments.methods.summary import summarise
from experiments.tasks import TASKS
from experiments.tasks.base import Prompt, TasksConfig, WritingTask
from experiments.tasks.gsm8k import GSM8K
from tests.helpers import ROOT, SIX_LINES, save_checkpoints, write_gsm8k
from tests.programs import finished, meeting, on_devices


@pytest.fixture(scope="module")
def models():
  cfg = tiny.config(vocab_size=257, max_position_embeddings=4096)
  return tiny.model(cfg), tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0), seed=0)


# Budgets --------------------------------------------------------------------------------------------------------------


def test_the_paper_s_budget_is_a_number_for_each_text(models):
  totals = [100, 41, 9]
  group, remark = fitted(models[0], policies.TOVA(), Budget(cr=4.0), totals)
  assert group.numbers == {"budget": [25, 11, 3]} and group.rows == [0, 1, 2] and remark == ""
  assert group.batched().budget.tolist() == [25, 11, 3] and group.of_row(1) == {"budget": 11}
  group, _ = fitted(models[0], policies.TOVA(), Budget(tokens=7), totals)
  assert group.numbers == {"budget": [7, 7, 7]}
  group, _ = fitted(models[0], policies.TOVA(), Budget(cr=4.0, rule="seen"), totals)
  assert group.numbers == {"cr": [4.0] * 3} and group.policy.budget is None
  group, _ = fitted(models[1], policies.DMS(threshold=0.5), Budget(), totals)
  assert group.numbers == {"threshold": [0.5] * 3} and group.policy.window == 5


def test_budgets_below_the_least_are_raised(models):
  group, remark = fitted(models[0], policies.SnapKV(), Budget(cr=4.0), [400, 41, 9])
  assert group.numbers == {"budget": [100, 32, 32]}
  assert remark == "2 of 3 budgets raised to 32 tokens, the least that SnapKV takes"
  group, remark = fitted(models[0], policies.StreamingLLM(), Budget(cr=4.0), [400, 404, 100, 9])
  assert group.policy.by_position and group.numbers == {"budget": [100, 101, 25, 5], "sinks": [4, 4, 4, 4]}
  assert remark == "1 of 4 budgets raised to 5 tokens, the least that StreamingLLM takes"
  group, _ = fitted(models[0], policies.StreamingLLM(), Budget(cr=4.0), [400, 400])
  assert group.policy.window == 95 and group.numbers == {"sinks": [4, 4]}
  group, _ = fitted(models[0], policies.StreamingLLM(), Budget(cr=4.0, rule="seen"), [9])
  assert group.numbers == {"cr": [4.0]}
  with pytest.raises(ValueError, match="--budgets=10: H2O: budget=10 tokens must be 51 or more at window=50"):
    fitted(models[0], policies.H2O(window=50), Budget(tokens=10), [400])
  with pytest.raises(ValueError, match="--budgets=128, less a buffer of 32 tokens: VaSE: sinks=60 must be"):
    fitted(models[0], policies.VaSE(sinks=60), Budget(tokens=128), [400])
  group, remark = fitted(models[0], policies.H2O(), Budget(tokens=10**6), [400, 41])
  assert group.policy.window == 199 and remark == ""  # not 499,999
  group, remark = fitted(models[0], policies.SnapKV(), Budget(tokens=64), [9])
  assert group.numbers == {"budget": [32]} and remark == ""  # a text that any budget holds whole
  cut, remark = fitted(models[0], policies.RKV(), Budget(cr=4.0), [400, 800])
  assert remark == "cut every 25 tokens instead of 128, a quarter of the smallest budget"
  assert cut.policy.buffer == 25 and cut.numbers == {"budget": [75, 175]}  # a head holds 100, 200
  with pytest.raises(ValueError, match="SnapKV: pool=4 must be an odd"):
    fitted(models[0], policies.SnapKV(pool=4), Budget(cr=4.0), [9])
  assert budgets.most_tokens(group.policy, group.numbers, 400) == 400  # the whole prompt, until it is cut
  group, _ = fitted(models[0], policies.TOVA(), Budget(cr=4.0), [400, 41])
  assert budgets.most_tokens(group.policy, group.numbers, 400) == 100


# Methods --------------------------------------------------------------------------------------------------------------


def built(names, models, read=lambda name, cls: cls(), retrofits=None, **settings):
  if retrofits is None:
    retrofits = ("r",) if any(name.lower().startswith("dms") for name in names) else ()
  loaded = [(*pair, models[1], pair[1]) for pair in methods.split_retrofits(retrofits)]
  return methods.build(names, models[0], "base", loaded, read, **settings)


def test_methods_by_their_names(models):
  found = built(["Vanilla", "DMS", "tova", "quest"], models, crs=(2.0, 12.0), tokens=(64,))
  assert [method.label for method in found] == [
    "vanilla", "dms", "tova, CR 2", "tova, CR 12", "tova, 64 tokens", "quest, CR 2", "quest, CR 12", "quest, 64 tokens",
  ]  # fmt: skip
  assert found[1].model is models[1] and all(m.model is models[0] for m in found if m.name != "dms")
  assert [method.budget for method in found[1:5]] == [{"threshold": 0.0}, {"cr": 2.0}, {"cr": 12.0}, {"budget": 64.0}]
  assert [(m.policy.page, m.policy.each_head) for m in found[5:]] == [(16, True), (24, True), (16, False)]
  assert len({method.checkpoint for method in found[2:]}) == 5  # its number of tokens tells the sixth apart
  own = lambda name, cls: cls(page=32) if name == "quest" else cls(window=3, budget=9) if name == "h2o" else cls()
  assert built(["quest"], models, own, crs=(2.0,))[0].policy.page == 32
  (h2o,) = built(["h2o"], models, own)
  assert h2o.budget == {"budget": 9.0} and h2o.given == Budget()


def test_trained_weights_for_methods_with_gates(models):
  names = [
    method.label for method in built(["vanilla", "dms"], models, retrofits=("a/x", "b/y"), thresholds=(0.0, 2.0))
  ]
  assert names == ["vanilla", "dms x", "dms x, threshold 2", "dms y", "dms y, threshold 2"]
  assert methods.split_retrofits(["DMS:a/x", "b"]) == [("dms", "a/x"), ("", "b")]
  assert [m.name for m in built(["dms"], models, retrofits=("dms:a/x", "dms:b/y"))] == ["dms x", "dms y"]


@pytest.mark.parametrize(
  ("names", "settings", "message"),
  [
    (["h3o"], {}, "--methods: 'h3o' is unknown; did you mean 'h2o'. there are .*tova"),
    (["dms"], {"retrofits": ()}, "--methods: dms needs gates that were trained for it: give --retrofit=FOLDER$"),
    (["tova"], {}, "--methods: tova needs a budget: give --cr=2,4,8, --budgets=512 .* or --tova.budget"),
    (["tova"], {"crs": (2.0,), "read": lambda name, cls: cls(budget=9)}, "--tova.budget=9 beside --cr or --budgets"),
    (["vanilla", "VANILLA"], {}, r"\['vanilla'\] would be the name of several methods"),
    (["tova", "vanilla"], {"retrofits": ("a/x",), "crs": (2.0,)}, "--retrofit=a/x: no method of .*tova,vanilla uses"),
    (["dms"], {"retrofits": ("a/x", "dms:b/y")}, "--retrofit=a/x: no method of --methods=dms uses it; leave"),
    (["tova"], {"retrofits": ("tova:a/x",), "crs": (2.0,)}, "--retrofit=tova:a/x: tova reads no gates; leave it out$"),
    (["dms"], {"retrofits": ("a/x", "kvzap:b/y")}, "--retrofit=kvzap:b/y: no method .* uses it; .* or add kvzap"),
    (["dms_budget"], {}, "dms_budget needs a budget: give --cr=2,4,8, --budgets=512 .* or --dms.budget"),
    (["dms_budget"], {"crs": (2.0,), "read": lambda name, cls: cls(budget=9)}, "--dms.budget=9 beside --cr or"),
    (["vanilla", "tova"], {"crs": (2.0,), "thresholds": (1.0,)}, "--thresholds=1.0: no method of .*tova has any use"),
    (["vanilla", "dms"], {"crs": (2.0, 4.0)}, "--cr=2.0,4.0: no method of --methods=vanilla,dms has any use for it"),
    (["vanilla"], {"tokens": (64,)}, "--budgets=64: no method of --methods=vanilla has any use for it"),
    (["dms"], {"retrofits": ("a/x", "b/x")}, r"\['dms x'\] would be the name of several methods"),
  ],
)
def test_methods_that_cannot_be(models, names, settings, message):
  with pytest.raises(ValueError, match=message):
    built(names, models, **settings)


def test_flags_that_change_nothing_are_named():
  given = {"cr": (2.0,), "dms.threshold": 1.0, "h2o.window": 3, "gsm8k.shots": 0, "needle.keys": 2}
  assert methods.idle_flags(given, ("TOVA", "dms_budget"), ("needle",)) == ["--h2o.window=3", "--gsm8k.shots=0"]
  assert methods.idle_flags(given, (), ("needle", "gsm8k")) == ["--h2o.window=3"]


# Questions and texts --------------------------------------------------------------------------------------------------


def test_questions_have_budgets_of_their_own(models, tmp_path, monkeypatch):
  monkeypatch.setattr(likelihood, "BUCKET", 64)
  task = GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 12)), shots=1)
  (job,) = run.prepare([task], TasksConfig(limit=3), (), byte_tokenizer(), 4096)
  method = run.Method("tova", models[0], policies.TOVA(), given=Budget(cr=3.0))
  made = [record for part in run.run(job, [method], byte_tokenizer(), batch=2) for record in part]
  assert [record.budget for record in made] == [{"cr": 3.0}] * 3
  for record in made:
    passage = job.passages[0][record.prompt]
    budget = math.ceil(len(passage.tokens) / 3)
    ((alone,),) = likelihood.score([(models[0], policies.TOVA(budget=budget))], [passage], batch=2)
    assert record.grades["answer_loglik"] == pytest.approx(alone.logprobs.mean(), abs=2e-5)  # float32, other shapes
    assert record.achieved_cr == pytest.approx(len(passage.tokens) / budget)
  hard = run.Method("dms_budget", models[1], policies.DMS(threshold=math.inf), given=Budget(cr=3.0))
  for part in run.run(job, [hard], byte_tokenizer(), batch=2):
    assert all(record.achieved_cr == pytest.approx(record.tokens / math.ceil(record.tokens / 3)) for record in part)
  again = [record for part in run.run(job, [method], byte_tokenizer(), batch=2, done=made[:2]) for record in part]
  assert again == made[2:]  # to the bit
  assert again[0].seconds > 0  # what it runs was compiled before


def test_chunks_of_a_text(models):
  tokens = np.asarray(tiny.tokens(models[0].config, 1, 96))[0]
  text = evaluate.Texts(tokens.reshape(4, 24), [("text", chunk, "t") for chunk in range(4)])
  score = lambda method, wanted, text=text: [
    record
    for part in evaluate.score_text(
      models[0], method, text.chunks, wanted, text.record(method), batch=2, tick=lambda n: None
    )
    for record in part
  ]
  dense = run.Method("vanilla", models[0])
  bounded = run.Method("tova", models[0], policies.TOVA(), given=Budget(cr=4.0))
  gates = run.Method("dms", models[1], policies.DMS(threshold=0.3))
  found = {method.name: score(method, text.missing(method, [])) for method in (dense, bounded, gates)}
  whole = {
    "vanilla": text_quality(models[0], None, tokens, 24),
    "tova": text_quality(models[0], None, tokens, 24, policy=policies.TOVA(budget=6)),
    "dms": text_quality(models[0], models[1], tokens, 24, threshold=0.3),
  }
  entries = {(e.method, e.metric): e for e in summarise([r for own in found.values() for r in own], "vanilla")}
  for name, quality in whole.items():
    assert [record.prompt for record in found[name]] == [0, 1, 2, 3]
    perplexity = entries[name, "perplexity"]
    assert perplexity.mean == pytest.approx(quality.get("perplexity", quality["perplexity_original"]), rel=1e-5)
    assert perplexity.achieved_cr == pytest.approx(quality.get("achieved_cr", 1.0)) and perplexity.samples == 4
    assert entries[name, "kl"].mean == pytest.approx(quality.get("kl", 0.0), abs=1e-6)
    assert 24 * 25 / 2 / perplexity.reads == pytest.approx(quality.get("reads_cr", 1.0))
    if name != "vanilla":
      before = quality["perplexity_original"]
      assert perplexity.difference == pytest.approx(quality["perplexity"] - before, rel=1e-4)
  hard = run.Method("dms_budget", models[1], policies.DMS(threshold=math.inf), given=Budget(cr=4.0))
  assert [record.achieved_cr for record in score(hard, [0, 1])] == [4.0, 4.0]
  assert text.missing(bounded, found["tova"][:3] + found["dms"]) == [3]
  assert score(bounded, [3]) == found["tova"][3:]
  places = [("text a", 0, "a"), ("text b", 0, "b"), ("text b", 1, "b"), ("text b", 2, "b")]
  several = evaluate.Texts(text.chunks, places)  # the same chunks, of two texts
  made = score(bounded, several.missing(bounded, found["tova"]), several)
  assert [(record.task, record.prompt) for record in made] == [place[:2] for place in places]
  assert [record.grades for record in made] == [record.grades for record in found["tova"]]
  assert several.missing(bounded, made[2:]) == [0, 1]


# Chains ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Echo(WritingTask):
  """A text is right if its first character is a capital letter, which is its answer."""

  name = "echo"
  metrics = ("accuracy",)
  new_tokens = 9
  stop = ("zq",)

  def prompts(self, config, tokenizer, length, max_positions):
    texts = [f"{i} {'abcdefgh' * (i + 1)}"[: 7 + 6 * i] for i in range(config.limit or 3)]
    return [Prompt(text, tokenizer.encode(text), ()) for text in texts]

  def answer(self, text):
    return text[:1].lower() or None

  def grade(self, text, prompt):
    return {"accuracy": 100.0 * (text[:1] < "a")}


def in_order(made):
  return sorted(made, key=lambda record: record.key[4:])


def ran(job, method, **settings):
  return in_order(record for part in run.run(job, [method], byte_tokenizer(), width=3, **settings) for record in part)


def echo(*lengths, chains=(2,), limit=3):
  config = TasksConfig(limit=limit, chains=chains, temperature=1.0, top_p=0.9)
  (job,) = run.prepare([Echo()], config, (), byte_tokenizer(), 4096, lengths)
  return job


def test_a_shorter_chain_is_the_start_of_a_longer_one(models):
  method = run.Method("dms", models[1], policies.DMS())
  both, short, long = (ran(echo(*lengths), method) for lengths in ((4, 9), (4,), (9,)))
  assert both == in_order(short + long) and len(both) == 12
  assert {record.max_tokens for record in short} == {4} and all(len(r.text) <= 4 for r in short)
  assert all(a.text.startswith(b.text) and a.reads > b.reads for a, b in zip(long, short, strict=True))
  assert len({record.text for record in both}) > 6 and {r.answer for r in both} == {r.text[:1].lower() for r in both}
  assert ran(echo(4, 9), method, done=both[:5]) == both[5:]


def test_a_chain_has_the_seconds_of_its_steps(models, monkeypatch):
  """Each step takes a second: one for the prompt and 33 tokens, then one for 32 tokens each. Prompts wait in line."""

  class Clock:
    seconds = 0.0

    @contextlib.contextmanager
    def running(self):
      yield
      self.seconds += 1.0

  monkeypatch.setattr(stopwatch, "Stopwatch", Clock)
  job = echo(9, 40, 80, chains=(1,), limit=4)
  made = ran(job, run.Method("vanilla", models[0]))
  ended = [each for each in made if each.tokens - len(job.asked[each.prompt].tokens) < each.max_tokens - 1]
  expected = {9: 1.0, 40: 1.0 + 7 / 32, 80: 3.0}
  assert {record.seconds for record in made if record not in ended} == set(expected.values())
  assert all(record.seconds == expected[record.max_tokens] for record in made if record not in ended)
  assert all(1 <= record.seconds <= 3 for record in ended)


def test_budgets_that_depend_on_the_length_are_written_apart(models):
  method = run.Method("tova", models[0], policies.TOVA(), given=Budget(cr=2.0))
  job = echo(4, 9)
  both = ran(job, method)
  assert both == in_order(ran(echo(4), method) + ran(echo(9), method))
  for record in both:
    allowed = math.ceil((len(job.asked[record.prompt].tokens) + record.max_tokens) / 2)
    assert record.peak >= record.tokens / record.achieved_cr == min(allowed, record.tokens)


def test_a_text_beyond_the_context_is_refused():
  with pytest.raises(
    ValueError, match=r"--max_tokens=90: a prompt of echo has 19 tokens, .* give at most --max_tokens=81"
  ):
    run.prepare([Echo()], TasksConfig(limit=3), (), byte_tokenizer(), 100, (90,))


# The program ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_a_mesh_gives_the_same_records(checkpoints, tmp_path):
  """Chains, texts, tasks by likelihood and traces over four devices of two processes; process 0 alone writes."""
  base, retrofit = map(str, checkpoints)
  start = lambda name, devices, *flags: subprocess.Popen(
    [
      sys.executable, "-m", "experiments.evaluate", f"--checkpoint={base}", f"--retrofit={retrofit}",
      "--methods=dms,tova", "--cr=2", "--tasks=countdown,hellaswag", "--limit=3", "--chains=2",
      "--max_tokens=6", "--temperature=0.8", f"--hellaswag.data={tmp_path / 'h.txt'}", "--hellaswag.shots=0",
      f"--text={tmp_path / 'text.txt'}", "--text_tokens=72", "--lengths=24", "--traces=1", "--dtype=float32",
      f"--output={tmp_path / name}", *flags,
    ],
    cwd=ROOT, env=on_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  (tmp_path / "h.txt").write_text(SIX_LINES)
  (tmp_path / "text.txt").write_text("a text of some length " * 20)
  mesh = "--mesh.data=2", "--mesh.tensor=2"
  for code, _, errors in finished(start("one", 1), *(start("many", 2, *mesh, *meet) for meet in meeting())):
    assert code == 0, errors
  bare = lambda record: dataclasses.replace(record, seconds=0.0, grades={})
  for file in (evaluate.RECORDS, evaluate.TEXTS):
    one, many = ({r.key: r for r in records.read(tmp_path / name / file)} for name in ("one", "many"))
    assert one.keys() == many.keys() and len(one) == 2 * (3 * 2 + 3 if file == evaluate.RECORDS else 3)
    for key, want in one.items():
      assert bare(many[key]) == bare(want)
      assert many[key].grades == pytest.approx(want.grades, abs=3e-5)  # nats a token; sums run in another order
  one, many = (trace.read("output", tmp_path / name / trace.FILE) for name in ("one", "many"))
  assert one == many and len(one) == 2


def test_a_killed_run_gives_the_same_records(checkpoints, tmp_path, monkeypatch, capfd):
  """Killed after each batch of records, the last of them half written; the summary is that of an unbroken run."""
  base, retrofit = map(str, checkpoints)
  (tmp_path / "text").write_text("abc, def. " * 9)
  config = evaluate.Config(
    checkpoint=base, retrofit=(retrofit,), methods=("vanilla", "dms", "tova"), cr=(2.0,), max_tokens=(4, 9), width=3,
    batch=2, text=(str(tmp_path / "text"),), lengths=(24,), dtype="float32", output=str(tmp_path / "whole"), traces=1,
  )  # fmt: skip
  settings = {
    evaluate.Config: config, TasksConfig: TasksConfig(("echo", "gsm8k"), limit=3, chains=(1, 2), temperature=1.0),
    Echo: Echo(), GSM8K: GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 3)), shots=0),
  }  # fmt: skip
  finished = []
  monkeypatch.setitem(TASKS, "echo", Echo)
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls] if cls in settings else cls())
  monkeypatch.setattr(program, "flag_values", lambda **_: {"checkpoint": base})
  monkeypatch.setattr(program, "finish", finished.append)
  evaluate.main()
  assert (
    "3 methods x 2 tasks and 1 texts = 9 cells: 27 chains and questions to do (0 are there)" in capfd.readouterr().err
  )

  settings[evaluate.Config] = dataclasses.replace(config, output=str(tmp_path / "killed"))
  append = records.append

  def dying(path, found):
    append(path, found)
    path.write_bytes(path.read_bytes()[:-9])  # within the last line
    raise KeyboardInterrupt

  for kill in range(9):
    calls = itertools.count()
    dies = lambda path, found, kill=kill, calls=calls: (dying if next(calls) == kill % 3 else append)(path, found)
    monkeypatch.setattr(records, "append", dies)
    with pytest.raises(KeyboardInterrupt):
      evaluate.main()
  monkeypatch.setattr(records, "append", append)
  evaluate.main()
  for name in (evaluate.RECORDS, evaluate.TEXTS):
    one, other = (records.read(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert {r.key: r for r in one} == {r.key: r for r in other} and len(one) == len(other)
  assert len(one) == 9 and one[0].grades.keys() == {"nll", "kl"}
  traced = [trace.read("output", tmp_path / folder / trace.FILE) for folder in ("whole", "killed")]
  assert [(each.method, each.prompt) for each in traced[0]] == [(name, 0) for name in ("vanilla", "dms", "tova")]
  assert traced[0] == traced[1] and min(traced[0][0].held) == 1 > min(traced[0][2].held)
  whole, resumed = (json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "killed"))
  for found in (whole, resumed):  # times are not the same again
    times = {(entry["task"], entry["metric"]): entry.pop("seconds") for entry in found["summary"]}
    assert times["echo", "pass@2"] > 0 and times["text", "kl"] is None
    found["margins"] = [margin for margin in found["margins"] if margin["cost"] != "seconds"]
  assert whole["summary"] == resumed["summary"] and whole["margins"] == resumed["margins"]
  entries = {(e["method"], e["task"], e["metric"], e["max_tokens"]): e for e in whole["summary"]}
  assert {key[2] for key in entries if key[1] == "echo"} == {"accuracy", "pass@2", "majority@2"}
  assert entries["dms", "echo", "pass@2", 9]["reads"] == pytest.approx(
    2 * entries["dms", "echo", "accuracy", 9]["reads"]
  )
  assert entries["tova", "text", "kl", 0]["mean"] > 0 == entries["vanilla", "text", "kl", 0]["mean"]
  assert {(m["task"], m["method"], m["cost"]) for m in whole["margins"]} == {
    ("echo", method, cost) for method in ("dms", "tova") for cost in ("reads", "peak")
  }
  settings[GSM8K] = GSM8K(settings[GSM8K].data, shots=1)
  with pytest.raises(ValueError, match="holds records of vanilla on gsm8k made with other settings"):
    evaluate.main()
  settings[evaluate.Config] = dataclasses.replace(config, text=(str(tmp_path / "text"),), lengths=(99,))
  with pytest.raises(ValueError, match=r"--text=\S+ has 90 tokens, less than a chunk of --lengths=99"):
    evaluate.main()


@pytest.mark.parametrize(
  ("setting", "value"),
  [("cr", (math.inf,)), ("cr", (math.nan,)), ("cr", (0.5,)), ("budgets", (0,)), ("thresholds", (math.nan,)),
   ("kv_budget_gib", math.inf), ("kv_budget_gib", math.nan), ("kv_budget_gib", 0.0)],
)  # fmt: skip
def test_numbers_that_cannot_be(setting, value):
  with pytest.raises(ValueError, match=f"--{setting}="):
    evaluate.Config(checkpoint="", methods=("tova",), **{setting: value})


# The summary ----------------------------------------------------------------------------------------------------------


def chain(prompt, number, grade, answer, method="dms", chains=3, **changes):
  made = Record(
    method, "echo", None, {}, chains, 9, 0, prompt, number, "s", 20, 10.0, 5.0, 2.0, {"accuracy": grade}, "x", answer
  )
  return dataclasses.replace(made, **changes)


def test_pass_at_k_and_votes_over_all_subsets():
  grades, answers = [0.0, 100.0, 0.0, 100.0, 0.0], ["a", "b", "a", "b", None]
  for width in range(1, 6):
    subsets = list(itertools.combinations(range(5), width))
    best = np.mean([max(grades[i] for i in subset) for subset in subsets])
    assert summary.best_of(grades, width) == pytest.approx(best)
    assert summary.best_of(grades, width) == pytest.approx(100 * (1 - math.comb(3, width) / math.comb(5, width)))
  assert summary.best_of([10.0, 40.0, 20.0], 2) == pytest.approx((40 + 40 + 20) / 3)
  assert summary.vote(answers) == 0 and summary.vote(["b", "a", "a"]) == 1 and summary.vote(["b", "a"]) == 0
  assert summary.vote([None, None]) is None
  assert summary.majority(grades, answers, 1) == pytest.approx(np.mean(grades))
  assert summary.majority(grades, answers, 5) == 0.0 and summary.majority(grades, [None] * 5, 3) == 0.0
  assert summary.majority(grades, answers, 2) == pytest.approx(100 * 4 / 10)  # of (a, b) the first wins
  many = summary.majority([100.0] * 8 + [0.0] * 8, ["x"] * 8 + ["y"] * 8, 7)  # sampled subsets
  assert abs(many - 50) < 10 and many == summary.majority([100.0] * 8 + [0.0] * 8, ["x"] * 8 + ["y"] * 8, 7)


def test_the_summary_of_chains():
  rows = [(0, (100.0, 0.0, 100.0), "aba"), (1, (0.0, 0.0, 100.0), "aab")]
  found = [
    chain(p, i, g, a) for p, grades, letters in rows for i, (g, a) in enumerate(zip(grades, letters, strict=True))
  ]
  found += [chain(p, i, 0.0, "z", method="vanilla") for p in (0, 1) for i in range(3)]
  entries = {(e.method, e.metric): e for e in summarise(found, "vanilla", widths=(1, 2, 8))}
  means = {metric: entry.mean for (method, metric), entry in entries.items() if method == "dms"}
  assert means == pytest.approx({
    "accuracy": 50.0, "pass@2": (100 + 200 / 3) / 2, "pass@3": 100.0, "majority@2": (200 / 3 + 100 / 3 * 0) / 2,
    "majority@3": 50.0,
  })  # fmt: skip
  three = entries["dms", "pass@3"]
  assert (three.chains, three.reads, three.peak, three.difference, three.samples) == (3, 30.0, 15.0, 100.0, 2)
  assert entries["dms", "accuracy"].reads == 10.0 and entries["dms", "accuracy"].chains == 1
  assert entries["vanilla", "pass@3"].difference is None
  partial = summarise(found[:4], "vanilla")  # one chain of the second prompt
  assert {e.metric: e.samples for e in partial} == {"accuracy": 2, "pass@3": 1, "majority@3": 1}


def test_budgets_are_apart():
  found = [chain(0, 0, grade, None, chains=1, budget={"cr": cr}) for cr, grade in ((2.0, 100.0), (4.0, 0.0))]
  assert [(e.label, e.mean) for e in summarise(found, "vanilla") if e.metric == "accuracy"] == [
    ("dms, CR 2", 100.0), ("dms, CR 4", 0.0),
  ]  # fmt: skip


def test_the_baseline_of_a_budget_is_that_of_the_same_budget():
  found = [
    chain(0, 0, grade, None, method, chains=1, budget={"cr": cr})
    for method, cr, grade in (("tova", 2.0, 100.0), ("tova", 4.0, 50.0), ("dms", 4.0, 60.0), ("dms", 8.0, 20.0))
  ]
  differences = {e.label: e.difference for e in summarise(found, "tova")}
  assert differences == {"tova, CR 2": None, "tova, CR 4": None, "dms, CR 4": 10.0, "dms, CR 8": -80.0}


def test_frontiers_and_margins_by_hand():
  points = [(1.0, 10.0), (3.0, 30.0), (2.0, 5.0), (4.0, 30.0), (5.0, 40.0), (1.0, 8.0)]
  assert pareto.frontier(points) == [(1.0, 10.0), (3.0, 30.0), (5.0, 40.0)]
  flat = [(2.0, 10.0), (6.0, 50.0)]  # on 2..5: 10 to 40, against 20 to 30 to 40
  assert pareto.margin(points, flat) == pytest.approx(((10 + 10) / 2 * 1 + (10 + 0) / 2 * 2) / 3)
  assert pareto.margin(flat, points) == pytest.approx(-pareto.margin(points, flat))
  assert pareto.margin(points, [(7.0, 1.0), (8.0, 2.0)]) is None and pareto.margin(points, []) is None
  assert pareto.margin([(1.0, 0.0), (4.0, 2.0)], [(1.0, 0.0), (4.0, 1.0)], log=True) == pytest.approx(0.5)
  entry = summarise([chain(0, 0, 1.0, None, chains=1)], "vanilla")[0]
  made = [
    dataclasses.replace(entry, method=method, reads=reads, peak=None, mean=mean, metric=metric, chains=chains)
    for method, reads, mean, metric, chains in (
      ("vanilla", 2.0, 10.0, "accuracy", 1), ("vanilla", 6.0, 50.0, "pass@2", 2),
      ("vanilla", 6.0, 90.0, "majority@2", 2),
      ("dms", 1.0, 10.0, "accuracy", 1), ("dms", 3.0, 30.0, "accuracy", 1), ("dms", 5.0, 40.0, "pass@2", 2),
    )
  ]  # fmt: skip
  (margin,) = summary.margins(made, "vanilla", best_of_all=True)
  assert margin["margin"] == pytest.approx(20 / 3) and (margin["method"], margin["cost"]) == ("dms", "reads")


def test_progress_tells_what_is_left():
  clock, lines = [0.0], []
  estimate = Estimate(1000, now=lambda: clock[0], log=lines.append)
  estimate.tick("a")
  clock[0] = 10.0
  estimate.tick("a")
  estimate.add(100)
  clock[0] = 20.0
  estimate.tick("b", unfinished=100)
  clock[0] = 22.0
  estimate.tick("c")
  assert lines == ["a: 0% of all", "b: 20% of all, 80 s left"]
  assert [duration(s) for s in (45.2, 600, 7300)] == ["45 s", "10 min", "2 h 02 min"]
