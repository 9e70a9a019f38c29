"""Hyper-scaling: the methods of a sweep, kills, times, the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dms_jax import Generator, checkpoint, generate, policies
from dms_jax import testing as tiny
from dms_jax.model import check_policy
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.tokenizer import byte_tokenizer
from experiments import hyperscale
from experiments.common import program
from experiments.hyperscaling import analysis, cells, page, timing
from experiments.hyperscaling import methods as sweep_methods
from experiments.methods import records, run, trace, write
from experiments.tasks import TASKS
from experiments.tasks.base import Prompt, TasksConfig, WritingTask
from tests.helpers import OTHER_FAMILIES, ROOT, save_checkpoints
from tests.programs import finished, on_devices

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
  assert found[-1].policy.dense_layers == 0 and found[-1].policy.page == 16 and found[-1].policy.each_head
  assert sweep_methods.styled(["vanilla", "dms", "tova", "h2o", "quest"]) == ["vanilla", "tova", "h2o", "dms", "quest"]


def test_elastic_gates_are_read_at_the_cr_of_their_label(monkeypatch):
  """One retrofit for all CRs from 2 to 8, listed once for each: its thresholds differ, and so do its records."""
  model = tiny.model(tiny.config(), tiny.dms(elastic=(2.0, 8.0)))
  monkeypatch.setattr(checkpoint, "load_retrofitted", lambda path, folder, **how: model)
  monkeypatch.setattr(checkpoint, "fingerprint", lambda folder: folder)
  original, entries = model.replace(dms=None), ("2:gates", "8:gates")
  build = lambda entries, read: sweep_methods.build(("vanilla", "dms"), "base", original, entries, (), "float32", read)
  read = lambda name, cls: cls()
  _, low, high = build(entries, read)
  assert [each.budget["cr"] for each in (low, high)] == [2.0, 8.0] and low.checkpoint != high.checkpoint
  limits = [float(check_policy(each.model, each.policy).limit) for each in (low, high)]
  assert limits == pytest.approx([float(model.dms.levels.threshold(cr)) for cr in (2.0, 8.0)]) and limits[0] > limits[1]
  with pytest.raises(ValueError, match=r"--retrofit=16:gates: .* must lie between 2 and 8"):
    build(("16:gates",), read)
  with pytest.raises(ValueError, match=r"--retrofit=2:gates has elastic gates, .* leave --dms.cr and --dms.threshold"):
    build(entries, lambda name, cls: cls(threshold=1.0) if name == "dms" else cls())


def test_a_retrofit_under_another_cr_is_remarked(checkpoints):
  """By what its files note; those of a test note nothing."""
  folder = Path(hyperscale.__file__).parent / "results" / "reasoner"
  assert not sweep_methods.mislabelled([f"4:{folder / 'cr4'}", f"8:{checkpoints[1]}"])
  (remark,) = sweep_methods.mislabelled([f"6:{folder / 'cr4'}", f"2:{folder / 'cr2'}"])
  assert remark == f"--retrofit=6:{folder / 'cr4'} was trained for CR 4; records and tables say 6"


@pytest.mark.parametrize(
  ("name", "settings"), [("vanilla", {}), ("tova", {"budget": 12}), ("dms", {}), ("sliding", {})]
)
def test_chains_hold_what_they_share_of_their_prompt_once(checkpoints, name, settings):
  """Tokens in the pages that the chains of a prompt share, by the page table; none where a policy rewrites pages.

  Pages of one slot, so that all tokens outside the window can be shared. Those of layers that slide are not.
  """
  model = checkpoint.load_retrofitted(*map(str, checkpoints), dtype="float32")
  if name == "sliding":
    config = dataclasses.replace(OTHER_FAMILIES["gemma3"], vocab_size=257)
    model, name = tiny.model(config, tiny.dms(window=2)), "dms"
  policy = policies.get(name)(**settings)
  generator = Generator(
    model, policy=policy, width=3, max_length=64, page_size=1, eos=False, decode_block=1, tokenizer=byte_tokenizer()
  )
  ticket = generator.submit("abcdefgh" * 4, chains=3, max_new_tokens=8)
  generator.step()
  owners = np.asarray(generator.cache.table.pool.owners)
  usage = generator.results[ticket].usage[1]
  shared = write._shared(usage, generator.policy, model.config)
  assert shared == pytest.approx(np.sum(owners == 3) / usage.heads) and (shared > 0) == (name != "tova")


def test_the_sinks_of_prompt_window_are_the_prompt_of_each_request(checkpoints):
  """Each prompt's chains are those of StreamingLLM with as many sinks, which holds (prompt + L) / CR on average."""
  (_, method) = built(checkpoints, ("vanilla", "prompt_window"), (1.5,))
  job = letters(60)
  lengths = [len(prompt.tokens) for prompt in job.asked]
  group, remark = method.fitted(job, 60)
  held = [length + group.policy.window + 1 for length in lengths]
  assert remark == "" and group.numbers == {"sinks": lengths} and len(set(lengths)) == 3
  assert np.mean(held) == pytest.approx(np.mean([math.ceil((length + 60) / 1.5) for length in lengths]), abs=0.5)
  small, remark = dataclasses.replace(method, given=dataclasses.replace(method.given, cr=8.0)).fitted(job, 60)
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
    (dict(methods=()), "--methods: give at least one"),
    (dict(methods=("vanilla", "vanilla")), "--methods: vanilla is listed twice"),
    (dict(methods=("vanilla", "h3o")), r"--methods: 'h3o' is unknown; did you mean 'h2o'\? there are dms, exp"),
    (dict(methods=("promptwindow",)), "--methods: 'promptwindow' is unknown; did you mean 'prompt_window'"),
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
    (dict(methods=("vanilla",), timed_cells=-1), "--timed_cells=-1 must be 0 or more"),
    (dict(methods=("vanilla",), timed_cells=1), "--timed_cells=1 must be 2 or more, or 0 for all"),
    (dict(methods=("vanilla",), sets=("x",)), "give either --checkpoint=FOLDER"),
    (dict(checkpoint="", sets=("x",)), "--output=FOLDER is needed with --sets"),
    (dict(checkpoint="", sets=("x", "./x/"), output="y"), "--sets: x is listed twice"),
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


