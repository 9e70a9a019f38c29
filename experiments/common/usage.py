"""What a program says of its flags: --help in groups, and the right spelling for a wrong flag."""

from __future__ import annotations

import contextlib
import difflib
import glob
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from absl import flags

from dms_jax import shipped

FLAGS = flags.FLAGS
SHARED = ("profile", "compiled", "debug")  # flags of every program, which change no result
HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")
# Names that other tools give to such flags.
ELSEWHERE = {
  "model": "checkpoint", "model_path": "checkpoint", "model_name_or_path": "checkpoint", "adapter": "retrofit",
  "max_length": "max_new_tokens", "max_tokens": "max_new_tokens", "output_dir": "output", "output_path": "output",
  "lr": "learning_rate",
}  # fmt: skip
# Flags whose files and folders a program reads: each must be there, or match something.
PATHS = ("checkpoint", "text", "file", "prompts_file", "sweep_file", "data.paths", "eval.text")
_groups: dict[str, type] = {}  # of flags PREFIX.field: their dataclass


def group(prefix: str, cls: type) -> None:
  """Says that the flags `--prefix.field` are the fields of `cls`, whose docstring's first sentence heads them."""
  _groups.setdefault(prefix, cls)


def parse(arguments: list[str]) -> list[str]:
  """Sets the flags from a command line. --help prints and exits 0; a mistake prints one line and exits 1.

  Args:
    arguments: the program's name and its arguments.
  """
  ours = arguments[1 : arguments.index("--")] if "--" in arguments else arguments[1:]
  if any(word.partition("=")[0] in HELP for word in ours):
    with contextlib.suppress(BrokenPipeError):  # a reader such as head has what it wanted
      print(help_page(), flush=True)
    sys.exit(0)
  message = ""
  try:
    if rest := FLAGS(arguments)[1:]:
      message = f"unexpected argument(s) {rest}: every option is a flag, --name=value"
  except flags.UnrecognizedFlagError as error:
    message = f"there is no flag --{error.flagname}{meant(error.flagname, ours) or '; --help lists all'}"
  except flags.Error as error:
    message = re.sub(
      r"^flag --(\S+)=None: Flag --.* must have a value other than None\.$", _required, str(error).split("\n")[0]
    )  # of several, a line each, the first
    message = re.sub(r"\('Non-boolean argument to boolean flag', (.*)\)$", r"\1 is not true or false", message)
  except ValueError as error:  # --nochat=3
    message = str(error)
  if message:
    refuse(message)
  return arguments[:1]


