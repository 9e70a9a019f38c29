"""Shared by all programs: flags (`flag_fields`), the run, progress, the last JSON line.

Importing a program has no side effects. It looks like this:

    @dataclasses.dataclass(frozen=True)
    class Config:                                   # the program's own flags
      text: str = ""

    def main():
      config, dms = program.read_flags("", Config), program.read_flags("dms", DMSConfig)
      ...
      program.finish({"perplexity": 23.2})     # last line: {"config": {...}, "environment": {...}, "perplexity": 23.2}

    if __name__ == "__main__":
      program.define_flags("", Config)              # --text=...
      program.define_flags("dms", DMSConfig, window=64)   # --dms.window=16, 64 where it is not given
      program.run(main)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from absl import app, flags
from absl import logging as absl_logging

from dms_jax import compilation, disk
from dms_jax.json_files import as_text
from experiments.common import early, flag_fields, heartbeat, outputs, stopping, usage
from experiments.common.flag_fields import chosen as chosen
from experiments.common.flag_fields import define_flags as define_flags
from experiments.common.flag_fields import describe as describe
from experiments.common.flag_fields import flag_types as flag_types
from experiments.common.flag_fields import flag_values as flag_values
from experiments.common.flag_fields import help_text as help_text
from experiments.common.flag_fields import parse_value as parse_value
from experiments.common.flag_fields import read_flags as read_flags
from experiments.common.flag_fields import spell as spell

FLAGS = flags.FLAGS
# Flags that decide about a device's memory.
SIZES = ("width", "rows", "batch", "retrofit.batch_size", "retrofit.seq_len")
flags.disclaim_key_flags()  # flags belong to the program that calls `define_flags`, so that its --help lists them


# ------------------------------------------------------------------------------------------------------------ run


def by_flag(message: str) -> str:
  """An error about a setting of a policy or task, "RKV: pool=4 must be odd", by its flag: "--rkv.pool=4 must be odd".

  Other messages, and those about what is no flag of this program, stay as they are.
  """
  found = re.match(r"(\w+): (give (?:either )?)?(\w+)=", message)
  if found is None or (flag := f"{found[1].lower()}.{found[3]}") not in FLAGS:
    return message
  return f"{found[2] or ''}--{flag}={message[found.end() :]}"


def out_of_memory(error: Exception) -> str | None:
  """A line for memory that the device refused, with the flags of this program that decide about it; None otherwise."""
  message = str(error)
  if not (message.startswith("RESOURCE_EXHAUSTED") and re.search(r"memory|allocat", message, re.I)):
    return None
  asked = re.search(r"(?:allocate|allocating|allocate request for) ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", message)
  flags_of_it = [f"--{name}={FLAGS[name].value}" for name in SIZES if name in FLAGS and FLAGS[name].value]
  advice = f"; give less of {', '.join(flags_of_it)}" if flags_of_it else ""
  return f"the device is out of memory{f' ({asked[1]} more were asked for)' if asked else ''}{advice}"


def run(
  main: Callable[[], None],
  writes: Literal["nothing", "folder", "file", "tree"] = "nothing",
  goes_on: bool = False,
  talks: bool = False,
) -> None:
  """Parses the command line, runs `main()` and exits: 0, or with one line on stderr 1 for bad input, a full disk or a
  device without memory, 130 after SIGINT (Ctrl-C) and 143 after SIGTERM (`stopping`).

  Every program gets `--profile=DIR` (a jax.profiler trace of the whole run), `--compiled=DIR` (where compiled programs
  are kept, by default as `dms_jax.keep_compiled` says) and `--debug` (tracebacks).

  Args:
    writes: what `--output` names, if it is given; no other run may write there meanwhile (`outputs.locked`).
    goes_on: whether the same command goes on after an interruption.
    talks: whether it is in conversation, which may pause; other programs are never silent for long (`heartbeat`).
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a text that the locale cannot write ends no run
      stream.reconfigure(errors="backslashreplace")
  flags.DEFINE_string("profile", None, "write a jax.profiler trace of the run to this folder")
  flags.DEFINE_string("compiled", compilation.FOLDER, "folder of compiled programs, kept for the next run; or none")
  flags.DEFINE_boolean("debug", False, "show the traceback of an error")
  if early.checking:
    usage.parse(sys.argv)
    if not FLAGS.debug:
      _check()
    sys.exit(early.GO_ON)

  def guarded(argv: list[str]) -> None:
    stopping.run()
    if not FLAGS["verbosity"].present:  # Orbax logs every step of a save, and a traceback of every thread that fails
      absl_logging.set_verbosity(absl_logging.WARNING if FLAGS.debug else absl_logging.FATAL)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # it lists absent accelerators
    _keep_compiled()
    try:
      with contextlib.ExitStack() as stack:
        if writes != "nothing" and FLAGS.output:
          stack.enter_context(outputs.locked("output", FLAGS.output, writes, goes_on))
        if FLAGS.profile:
          stack.enter_context(jax.profiler.trace(FLAGS.profile))
        if not talks:
          stack.enter_context(heartbeat.Heartbeat(heartbeat.line))
        main()
    except KeyboardInterrupt as stop:
      if FLAGS.debug:
        traceback.print_exc()
      log(stopping.line(stop))
      code = 128 + getattr(stop, "number", signal.SIGINT)
      if not jax.distributed.is_initialized():  # its processes end together
        stopping.leave(code)
    except Exception as error:
      memory = out_of_memory(error)
      expected = memory is not None or isinstance(
        error, ValueError | OSError | NotImplementedError | FloatingPointError
      )
      if FLAGS.debug or not (expected or outputs.is_full(error)):
        raise
      message, heartbeat.silent = memory or " ".join(str(error).split()) or type(error).__name__, False
      log(f"error: {by_flag(message)}  (--debug shows where)")
      if memory is None and outputs.is_full(
        error
      ):  # Orbax's native threads print a traceback for each write that they have not ended
        sys.stdout.flush()
        os._exit(1)
      code = 1
    else:
      code = 0
    stopping.end()
    if code:
      sys.exit(code)

  app.run(guarded, flags_parser=usage.parse)


