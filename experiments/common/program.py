"""Shared by all programs: flags from config dataclasses, the run, progress, the last JSON line.

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
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from absl import app, flags
from absl import logging as absl_logging

from dms_jax import compilation, disk
from dms_jax.json_files import as_text
from experiments.common import early, heartbeat, outputs, stopping, usage

FLAGS = flags.FLAGS
_own: list[type] = []  # dataclasses of flags without a prefix
flags.disclaim_key_flags()  # flags belong to the program that calls `define_flags`, so that its --help lists them


# ---------------------------------------------------------------------------------------------------------- flags


class _Parser(flags.ArgumentParser):
  """Parses one field's annotation: str, int, float, bool, Path, Literal, tuple[X, ...] and `X | None`."""

  def __init__(self, annotation: Any, choices: Iterable[str] | None = None):
    self.annotation, self.choices = annotation, choices
    self.syntactic_help = describe(annotation) if choices is None else " | ".join(choices)

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):
      return argument
    value = parse_value(self.annotation, argument)
    if self.choices is None or value is None:
      return value
    return tuple(map(self._choice, value)) if isinstance(value, tuple) else self._choice(value)

  def _choice(self, word: str) -> str:
    """One of the choices, which may be written in any case."""
    return chosen(word, {name.lower(): name for name in self.choices or ()}, word.lower())

  def flag_type(self) -> str:
    return describe(self.annotation)


