"""Programs as processes on tiny inputs, what they leave behind, and hooks at their writes.

Equal in two outputs are: records, results and log lines but for their seconds, regardless of the order of records;
every parameter, bit by bit; all other files but for times, speeds and what describes the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.convert import export
from dms_jax.params import flatten, param_table
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import save_checkpoints, write_gsm8k

ROOT = Path(__file__).parents[2]
# What it does when it begins its write number `at`: end itself; say so; or say so and answer no signal. At 0 it
# counts its writes. Without matplotlib but for one program, because pictures take longer than these runs.
PROGRAM = """
import atexit, os, runpy, signal, sys, time
at, action, place, count, name = int(sys.argv[1]), sys.argv[2], sys.argv[3], 0, sys.argv[4]
def act():
  if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  print("at the write", flush=True)
  while action == "deaf":
    try:
      time.sleep(1)
    except BaseException:
      pass
def hook(event, args):
  global count
  opens = event == "open" and args[1] and set(str(args[1])) & set("wax")
  writes = opens or event in ("os.rename", "os.mkdir", "os.remove")
  if writes and place in str(args[0]):
    count += 1
    if count == at:
      act()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
if not at:
  atexit.register(lambda: print("writes", count, file=sys.stderr))
sys.argv = sys.argv[4:]
if "evaluate" not in name:
  sys.modules["matplotlib"] = None
sys.addaudithook(hook)
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def save_inputs(folder: Path) -> Path:
  """Fills a folder with what `command` names."""
  save_checkpoints(folder)
  text = " ".join(f"{i} and {i * i % 97} make {i + i * i % 97}." for i in range(400))
  (folder / "text.txt").write_text(text)
  asked = [{"prompt": f"say {i}", "max_new_tokens": 12 + 7 * (i % 3), "chains": 1 + i % 2, "temperature": 0.7}
           for i in range(16)]  # fmt: skip
  (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
  write_gsm8k(folder / "gsm8k.jsonl", 4)
  wide = tiny.config(vocab_size=257, num_layers=4, d_model=128, d_ff=256)
  export(folder / "hf", tiny.model(wide), byte_tokenizer())
  return folder


def command(name: str, inputs: Path, output: Path) -> list[str]:
  """The program's module and flags."""
  base, retrofit, text = f"--checkpoint={inputs / 'base'}", f"{inputs / 'retrofit'}", inputs / "text.txt"
  training = ["--retrofit.seq_len=32", "--retrofit.schedule.steps_per_cr=8", "--lora.rank=2", f"--data.paths={text}"]
  flags = {
    "retrofit": [base, *training, "--dms.window=3", "--retrofit.schedule.steps=40", "--retrofit.schedule.final_cr=3",
                 "--retrofit.saving.save_every=4", "--retrofit.saving.ema_decay=0.9"],
    "train_reasoner": [
      "--model.num_layers=1", "--model.d_model=32", "--model.d_ff=32", "--model.num_heads=2", "--model.num_kv_heads=1",
      "--model.head_dim=16", "--retrofit.batch_size=2", "--retrofit.seq_len=512", "--retrofit.schedule.steps=24",
      "--retrofit.saving.save_every=4", "--data.workers=1", "--data.families=countdown",
    ],
    "ablate": [base, *training, f"--eval.text={text}", "--eval.max_tokens=256", "--eval.length=128",
               "--sweep=dms.window=2,4 eval.threshold=0,1e4", "--retrofit.schedule.steps=12", "--eval.dtype=float32",
               "--retrofit.schedule.final_cr=2", "--retrofit.saving.save_every=4"],
    "evaluate": [base, f"--retrofit={retrofit}", "--methods=vanilla,dms,tova", "--cr=2", f"--text={text}",
                 "--text_tokens=256", "--lengths=64", "--tasks=gsm8k_cot", f"--gsm8k_cot.data={inputs / 'gsm8k.jsonl'}",
                 "--max_tokens=16", "--chains=2", "--temperature=0.8", "--dtype=float32", "--traces=1", "--width=4"],
    "hyperscale": [base, f"--retrofit=4:{retrofit}", "--methods=vanilla,dms,streamingllm", "--cr=4", "--compare_cr=4",
                   "--tasks=countdown", "--limit=4", "--max_tokens=8,16", "--chains=1,2", "--dtype=float32",
                   "--resamples=100", "--width=4"],
    "generate": [base, f"--retrofit={retrofit}", f"--requests={inputs / 'requests.jsonl'}", "--width=4",
                 "--dtype=float32"],
    "convert_weights": [f"--source={inputs / 'hf'}"],
    "self_text": [base, "--rows=12", "--batch=4", "--max_new_tokens=24", f"--prefixes={text}", "--prefix_tokens=8"],
  }[name]  # fmt: skip
  return [f"experiments.{name}", f"--output={output}", *flags]


def is_file(name: str) -> bool:
  """Whether the output of a program is a file."""
  return name in ("generate", "self_text")


def start(name: str, inputs: Path, output: Path, at: int = -1, action: str = "kill", **env: str) -> subprocess.Popen:
  """Starts a program, with more variables of the environment; see PROGRAM."""
  quick = " ".join(f"--{name}={value}".lower() for name, value in tiny.QUICK.items())
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, str(at), action, output.name, *command(name, inputs, output)], cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": quick, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def whole_run(name: str, inputs: Path, output: Path, **env: str) -> tuple[dict[str, Any], float, int]:
  """(content, seconds since it took its output, writes) of an undisturbed run."""
  process = start(name, inputs, output, at=0, **env)
  wait_for_lock(process, output)
  began = time.monotonic()
  errors = process.communicate(timeout=900)[1]
  took = time.monotonic() - began
  assert process.returncode == 0, errors
  assert not leftovers(output)
  return content(output), took, int(errors.rpartition("writes ")[2].split()[0])