def _check() -> None:
  """Has the dataclasses of the flags check their values, and ends the program if one refuses or a path leads nowhere.

  Those of flags with a prefix, such as policies, check them where one was given: a program may need none of them.
  """
  usage.check_paths()
  for prefix, cls in flag_fields.OWN:
    if prefix and not any(FLAGS[name].present for name in flag_types(prefix, cls)):
      continue
    try:
      read_flags(prefix, cls)
    except ValueError as error:
      usage.refuse(" ".join(str(error).split()))
    except Exception:  # a blank did not do (`early`): the program itself checks
      if not prefix:
        raise


def _keep_compiled() -> None:
  """Keeps compiled programs as `--compiled` says, and says when the first one takes long."""
  folder = FLAGS.compiled if FLAGS["compiled"].present else None
  kept = None
  if folder == "none":
    jax.config.update("jax_enable_compilation_cache", False)
  else:
    kept = compilation.keep(folder, lambda message: log(f"warning: {message}"))
  compilation.announce(kept, log)


def environment() -> dict[str, Any]:
  """Versions and the device, which affect a figure as much as the flags do."""
  device = jax.devices()[0]
  return {
    "jax": jax.__version__,
    "python": ".".join(map(str, sys.version_info[:3])),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "cpus": os.cpu_count(),
  }


# -------------------------------------------------------------------------------------------------------- results


def to_plain(value: Any) -> Any:
  """`value` as plain JSON: dataclasses, paths, tuples and arrays converted, non-finite numbers as null, UTF-8."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {str(k): to_plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple | set):
    return [to_plain(v) for v in value]
  if hasattr(value, "tolist"):  # numpy and jax, scalars too
    return to_plain(value.tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if value is None or isinstance(value, bool | int) else as_text(str(value))


def finish(result: dict[str, Any], config: Any = None) -> None:
  """Prints the run's last line, one JSON object: its config (default: the program's flags), environment and results."""
  config = flag_values() if config is None else config
  line = {"config": config, "environment": environment(), **result}
  sys.stderr.flush()
  print(json.dumps(to_plain(line)), flush=True)


def save_json(path: str | Path, value: Any) -> Path:
  """Writes `value` as indented JSON, atomically; makes the folder."""
  text = json.dumps(to_plain(value), indent=2) + "\n"
  with disk.whole(path := Path(path)) as part:
    part.write_text(text, encoding="utf-8")
  return path


def results_dir(name: str, config: Any = None, root: str | Path = "runs") -> Path:
  """The folder of one run, ROOT/NAME/CHANGED-FINGERPRINT: changed settings and a fingerprint of all.

  Args:
    config: a dataclass or dict; default the program's flags. The same config gives the same folder.
  """
  if config is None:
    whole, changed = flag_values(), flag_values(changed_only=True)
  elif dataclasses.is_dataclass(config):
    whole = vars(config)
    changed = {f.name: whole[f.name] for f in dataclasses.fields(config) if whole[f.name] != flag_fields.default_of(f)}
  else:
    whole = changed = dict(config)
  return Path(root) / name / f"{label(changed)}-{fingerprint(whole)}"


def fingerprint(values: Any) -> str:
  """A hash of `values`, eight hexadecimal digits."""
  return hashlib.sha256(json.dumps(to_plain(values), sort_keys=True).encode()).hexdigest()[:8]


def label(values: Mapping[str, Any]) -> str:
  """`values` as part of a file's name: name=value,name=value; "default" where there are none."""
  words = [
    f"{key}={Path(v).name if isinstance(v, str | Path) else spell(v)}"
    for key, v in values.items()
    if not isinstance(v, dict)
  ]
  return re.sub(r"[^A-Za-z0-9._=,+-]", "_", ",".join(words))[:80] or "default"


# ------------------------------------------------------------------------------------------------------- progress


def log(message: str) -> None:
  """Prints a line to stderr, so that stdout ends with the JSON line."""
  heartbeat.spoke(message)
  heartbeat.line(message)


def silence() -> None:
  """This process prints nothing from here on, but an error that ends it: another one of the run speaks for both."""
  heartbeat.silent = True
  sys.stdout.flush()
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)


def progress(items: Iterable | int, total: int | None = None, desc: str = "", every: float = 5.0) -> Iterator:
  """Iterates and shows progress: a tqdm bar on a terminal where tqdm is installed, else a line every `every` seconds.

  Args:
    items: what to iterate over, or a count.
    total: number of items, where `items` has no length.
  """
  items = range(items) if isinstance(items, int) else items
  total = len(items) if total is None and hasattr(items, "__len__") else total
  if sys.stderr.isatty() and not heartbeat.silent:
    with contextlib.suppress(ImportError):
      from tqdm import tqdm

      for item in tqdm(items, total=total, desc=desc, leave=False, dynamic_ncols=True):
        heartbeat.spoke(desc)
        yield item
      return
  start = shown = time.monotonic()
  for done, item in enumerate(items, start=1):
    yield item
    now = time.monotonic()
    if now - shown >= every:
      shown, rate = now, done / (now - start)
      left = f"/{total}, {(total - done) / rate:.0f} s left" if total else ""
      log(f"{desc}: {done}{left} ({rate:.3g}/s)")
