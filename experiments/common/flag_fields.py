"""Flags made from the fields of dataclasses: their types, help from docstrings, values."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from absl import flags

from experiments.common import usage

FLAGS = flags.FLAGS
OWN: list[tuple[str, type]] = []  # (prefix, dataclass) of a program's flags
flags.disclaim_key_flags()  # flags belong to the program that calls `define_flags`, so that its --help lists them


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
  OWN.append((prefix, cls))
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in _flag_fields(cls)}
  if unknown := sorted(set(overrides) - set(fields)):
    raise TypeError(f"{cls.__name__} has no field(s) {unknown}")
  for name, field in fields.items():
    flag, annotation = _flag_name(prefix, name), hints[name]
    if dataclasses.is_dataclass(annotation):
      given = overrides.get(name, default_of(field))
      define_flags(flag, annotation, **({} if given is dataclasses.MISSING else vars(given)))
      continue
    default = overrides.get(name, default_of(field))
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


def default_of(field: dataclasses.Field) -> Any:
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flag_values(changed_only: bool = False) -> dict[str, Any]:
  """{name: value} of the running program's own flags, without those of every program."""
  own = [f for f in FLAGS.get_key_flags_for_module(sys.argv[0]) if f.name not in usage.SHARED]
  return {f.name: f.value for f in own if not changed_only or f.value != f.default}
