"""experiments.generate: prompts, conversations from standard input, later turns, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dms_jax
from dms_jax.tokenizer import byte_tokenizer
from experiments import bench_generate, generate
from experiments.common import files
from experiments.common import requests as request_file
from tests.helpers import save_checkpoints

ROOT = Path(__file__).parents[2]
SHORT = ("--max_new_tokens=6", "--prefill_chunk=16", "--decode_block=4", "--noeos")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def run(base, *flags: str, text: str = "") -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "experiments.generate", f"--checkpoint={base[0]}", f"--retrofit={base[1]}"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [*command, *SHORT, *flags], env=env, cwd=ROOT, input=text, capture_output=True, text=True, timeout=300
  )


def test_one_prompt_a_line(base, tmp_path):
  (tmp_path / "prompts.txt").write_text("one\n\nanother one\n")
  done = run(base, f"--prompts_file={tmp_path / 'prompts.txt'}", "--samples=2", "--temperature=1", "--dms.threshold=1")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert len(result["rows"]) == 4 and result["turns"][0]["new_tokens"] == [6] * 4
  assert [row["finish_reason"] for row in result["rows"]] == ["length"] * 4
  assert result["turns"][0]["seen_tokens"] == [8, 8, 16, 16]  # bytes, and all new tokens but the last
  assert result["config"]["dms.threshold"] == 1.0


def test_a_conversation(base):
  done = run(base, "--chat", "--policy=vanilla", text="hello\nand again\n")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  first, second = (turn["seen_tokens"][0] for turn in result["turns"])
  assert len(result["rows"]) == 2 and first == 5 + 5
  assert second == first + 1 + 9 + 5  # the pending token, the second message, and its answer but for the last token
  assert result["turns"][1]["achieved_cr"] == 1.0


def test_requests_are_answered_and_taken_up_again(base, tmp_path):
  """Rows as they end; a second run asks only for what a cut-short results file lacks, and gives the same."""
  lines = [
    {"prompt": "one", "id": "a"},
    {"messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 3},
    {"prompt": "another", "chains": 2, "seed": 7, "temperature": 0.9},
  ]
  (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  flags = (f"--requests={tmp_path / 'r.jsonl'}", "--width=2", "--kv_budget_tokens=200")
  done = run(base, *flags)
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout.splitlines()[-1])
  assert (summary["requests"], summary["rows"], summary["new_tokens"]) == (3, 4, 6 + 3 + 2 * 6)
  assert summary["tokens_per_s"] > 0 and 0 < summary["peak_tokens"] and summary["peak_bytes"] <= summary["cache_bytes"]
  output = tmp_path / "r.results.jsonl"
  first = output.read_text()
  rows = {(r["id"], r["chain"]): r for r in map(json.loads, first.splitlines())}
  assert set(rows) == {("a", 0), (1, 0), (2, 0), (2, 1)} and rows[2, 0]["tokens"] != rows[2, 1]["tokens"]
  assert [rows[key]["finish_reason"] for key in rows] == ["length"] * 4
  refused = run(base, *flags, "--dms.threshold=1")  # which is not what the rows were made with
  assert refused.returncode == 1 and f"--output={output}, line 1: answers request" in refused.stderr, refused.stderr
  assert output.read_text() == first
  kept = [line for line in first.splitlines() if json.loads(line)["id"] != 2]
  output.write_text("\n".join(kept) + '\n{"id": 2, "cha')
  again = json.loads(run(base, *flags).stdout.splitlines()[-1])
  assert (again["requests_now"], again["rows_now"]) == (1, 2)
  assert {(r["id"], r["chain"]): r["tokens"] for r in map(json.loads, output.read_text().splitlines())} == {
    key: row["tokens"] for key, row in rows.items()
  }


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "r.jsonl, line 2: not valid JSON"),
    ("[]", "r.jsonl, line 2: expected a JSON object, found list"),
    ('{"promt": "x"}', "r.jsonl, line 2: unknown field 'promt'"),
    ('{"id": 3}', "r.jsonl, line 2: give either prompt or messages"),
    ('{"prompt": "x", "chains": 9}', "r.jsonl, line 2: chains=9 must lie between 1 and --width=2"),
    ('{"prompt": "x", "chains": "9"}', "r.jsonl, line 2: chains='9' has the wrong type"),
    ('{"prompt": "x", "temperature": -1}', "r.jsonl, line 2: temperature=-1 must be 0 or more"),
    ('{"prompt": "x", "seed": 4294967296}', "r.jsonl, line 2: seed=4294967296 must lie below"),
    ('{"prompt": "x", "id": 0}', "r.jsonl, line 2: id 0 is that of line 1 too"),
    ('{"messages": [{"role": "user"}]}', "r.jsonl, line 2: messages must be objects with role and content"),
  ],
)
def test_bad_requests_are_named_by_their_line(tmp_path, line, message):
  (tmp_path / "r.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
  settings = dict(max_new_tokens=4, chains=1, temperature=0.0, seed=0, width=2)
  with pytest.raises(ValueError, match=message):
    request_file.read_requests(tmp_path / "r.jsonl", None, **settings)


@pytest.mark.parametrize("text", ["dear\n", "dear", '{"id": 1, "chain": 0}\n', "[]\n"])
def test_results_of_something_else_are_left_alone(tmp_path, text):
  (tmp_path / "letter").write_text(text)
  with pytest.raises(ValueError, match=r"--output=.*letter, line 1: .*; give another --output"):
    request_file.finished_chains(tmp_path / "letter", {1: "x"})
  assert (tmp_path / "letter").read_text() == text
  with pytest.raises(ValueError, match=r"--requests=.*none: no such file"):
    request_file.read_requests(tmp_path / "none", None, max_new_tokens=4, chains=1, temperature=0.0, seed=0, width=2)


def test_a_fingerprint_is_of_all_that_decides_the_answer(tmp_path):
  def prints(line: dict, settings=(("policy", "dms"),), **defaults) -> str:
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    defaults = {"max_new_tokens": 4, "chains": 1, "temperature": 0.5, "seed": 0, "width": 2, **defaults}
    return request_file.read_requests(tmp_path / "r.jsonl", None, **defaults)[0].fingerprint(dict(settings))

  first = prints({"prompt": "x"})
  assert first == prints({"prompt": "x", "temperature": 0.5}, width=3, temperature=0.9)
  others = [
    prints({"prompt": "y"}), prints({"prompt": "x"}, seed=1), prints({"prompt": "x", "seed": 0}),
    prints({"prompt": "x"}, max_new_tokens=5), prints({"prompt": "x"}, chains=2),
    prints({"prompt": "x"}, temperature=1), prints({"prompt": "x"}, settings=[("policy", "tova")]),
    prints({"prompt": "x"}, temperature=0),
  ]  # fmt: skip
  assert len({first, *others}) == len(others) + 1
  assert others[-1] == prints({"prompt": "x"}, temperature=0, seed=1)  # greedy chains draw nothing


def test_a_line_ends_with_a_line_feed_alone(tmp_path):
  """Not where a text holds one of Unicode's other separators, and in UTF-8 whatever the locale is."""
  texts = ["one\u2028two\u0085three", "four \N{SNOWMAN}"]
  lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
  (tmp_path / "r.jsonl").write_bytes("\r\n".join(lines).encode())
  settings = dict(max_new_tokens=4, chains=1, temperature=0.0, seed=0, width=2)
  assert [r.text for r in request_file.read_requests(tmp_path / "r.jsonl", None, **settings)] == texts
  (tmp_path / "p.txt").write_bytes("\r\n\n".join(texts).encode())
  config = generate.Config(checkpoint="x", prompts_file=str(tmp_path / "p.txt"))
  assert config.prompts() == texts
  (tmp_path / "p.txt").write_text("\n".join(texts), encoding="utf-8-sig")  # as editors of Windows write it
  assert config.prompts() == texts
  (tmp_path / "p.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(ValueError, match=r"--prompts_file=.*p.txt: not UTF-8"):
    config.prompts()
  assert list(files.text_lines("x", tmp_path / "r.jsonl"))[1][0] == f"--x={tmp_path / 'r.jsonl'}, line 2"
  with pytest.raises(ValueError, match="--x=/dev/zero: a device"):  # which has no end
    files.read_text("x", "/dev/zero")


class Scripted:
  """A generator of two tickets: in its first decode block ticket 0 ends, and ticket 1 does not fit."""

  budget, busy, chains, waiting, preempted = 1000, True, [], [], []

  def __init__(self):
    self.results = {}

  def submit(self, prompt, **options):
    ticket = len(self.results)
    self.results[ticket] = dms_jax.generation.batching.Result.empty(1, text=True, heads=4)
    return ticket

  def step(self):
    self.results[0] = dms_jax.generation.batching.Result(
      [[1, 2]], [[-1.0, -2.0]], ["length"], ["ab"], [dms_jax.generation.results.ChainUsage(4)], [None], [[]]
    )
    raise dms_jax.BudgetError("too much", 1)


def test_what_ended_is_written_before_a_request_fails(tmp_path):
  (tmp_path / "r.jsonl").write_text('{"prompt": "x", "id": "small"}\n{"prompt": "y", "id": "large"}\n')
  asked = request_file.read_requests(
    tmp_path / "r.jsonl", None, max_new_tokens=4, chains=1, temperature=0.0, seed=0, width=2
  )
  output = tmp_path / "out.jsonl"
  with pytest.raises(ValueError, match=r"'large' does not fit .* 1000 bytes.*--kv_budget_gib or --kv_budget_tokens"):
    request_file.answer(Scripted(), asked, output, {})
  row = json.loads(output.read_text())
  assert (row["id"], row["tokens"], row["finish_reason"]) == ("small", [1, 2], "length")


def test_bad_input_is_one_line(base):
  done = run(base, "--prompt=x", "--policy=nonsense")
  assert (
    done.returncode == 1 and "'nonsense' is unknown; there are dmc" in done.stderr and "Traceback" not in done.stderr
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (dict(), "nothing to continue"),
    (dict(prompt="a", file="b"), "not --prompt and --file"),
    (dict(prompt="a", system="b"), "add --chat"),
    (dict(prompt="a", samples=0), "--samples=0"),
    (dict(prompt="a", kv_budget_gib=1.0), "--kv_budget_gib is for --requests"),
    (dict(prompt="a", page_format="int8"), "--page_format is for --requests"),
    (dict(prompt="a", width=2), "--width is for --requests"),
    (dict(prompt="a", seed=2**32), "--seed=4294967296 must lie between 0 and"),
    (dict(requests="a", cache="masked"), "--cache=masked does not go with --requests"),
    (dict(requests="a", cache="contiguous"), "--cache=contiguous does not go with --requests"),
    (dict(requests="a", samples=2), "--samples does not go with --requests"),
    (dict(requests="a", kv_budget_gib=1.0, kv_budget_tokens=5), "give either --kv_budget_gib or --kv_budget_tokens"),
  ],
)
def test_flags_are_checked(flags, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    generate.Config(checkpoint="x", **flags)
  with pytest.raises(ValueError, match="no such file"):
    generate.Config(checkpoint="x", file="/nowhere/at/all").prompts()
  (tmp_path / "empty").touch()
  with pytest.raises(ValueError, match=r"--prompts_file=.*empty: holds no prompt"):
    generate.Config(checkpoint="x", prompts_file=str(tmp_path / "empty")).prompts()


class Marked:
  """A chat template with marks, as SmolLM2's: every message ends with <end>."""

  eos_token_ids = (0,)
  token_bytes = staticmethod(lambda: [b"<end>"])

  @staticmethod
  def chat(messages, add_generation_prompt=True):
    text = "".join(f"<{m['role']}>{m['content']}<end>\n" for m in messages)
    return text + "<assistant>" * add_generation_prompt


def test_a_turn_is_the_template_s_text_after_the_answer():
  messages = [{"role": role, "content": role[:2]} for role in ("user", "assistant", "user")]
  whole = Marked.chat(messages)
  assert generate.next_turn(Marked, messages, ended=True) == "\n<user>us<end>\n<assistant>"
  cut = generate.next_turn(Marked, messages, ended=False)  # the answer ran out of tokens: its end is still to be said
  assert cut == "<end>\n<user>us<end>\n<assistant>" and whole.endswith("as" + cut)


def test_bench_flags_and_table():
  with pytest.raises(ValueError, match="int8"):
    bench_generate.Config(checkpoint="x", dtypes=("int8",))
  with pytest.raises(ValueError, match="--new_tokens=1"):
    bench_generate.Config(checkpoint="x", new_tokens=1)
  rows = [
    dict(dtype="float32", engine="DMS", prefill_tokens_per_s=412.3, decode_tokens_per_s=31.25, achieved_cr=3.5,
         decode_ratio=1.9),
    dict(dtype="float32", engine="transformers", prefill_tokens_per_s=450.0, decode_tokens_per_s=16.4),
  ]  # fmt: skip
  cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench_generate.table(rows).splitlines()]
  assert cells[2] == ["float32", "DMS", "412", "31.2", "3.50", "1.90"]
  assert cells[3] == ["float32", "transformers", "450", "16.4", "", ""]


