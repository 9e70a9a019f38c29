"""experiments.generate: prompts, a conversation from standard input, later turns, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench_generate, generate
from tests.test_report import save_checkpoints

ROOT = Path(__file__).parent.parent
SHORT = ("--max_new_tokens=6", "--prefill_chunk=16", "--stretch=4", "--noeos")


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


def test_bad_input_is_one_line(base):
  done = run(base, "--prompt=x", "--policy=nonsense")
  assert done.returncode == 1 and "unknown policy 'nonsense'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (dict(), "nothing to continue"),
    (dict(prompt="a", file="b"), "not --prompt and --file"),
    (dict(prompt="a", system="b"), "add --chat"),
    (dict(prompt="a", samples=0), "--samples=0"),
  ],
)
def test_flags_are_checked(flags, message):
  with pytest.raises(ValueError, match=message):
    generate.Config(checkpoint="x", **flags)
  with pytest.raises(ValueError, match="no such file"):
    generate.Config(checkpoint="x", file="/nowhere/at/all").prompts()


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
  lines = bench_generate.table(rows).splitlines()
  assert lines[1].split() == ["float32", "DMS", "412", "31.2", "3.50", "1.90"]
  assert lines[2].split() == ["float32", "transformers", "450", "16.4"]


def test_engines_are_measured_in_turns():
  calls = []
  engines = [(name, lambda n, name=name: calls.append((name, n)) or {"tokens": [0] * n}) for name in ("a", "b")]
  config = bench_generate.Config(checkpoint="x", new_tokens=4, repeats=2)
  results = bench_generate.measure(engines, config)
  assert calls[4:] == [("a", 1), ("a", 4), ("b", 1), ("b", 4)] * 2
  assert [r["engine"] for r in results] == ["a", "b"] and len(results[0]["tokens"]) == 4