@pytest.mark.parametrize(("name", "most"), [("vanilla", 100), ("h2o", 250)])
def test_memory_that_is_too_small_for_a_row_is_said_with_what_fits(checkpoints, name, most):
  (method,), job = built(checkpoints, (name,)), letters(most)

  def answer(memory):
    found = run.run(job, [method], byte_tokenizer(), width=2, memory=memory)
    return [record for part in found for record in part]

  with pytest.raises(ValueError, match=r"--kv_budget_gib, with --width=2.* take \d+") as refused:
    answer(100)
  empty = int(re.search(r"take (\d+)", str(refused.value))[1])
  said = rf"^--kv_budget_gib=\S+ is too little for {name}.* on letters: 2 rows, .* fit --kv_budget_gib=(\S+)$"
  with pytest.raises(ValueError, match=said) as refused:
    answer(empty)
  gib = float(re.search(said, str(refused.value))[1])
  assert empty < gib * 2**30 and len(answer(int(gib * 2**30))) == 3 * 2


def test_a_batch_has_no_more_rows_than_a_task_has_chains(checkpoints, monkeypatch):
  (method,), job, made = built(checkpoints, ("vanilla",)), letters(3), []
  create = write.generator_of

  def stopped(*about):
    made.append(create(*about))
    raise InterruptedError  # before anything is compiled

  monkeypatch.setattr(write, "generator_of", stopped)
  with pytest.raises(InterruptedError):
    list(run.run(job, [method], byte_tokenizer(), width=10_000))
  assert [each.width for each in made] == [len(job.asked) * job.chains]


def test_a_model_without_gates_is_no_retrofit_of_a_sweep(checkpoints, tmp_path, monkeypatch):
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: cls())
  base = str(checkpoints[0])
  config = hyperscale.Config(checkpoint=base, methods=("vanilla", "dms"), retrofit=(f"8:{base}",))
  with pytest.raises(ValueError, match=f"--retrofit={base}: a model without gates, not a retrofit"):
    hyperscale.make(config, TasksConfig(("countdown",)), tmp_path, None)