def test_engines_are_measured_in_turns():
  calls = []
  engines = [(name, lambda n, name=name: calls.append((name, n)) or {"tokens": [0] * n}) for name in ("a", "b")]
  config = bench_generate.Config(checkpoint="x", new_tokens=4, repeats=2)
  results = bench_generate.measure(engines, config)
  assert calls[4:] == [("a", 1), ("a", 4), ("b", 1), ("b", 4)] * 2
  assert [r["engine"] for r in results] == ["a", "b"] and len(results[0]["tokens"]) == 4


def test_a_request_with_half_a_surrogate_pair_is_left_out(tmp_path, capsys):
  """The others keep their places, which are their ids and decide their keys."""
  lines = [{"prompt": "a"}, {"prompt": "\ud800"}, {"prompt": "c"}]
  whole = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
  arguments = dict(max_new_tokens=4, chains=1, temperature=1.0, seed=3, width=2)
  found = []
  for each in (lines, whole):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, each)))
    found.append({r.id: r for r in request_file.read_requests(tmp_path / "r.jsonl", byte_tokenizer(), **arguments)})
  assert list(found[0]) == [0, 2] and list(found[1]) == [0, 1, 2]
  assert all(found[0][i].fingerprint({}) == found[1][i].fingerprint({}) for i in (0, 2))
  assert f"--requests={tmp_path / 'r.jsonl'}, line 2: half of a surrogate pair" in capsys.readouterr().err