def wait_for_lock(process: subprocess.Popen, output: Path) -> None:
  """Waits until a run has taken its output, or has ended."""
  locks = lambda: [output / ".lock", output.with_name(f".{output.name}.lock"), *output.glob("*/.lock")]
  while process.poll() is None and not any(path.exists() for path in locks()):
    time.sleep(0.01)


def same(output: Path, expected: dict[str, Any]) -> None:
  """Asserts that an output is as that of an undisturbed run."""
  found = content(output)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key] == value, key
  assert not leftovers(output)


# Among them the CRC of a config.json that lists Orbax's files, whose names are random.
TIMES = {"seconds", "tokens_per_s", "minutes", "environment", "speed", "date", "folder", "output", "command", "config",
         "written", "pictures", "seeds", "directory", "retrofit_crc32"}  # fmt: skip


def plain(value: Any) -> Any:
  """JSON without what may differ between two runs, in two places: seconds, the margins over them, paths."""
  if isinstance(value, dict):
    return {key: plain(each) for key, each in value.items() if key not in TIMES}
  timed = lambda each: isinstance(each, dict) and "seconds" in (each.get("cost"), each.get("axis"))
  return [plain(each) for each in value if not timed(each)] if isinstance(value, list) else value


def parameters(folder: Path) -> dict[str, tuple]:
  """Shape, type and checksum of each array of a checkpoint."""
  values, *configs = checkpoint.read_config(folder)
  table = {name: spec for name, spec in param_table(*configs).items() if spec.group in values["groups"]}
  arrays = flatten(checkpoint._read_params(folder, values, table))
  return {name: (x.shape, str(x.dtype), zlib.crc32(np.asarray(x).tobytes())) for name, x in arrays.items()}


def content(output: Path) -> dict[str, Any]:
  """What is compared of each file and checkpoint of an output."""
  found: dict[str, Any] = {}
  paths = sorted(output.rglob("*")) if output.is_dir() else [output]
  shown = lambda path: path.relative_to(output.parent).as_posix().replace(output.name, "OUTPUT", 1)
  for path in paths:
    inside = [part for part in path.parents if part.name in (checkpoint.PARAMS, "state")]
    if inside or path.name == "state" or path.suffix == ".png":
      continue
    if path.name == checkpoint.PARAMS:
      found[shown(path)] = parameters(path.parent)
    elif path.suffix == ".jsonl":
      found[shown(path)] = sorted(json.dumps(plain(json.loads(line)), sort_keys=True)
                                  for line in path.read_text(encoding="utf-8").splitlines())  # fmt: skip
    elif path.suffix == ".json":
      values = json.loads(path.read_text(encoding="utf-8"))
      if isinstance(values, dict) and "files" in values and "groups" in values:
        del values["files"]  # names and sizes of Orbax's files
      # Times, speeds and the fingerprints that hold them; the rest of a summary.
      found[shown(path)] = None if path.name == "speed.json" else plain(values)
    elif path.suffix == ".npz":
      with np.load(path) as arrays:
        found[shown(path)] = {name: arrays[name].tobytes() for name in arrays}
    else:
      found[shown(path)] = None if path.suffix in (".html", ".md") or path.is_dir() else path.read_bytes()
  return found


def leftovers(output: Path) -> list[str]:
  """Temporary files in an output and beside it."""
  near = [path for path in output.parent.iterdir() if output.name in path.name and path != output]
  hidden = [path for path in output.rglob(".*")] if output.is_dir() else []
  return [str(path) for path in near + hidden]