def test_what_a_mesh_refuses_is_refused_at_once(monkeypatch):
  """Before the checkpoint is read: there is none."""
  settings = {MeshConfig: MeshConfig(tensor=2), TasksConfig: TasksConfig(("countdown",))}
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls])
  settings[hyperscale.Config] = hyperscale.Config("nowhere", methods=("vanilla",), timed=True, kv_budget_gib=1.0)
  with pytest.raises(ValueError, match=r"^--mesh: times are of one device: give --notimed"):
    hyperscale.main()


def test_a_mesh_gives_the_same_sweep(checkpoints, tmp_path):
  """Rows and heads over four simulated devices: the records, cells and margins of one."""
  base, retrofit = map(str, checkpoints)
  command = (
    sys.executable, "-m", "experiments.hyperscale", f"--checkpoint={base}", f"--retrofit=8:{retrofit}",
    "--methods=vanilla,dms", "--tasks=countdown", "--limit=2", "--chains=1,2", "--max_tokens=4,7",
    "--resamples=100", "--dtype=float32",
  )  # fmt: skip
  start = lambda name, *flags: subprocess.Popen(
    [*command, f"--output={tmp_path / name}", *flags], cwd=ROOT, env=on_devices(4), stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  [one, many] = finished(start("one"), start("many", "--mesh.data=2", "--mesh.tensor=2"))
  assert one[0] == many[0] == 0, one[2] + many[2]
  rows = [
    {r.key: dataclasses.replace(r, seconds=0.0) for r in records.read(tmp_path / name / cells.RECORDS)}
    for name in ("one", "many")
  ]
  assert rows[0] == rows[1] and len(rows[0]) == 2 * 2 * 2 * 2
  summaries = [json.loads((tmp_path / name / hyperscale.SUMMARY).read_text()) for name in ("one", "many")]
  assert summaries[0]["points"] == summaries[1]["points"] and summaries[0]["margins"] == summaries[1]["margins"]


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
  monkeypatch.setattr(program, "flag_values", lambda **_: {"checkpoint": base, "chains": [1, 2]})
  monkeypatch.setattr(program, "finish", finished.append)
  hyperscale.main()
  shown = capfd.readouterr()
  assert "3 methods and CRs x 2 tasks: 72 records to make (0 are there)" in shown.err
  times = cells.read_times(tmp_path / "whole" / cells.TIMES)[0.01]
  timed = [line for line in times.values() if "timed_seconds" in line]
  assert f"{len(timed)} cells to time in 0.01 GiB of cache, of 12" in shown.err and len(times) == 12 > len(timed)
  assert {line["method"] for line in timed} == {"vanilla", "dms", "prompt_window"}
  assert all(line["full"] == (line["rows"] < 6) and line["rows"] >= 2 for line in times.values())
  assert f"{12 - len(timed)} of 12 times are interpolated" in shown.err
  assert "letters, 3 problems" in shown.out
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
  assert {r.key for r in page.with_texts(tmp_path / "whole")} == {r.key for r in kept}
  assert traced[0] == traced[1] and {each.method for each in traced[0]} == {"vanilla", "dms"}  # CR 2 is not compared

  # A part of a sweep has its cells, and nothing to compare them with.
  part = tmp_path / "part"
  settings[hyperscale.Config] = dataclasses.replace(config, methods=("dms",), timed=False, output=str(part))
  hyperscale.main()
  assert finished[-1]["records_made"] == 24 and "a part of a sweep, without vanilla" in capfd.readouterr().err
  own = {key: cell for key, cell in cells.read(tmp_path / "whole")[0].cells.items() if key[1] == "dms"}
  there = cells.load(part / cells.CELLS, "sets")
  assert there.keys() == own.keys() and not (part / hyperscale.PAGE).exists()
  assert all(np.array_equal(there[key].grades, own[key].grades) for key in own)
  settings[hyperscale.Config] = hyperscale.Config(sets=(str(part),), output=str(tmp_path / "none"))
  with pytest.raises(ValueError, match="has no vanilla, over which margins are: add it to --methods"):
    hyperscale.main()

  # The cells alone, as they are kept where records are too large, and a second model seed beside them.
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for file in (cells.CELLS, cells.TIMES, "config.json", "traces.jsonl"):
      shutil.copy(tmp_path / "whole" / file, tmp_path / name / file)
  settings[hyperscale.Config] = hyperscale.Config(
    sets=(str(tmp_path / "a"), str(tmp_path / "b")), resamples=100, output=str(tmp_path / "both"), title="Both <seeds>"
  )
  with pytest.raises(ValueError, match=r"--sets: \S+/a and \S+/b are sweeps of one model, and sets are model seeds"):
    hyperscale.main()
  about = json.loads((tmp_path / "b" / "config.json").read_text())
  (tmp_path / "b" / "config.json").write_text(json.dumps({**about, "model": "another"}))
  hyperscale.main()
  both = json.loads((tmp_path / "both" / "summary.json").read_text())
  assert {(m["scale"], m["ends"]) for m in both["margins"]} == {*itertools.product(analysis.SCALES, analysis.ENDS)}
  assert [{**p, "standard_error": None, "difference_se": None} for p in both["points"]] == [
    pytest.approx({**p, "standard_error": None, "difference_se": None}) for p in whole["points"]
  ]

  # From cells alone times are measured, and nothing else is made.
  (tmp_path / "a" / cells.TIMES).unlink()
  settings[hyperscale.Config] = dataclasses.replace(config, output=str(tmp_path / "a"))
  hyperscale.main()
  again = cells.read_times(tmp_path / "a" / cells.TIMES)[0.01]
  assert again.keys() == times.keys() and all(again[key]["rows"] == times[key]["rows"] for key in times)
  assert not (tmp_path / "a" / cells.RECORDS).exists() and "records_made" not in finished[-1]
  for changes, message in (
    (dict(timed=False), "holds cells without records, to which none are added"),
    (dict(max_tokens=(5,)), "holds cells without records, and not vanilla, CR 1, L 5 on letters of these prompts"),
    (dict(dtype="bfloat16"), "holds cells of another --checkpoint or --dtype"),
  ):
    settings[hyperscale.Config] = dataclasses.replace(config, output=str(tmp_path / "a"), **changes)
    with pytest.raises(ValueError, match=message):
      hyperscale.main()

  untimed_margins = [m for m in both["margins"] if m["axis"] != "seconds"]  # frontiers over time may share no interval
  assert untimed_margins and all(len(m["seeds"]) == 2 for m in untimed_margins) and len(both["seeds"]) == 2
  html = (tmp_path / "both" / "index.html").read_text()
  parts = ('id="margins"', 'id="frontiers"', 'id="equal"', "AIME24", "right if any of W", "Written")
  for part in ("Both &lt;seeds&gt;", *parts):
    assert part in html, part
  assert "http" not in html.replace("http://www.w3.org", "") and html.count("<svg") > 6
  assert "data:image/png;base64," in html
  for name in ("margins-linear.png", "margins-log-measured.png", "frontiers-letters.png"):
    assert (tmp_path / "both" / name).read_bytes()[:4] == b"\x89PNG"

  settings[hyperscale.Config] = dataclasses.replace(config, dtype="bfloat16")
  with pytest.raises(ValueError, match="holds records of vanilla on letters made with other settings"):
    hyperscale.main()
  settings[hyperscale.Config] = config
  settings[TasksConfig] = dataclasses.replace(settings[TasksConfig], chains=(1, 3))
  with pytest.raises(ValueError, match="holds records of 2 chains at seed 42"):
    hyperscale.main()


def test_problems_of_public_files_are_swept(checkpoints, tmp_path, monkeypatch):
  """MATH-500 and GSM8K in the layout of their files, as public checkpoints are swept by flags alone."""
  maths, words = tmp_path / "math500.jsonl", tmp_path / "gsm8k.jsonl"
  maths.write_text(json.dumps({"problem": "What is $1+1$?", "solution": "s", "answer": "2"}) + "\n")
  words.write_text(json.dumps({"question": "How many 3?", "answer": "It is <<3=3>>3.\n#### 3"}) + "\n")
  given = {"math500": {"data": str(maths)}, "gsm8k_cot": {"data": str(words)}}
  config = hyperscale.Config(
    checkpoint=str(checkpoints[0]), methods=("vanilla", "tova"), cr=(2.0,), max_tokens=(6,), width=2, traces=0,
    dtype="float32", resamples=100, output=str(tmp_path / "sweep"),
  )  # fmt: skip
  chosen = TasksConfig(("math500", "gsm8k_cot"), chains=(1, 2), temperature=0.6)
  settings = {hyperscale.Config: config, TasksConfig: chosen}
  read = lambda prefix, cls: settings[cls] if cls in settings else cls(**given.get(prefix, {}))
  monkeypatch.setattr(program, "read_flags", read)
  monkeypatch.setattr(program, "flag_values", lambda **_: {"checkpoint": config.checkpoint})
  monkeypatch.setattr(program, "finish", lambda line: None)
  hyperscale.main()
  (sweep, remarks) = cells.read(tmp_path / "sweep")
  assert not remarks and {key[0] for key in sweep.cells} == {"math500", "gsm8k_cot"} and len(sweep.cells) == 4
  page_text = (tmp_path / "sweep" / "index.html").read_text()
  assert "math500" in page_text and "gsm8k_cot" in page_text


@pytest.mark.slow
def test_the_timed_batch_fills_the_memory(checkpoints, monkeypatch):
  """As many rows as hold their chains together: hardly one waits on the host, and most of the memory is used."""
  (method,) = built(checkpoints, ("vanilla",))
  job, made = letters(60, chains=(8,)), []
  found = [record for part in run.run(job, [method], byte_tokenizer(), width=8) for record in part]
  (cell,) = cells.of_records(found)[0].values()
  create = write.generator_of
  monkeypatch.setattr(timing, "generator_of", lambda *about: made.append(create(*about)) or made[-1])
  empty = create(job, method, method.fitted(job, 60)[0], byte_tokenizer(), 60, 8, None).cache
  memory = int(13.5 * timing.row_bytes(empty, cell))
  rows = timing.rows_that_fit(job, method, 60, cell, memory)
  assert rows == 13 and timing.rows_that_fit(job, method, 60, cell, 10 * memory) == 24  # all chains
  written = []
  took = timing.step_seconds(job, method, 60, rows, byte_tokenizer(), memory, written.append)
  assert took["rows"] == made[-1].width == 13 and not made[-1].waiting
  used = made[-1].cache.fixed_bytes + made[-1].peak_pages * made[-1].cache.page_bytes
  assert made[-1].preemptions <= 2 and 0.6 * memory < used <= memory
  # 39 chains and one more began, in requests of 8, and at most 13 of them have not ended.
  ended = sum(reason != "running" for result in made[-1].results.values() for reason in result.finish_reason)
  assert len(made[-1].results) == 5 and ended >= 40 - 13
  assert took["tokens"] == written[-1] > ended and took["step_seconds"] > 0
  assert np.mean([r.tokens - len(job.asked[r.prompt].tokens) + 1 for r in found]) == pytest.approx(
    timing.new_tokens(job, cell)
  )


def test_few_cells_are_timed_and_the_others_lie_between():
  """Those of the fewest and the most rows, and evenly between over log rows; a step's seconds are lines in the rows."""
  assert timing.spread([100, 25, 400, 24, 50], 3) == [3, 0, 2] and timing.spread([100, 25, 400, 24, 50], 2) == [3, 2]
  assert sorted(timing.spread([3, 1, 2], 3)) == [0, 1, 2] and timing.spread([7, 7, 7, 7], 3) == [0]
  line = [(100, 2.0), (200, 3.0), (200, 5.0)]
  assert [timing.interpolated(rows, line) for rows in (50, 100, 150, 200, 999)] == [2.0, 2.0, 3.0, 4.0, 4.0]