LOCALE = """
import sys
from pathlib import Path
from dms_jax import checkpoint, testing
from dms_jax.json_files import as_text
from dms_jax.tokenizer import Tokenizer, byte_tokenizer
from experiments.common import files, program

def main():
  folder = Path(sys.argv[0])
  checkpoint.save(folder, testing.model(testing.config(vocab_size=257)), byte_tokenizer())
  checkpoint.load(folder)
  text = files.read_text("text", folder.parent / "t.txt")
  assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode(text)) == text == as_text(sys.argv[2])
  print(text)

sys.argv[0], sys.argv[1:] = sys.argv[1], ["--", *sys.argv[2:]]
sys.argv, rest = sys.argv[:1], sys.argv
program.app.run = lambda guarded, **_: (sys.__setattr__("argv", rest), program.FLAGS(rest[:1]), guarded(rest[:1]))
program.run(main)
"""


def test_under_a_locale_without_unicode(tmp_path):
  """Files are UTF-8 there too, paths of other characters work, and what cannot be printed is escaped."""
  folder, text = tmp_path / "Größe", "Straße ☃"
  folder.mkdir()
  (folder / "t.txt").write_text(text, encoding="utf-8")
  env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", LOCALE, folder / "ours", text], env=env, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
  assert done.stdout.decode("ascii").strip() == text.encode("ascii", "backslashreplace").decode()
