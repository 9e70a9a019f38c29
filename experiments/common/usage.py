"""What a program says of its flags: --help in groups, and the right spelling for a wrong flag."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import NoReturn

from absl import flags

FLAGS = flags.FLAGS
SHARED = ("profile", "compiled", "debug")  # flags of every program, which change no result
HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")
# Names that other tools give to such flags.
ELSEWHERE = {
  "model": "checkpoint", "model_path": "checkpoint", "model_name_or_path": "checkpoint", "adapter": "retrofit",
  "max_length": "max_new_tokens", "max_tokens": "max_new_tokens", "output_dir": "output", "output_path": "output",
}  # fmt: skip
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
    message = f"there is no flag --{error.flagname}{meant(error.flagname) or '; --help lists all'}"
  except flags.Error as error:
    message = re.sub(r"^flag --(\S+)=None: Flag --.* must have a value other than None\.$", _required, str(error))
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


def _required(found: re.Match) -> str:
  return f"--{found[1]} is needed: {(FLAGS[found[1]].help or '').removesuffix(' (required)')}"


def meant(name: str) -> str:
  """A question about the flags that `name` may stand for, such as "; did you mean --policy?", or nothing."""
  names = [flag.name for flag in _own()]
  wanted = name.replace("-", "_").lower()
  last = [other for other in names if other.rpartition(".")[2] == wanted]  # a setting without its prefix
  last = last or [other for other in names if other == ELSEWHERE.get(wanted)]
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