class _Serializer(flags.ArgumentSerializer):
  def serialize(self, value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _optional(annotation: Any) -> Any:
  """X for an annotation `X | None`; None for any other."""
  if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
    return None
  inner = [a for a in typing.get_args(annotation) if a is not type(None)]
  if len(inner) != 1 or len(typing.get_args(annotation)) != 2:
    raise TypeError(f"no flag can be made of {annotation}; unions other than `X | None` have no one spelling")
  return inner[0]


def describe(annotation: Any) -> str:
  """An annotation as --help shows it."""
  if inner := _optional(annotation):
    return f"{describe(inner)} or none"
  if typing.get_origin(annotation) is Literal:
    return " | ".join(map(str, typing.get_args(annotation)))
  if typing.get_origin(annotation) is tuple:
    return f"{describe(typing.get_args(annotation)[0])}, comma-separated"
  return {str: "text", Path: "path", int: "whole number", float: "number", bool: "true | false"}[annotation]


def parse_value(annotation: Any, text: str) -> Any:
  """The value of a field of this annotation, parsed from `text`.

  Raises:
    ValueError: `text` is not such a value.
  """
  if inner := _optional(annotation):
    return None if text.lower() == "none" else parse_value(inner, text)
  if typing.get_origin(annotation) is Literal:
    return chosen(text, {str(choice): choice for choice in typing.get_args(annotation)})
  if typing.get_origin(annotation) is tuple:
    item = typing.get_args(annotation)[0]
    return tuple(parse_value(item, part.strip()) for part in text.split(",") if part.strip())
  if annotation is bool:
    if text.lower() not in ("true", "false", "1", "0"):
      raise ValueError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")
  try:
    value = annotation(text)
    if value != value:  # NaN, which passes every check that it is no smaller or no larger than something
      raise ValueError
    return value
  except ValueError:
    raise ValueError(f"{text!r} is not a {describe(annotation)}") from None


def chosen(word: str, choices: Mapping[str, Any], key: str | None = None) -> Any:
  """The choice called `word`, or `key`, where choices are compared in another spelling.

  Raises:
    ValueError: there is none; the message lists all, and the closest.
  """
  key = word if key is None else key
  if key not in choices:
    raise ValueError(f"{word!r} is unknown{usage.suggestion(key, choices) or ';'} there are {', '.join(choices)}")
  return choices[key]


class Common:
  """Flags that mean the same in every program, where its own docstrings say nothing else.

  Attributes:
    checkpoint: folder of a model, as experiments.convert_weights writes it.
    retrofit: folder, or shipped name, of a retrofit of the checkpoint: gates and low-rank updates.
    dtype: type of weights and cache; none: the checkpoint's.
    text: a text file.
    output: path of the results.
    overwrite: replace what is at the output.
    seed: of all random choices.
    policy: name of an eviction policy, whose settings are flags of their own.
    cr: compression ratio (CR), tokens for each one that a head may hold.
    budget: tokens that a head may hold.
    budget_rule: budget of a CR: (prompt + most new tokens) / CR ("paper"), or seen / CR.
    window: W, tokens before the newest one that stay visible.
    batch: rows that are computed together.
    width: rows that write together.
    kv_budget_gib: most GiB of the cache of all rows; none: unlimited.
    kv_budget_tokens: most tokens that a head may hold in all rows together, outside their windows.
    page_size: slots of a page.
    chunk, prefill_chunk: prompt tokens that one compiled call reads.
    decode_block: decode steps of one compiled call.
    max_length: most tokens of a text, prompt and answer; none: the model's context.
    tokens: tokens of a text.
    new_tokens, max_new_tokens: most tokens that are written.
    temperature: of sampling; 0 is greedy.
    top_k: sample from so many likeliest tokens; none: from all.
    top_p: sample from the fewest likeliest tokens whose sum reaches it; 1 or none: from all.
    scale: "small" shrinks all cases, to try the program.
  """


def help_text(cls: type, name: str) -> str:
  """What a docstring says about the field `name` of a dataclass; "" for nothing.

  It is the field's line under "Attributes:" in the docstring of the class or of a base; else the sentences there that
  name the field in backticks; else those of the module's docstring that name the flag; else the line of `Common`.
  """
  docs = [_docstring(base.__dict__.get("__doc__")) for base in cls.__mro__[:-1]]
  lines = (found for _, lines in docs if (found := lines.get(name)))
  sentences = (found for prose, _ in docs if (found := _sentences(prose, f"`{name}`")))
  if found := next(lines, None) or next(sentences, None):
    return found.removeprefix(f"{name}: ")
  prose = re.sub(r"(?m)^ .*\n?", "", _docstring(sys.modules[cls.__module__].__doc__)[0])
  return _sentences(prose, rf"--{name}\b") or _docstring(Common.__doc__)[1].get(name, "")


def _docstring(text: str | None) -> tuple[str, dict[str, str]]:
  """(prose, {field: description}) of a docstring; a line `a, b: text` under "Attributes:" describes both fields."""
  before, _, section = inspect.cleandoc(text or "").partition("\nAttributes:\n")
  section, _, after = section.partition("\n\n")
  found: dict[str, str] = {}
  names: list[str] = []
  for line in section.split("\n"):
    if start := re.fullmatch(r"  (\w+(?:, \w+)*): (.*)", line):
      names = start[1].split(", ")
      found |= dict.fromkeys(names, start[2])
    else:
      found |= {name: f"{found[name]} {line.strip()}" for name in names}
  return f"{before}\n\n{after}", {name: _plain(said) for name, said in found.items()}


def _sentences(text: str, pattern: str) -> str:
  """The sentences of a text in which `pattern` occurs; a clause after a semicolon that names a field counts as one."""
  parts = re.split(r"(?<=\.)\s+(?=[A-Z`\"])|;\s+(?=`\w+`)|\n\n", text)
  return _plain(" ".join(part.rstrip().removesuffix(".") + "." for part in parts if re.search(pattern, part)))


def _plain(text: str) -> str:
  """A docstring's words for --help: no backticks, one line."""
  return " ".join(text.replace("`", "").split())


def define_flags(prefix: str, cls: type, **overrides: Any) -> None:
  """Defines a flag `--prefix.field` for every field of dataclass `cls`; a dataclass field adds a level to the name.

  A field with `metadata={"choices": names}` takes those names alone, in any case.

  Args:
    prefix: "" for the program's own flags.
    overrides: defaults that replace the dataclass's; a field without a default becomes a required flag.

  Raises:
    TypeError: an override names no field, or an annotation cannot be written on a command line.
  """
  usage.group(prefix, cls)
  if not prefix:
    _own.append(cls)
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in _flag_fields(cls)}
  if unknown := sorted(set(overrides) - set(fields)):
    raise TypeError(f"{cls.__name__} has no field(s) {unknown}")
  for name, field in fields.items():
    flag, annotation = _flag_name(prefix, name), hints[name]
    if dataclasses.is_dataclass(annotation):
      given = overrides.get(name, _default(field))
      define_flags(flag, annotation, **({} if given is dataclasses.MISSING else vars(given)))
      continue
    default = overrides.get(name, _default(field))
    required = default is dataclasses.MISSING
    text = (help_text(cls, name) or f"{cls.__name__}.{name}") + (" (required)" if required else "")
    default = None if required else default
    if annotation is bool:
      flags.DEFINE_boolean(flag, default, text)
    else:
      parser = _Parser(annotation, field.metadata.get("choices"))
      flags.DEFINE(parser, flag, default, text, serializer=_Serializer())
    if required:
      flags.mark_flag_as_required(flag)