def refuse(message: str) -> NoReturn:
  """Ends the program with one line and exit code 1."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(1)


def check_paths() -> None:
  """Ends the program where a flag of PATHS, or --retrofit, names what is not there; says what it may have meant."""
  for flag in _own():
    values = flag.value if isinstance(flag.value, tuple) else (flag.value,)
    if flag.name == "retrofit" and isinstance(flag.value, str) and not shipped.find(flag.value).exists():
      names = shipped.names()
      close = suggestion(flag.value, names) or nearby(flag.value)
      refuse(f"--retrofit={flag.value}: no such folder{close or ';'} shipped are {', '.join(names)}")
    for value in values if flag.name in PATHS else ():
      if value and not Path(value).exists() and not glob.glob(str(value), recursive=True):
        what = "no such folder" if flag.name == "checkpoint" else "nothing there"
        advice = "; experiments.convert_weights writes checkpoints" if flag.name == "checkpoint" else ""
        refuse(f"--{flag.name}={value}: {what}{nearby(str(value)) or advice}")


def nearby(path: str) -> str:
  """A question about what lies beside a path that is not there, such as "; did you mean 'notes.txt'?", or nothing."""
  with contextlib.suppress(OSError):
    beside = {each.name: each for each in Path(path).parent.iterdir()}
    if close := difflib.get_close_matches(Path(path).name, beside, n=1):
      return f"; did you mean '{beside[close[0]]}'?"
  return ""


def _required(found: re.Match) -> str:
  return f"--{found[1]} is needed: {(FLAGS[found[1]].help or '').removesuffix(' (required)')}"


def meant(name: str, arguments: Iterable[str] = ()) -> str:
  """A question about the flags that `name` may stand for, such as "; did you mean --policy?", or nothing.

  Of settings of the same name, those of a policy or task that `arguments` name: after --policy=h2o, --budget is
  --h2o.budget.
  """
  names = [flag.name for flag in _own()]
  wanted = name.replace("-", "_").lower()
  settings: dict[str, list[str]] = {}  # flags by their names without prefixes
  for flag in names:
    settings.setdefault(flag.rpartition(".")[2], []).append(flag)
  wanted = wanted if wanted in settings else ELSEWHERE.get(wanted, wanted)
  last = [wanted] if wanted in names else settings.get(wanted, [])
  if not last and not difflib.get_close_matches(wanted, names, n=1):
    last = [flag for close in difflib.get_close_matches(wanted, settings, n=1) for flag in settings[close]]
  named = {word for argument in arguments for word in re.split("[=,]", argument.lower())}
  last = [flag for flag in last if flag.partition(".")[0] in named] or last
  return suggestion(wanted, names, last, lambda word: f"--{word}")


def suggestion(word: str, there: Iterable[str], first: Iterable[str] = (), spelled: Callable[[str], str] = repr) -> str:
  """ "; did you mean 'dms'?" where `first` is not empty or one of `there` is close to `word`; else nothing."""
  found = list(first)[:2] or difflib.get_close_matches(word, list(there), n=1)
  return f"; did you mean {' or '.join(map(spelled, found))}?" if found else ""


def _own() -> list[flags.Flag]:
  return [flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0]) if flag.name not in HELP]


def help_page() -> str:
  """The program's docstring, and its flags in groups, each with its default."""
  width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 120)
  flags_of: dict[str, list[flags.Flag]] = {"": [], **{prefix: [] for prefix in _groups}}
  for flag in _own():
    flags_of.setdefault(flag.name.rpartition(".")[0], []).append(flag)
  page = [_wrapped((sys.modules["__main__"].__doc__ or "").strip(), width), ""]
  for prefix, members in flags_of.items():
    if members:
      lines = [line for flag in sorted(members, key=_order) for line in _lines(flag, width)]
      page += [*_filled(_heading(prefix), width), *lines, ""]
  return "\n".join(page[:-1])


def _wrapped(text: str, width: int) -> str:
  """Paragraphs no wider than `width`; those with a table or with indented lines, commands, stay as they are."""
  parts = text.split("\n\n")
  kept = lambda part: any(line[:1] in (" ", "|") for line in part.split("\n"))
  return "\n\n".join(part if kept(part) else "\n".join(_filled(part, width)) for part in parts)


def _filled(text: str, width: int, **indents: str) -> list[str]:
  return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False, **indents)


def _order(flag: flags.Flag) -> tuple[bool, bool]:
  """The required ones first, then as defined; those of every program last."""
  return flag.name in SHARED, not (flag.help or "").endswith("(required)")


def _heading(prefix: str) -> str:
  if not prefix:
    return "Flags, as --name=value:"
  cls = _groups.get(prefix)
  said = inspect.cleandoc(cls.__doc__ or "") if cls is not None else ""
  if re.match(r"`\w+`:", said):  # of fields alone: what it is stands above the class
    said = sys.modules[cls.__module__].__doc__ or ""
  sentence = re.split(r"(?<=[.:])\s+(?=[A-Z`])", said.partition("\n\n")[0], maxsplit=1)[0].rstrip(".:")
  return f"{prefix}: {' '.join(sentence.replace('`', '').split())}"


def _lines(flag: flags.Flag, width: int) -> list[str]:
  """--name=default, what it is, and what it may be where that is a choice."""
  text, kind = re.sub(r"\s+", " ", flag.help or ""), flag.parser.syntactic_help or ""
  text = re.sub(r"\b(None|True|False)\b", lambda found: found[0].lower(), text)  # as they are typed
  if text.endswith("(required)"):
    name = f"--{flag.name}=..."
  else:
    default = flag.default
    if default is None or isinstance(default, bool):
      spelled = str(default).lower()
    else:
      spelled = flag.serializer.serialize(default) if flag.serializer else str(default)
    spelled = spelled.replace("\n", "\\n")
    name = f"--{flag.name}={spelled}"
  text += f" ({kind})" if " | " in kind else ""
  column = 34
  first = f"  {name:<{column - 2}} " if len(name) < column - 2 else f"  {name}  "
  return _filled(text, width, initial_indent=first, subsequent_indent=" " * (column + 1))