def read_flags(prefix: str, cls: type, values: Mapping[str, Any] | None = None) -> Any:
  """An instance of dataclass `cls` from the flags that `define_flags(prefix, cls)` made.

  Args:
    values: the flags' values by name, instead of those on the command line.

  Raises:
    ValueError: the dataclass's own checks refuse a value.
  """
  hints, fields = typing.get_type_hints(cls), {}
  for field in _flag_fields(cls):
    flag, annotation = _flag_name(prefix, field.name), hints[field.name]
    if dataclasses.is_dataclass(annotation):
      fields[field.name] = read_flags(flag, annotation, values)
    else:
      fields[field.name] = FLAGS[flag].value if values is None else values[flag]
  return cls(**fields)


def flag_types(prefix: str, cls: type) -> dict[str, Any]:
  """{name: annotation} of the flags that `define_flags(prefix, cls)` makes."""
  hints, found = typing.get_type_hints(cls), {}
  for field in _flag_fields(cls):
    flag, annotation = _flag_name(prefix, field.name), hints[field.name]
    found |= flag_types(flag, annotation) if dataclasses.is_dataclass(annotation) else {flag: annotation}
  return found


def _flag_fields(cls: type) -> list[dataclasses.Field]:
  """The fields that are flags: all but those computed, and those marked `metadata={"flag": False}`, such as tables."""
  return [field for field in dataclasses.fields(cls) if field.init and field.metadata.get("flag", True)]


def spell(value: Any) -> str:
  """A flag's value as written on a command line."""
  return _Serializer().serialize(value)


def _flag_name(prefix: str, name: str) -> str:
  return f"{prefix}.{name}" if prefix else name


def _default(field: dataclasses.Field) -> Any:
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flag_values(changed_only: bool = False) -> dict[str, Any]:
  """{name: value} of the running program's own flags, without those of every program."""
  own = [f for f in FLAGS.get_key_flags_for_module(sys.argv[0]) if f.name not in usage.SHARED]
  return {f.name: f.value for f in own if not changed_only or f.value != f.default}


# ------------------------------------------------------------------------------------------------------------ run


def by_flag(message: str) -> str:
  """An error about a setting of a policy or task, "RKV: pool=4 must be odd", by its flag: "--rkv.pool=4 must be odd".

  Other messages, and those about what is no flag of this program, stay as they are.
  """
  found = re.match(r"(\w+): (give (?:either )?)?(\w+)=", message)
  if found is None or (flag := f"{found[1].lower()}.{found[3]}") not in FLAGS:
    return message
  return f"{found[2] or ''}--{flag}={message[found.end() :]}"


def run(
  main: Callable[[], None],
  writes: Literal["nothing", "folder", "file", "tree"] = "nothing",
  goes_on: bool = False,
  talks: bool = False,
) -> None:
  """Parses the command line, runs `main()` and exits: 0, or with one line on stderr 1 for bad input or a full disk, 130
  after SIGINT (Ctrl-C) and 143 after SIGTERM (`stopping`).

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
      expected = isinstance(error, ValueError | OSError | NotImplementedError | FloatingPointError)
      if FLAGS.debug or not (expected or outputs.is_full(error)):
        raise
      message, heartbeat.silent = " ".join(str(error).split()) or type(error).__name__, False
      log(f"error: {by_flag(message)}  (--debug shows where)")
      if outputs.is_full(error):  # Orbax's native threads print a traceback for each write that they have not ended
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
  """Has the dataclasses of the program's own flags check their values, and ends the program if one refuses."""
  for cls in _own:
    try:
      read_flags("", cls)
    except ValueError as error:
      usage.refuse(" ".join(str(error).split()))


def _keep_compiled() -> None:
  """Keeps compiled programs as `--compiled` says, and says when the first one takes long."""
  folder = FLAGS.compiled if FLAGS["compiled"].present else None
  kept = None
  if folder == "none":
    jax.config.update("jax_enable_compilation_cache", False)
  else:
    kept = compilation.keep_compiled(folder, lambda message: log(f"warning: {message}"))
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
    changed = {f.name: whole[f.name] for f in dataclasses.fields(config) if whole[f.name] != _default(f)}
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
