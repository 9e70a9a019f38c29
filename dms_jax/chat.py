"""Chat templates: Jinja in a sandbox, with what transformers provides, bounded in time and size."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import string
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

SECONDS = 2.0  # a real template takes milliseconds
CHARACTERS = 2**22  # of a text that a template makes, beyond a few times those that it is given
KEPT = 16  # times that: all texts that it makes on the way
DIGITS = 1000  # to which a number is rounded
_clock = threading.local()


class _TooMuch(Exception):
  """A template exceeds its bounds."""


def render(template: str, values: Mapping[str, Any]) -> str:
  """The text of a chat template.

  Templates come with checkpoints, so they run in a sandbox. One that runs for more than `SECONDS` or makes a text of
  more than `CHARACTERS` characters, or four times those of its variables if that is more, is stopped.

  Args:
    values: its variables, `messages` among them.

  Raises:
    ValueError: the template is no valid Jinja, refuses the messages, fails, or exceeds a bound.
  """
  try:
    compiled = _compile(template)
  except ImportError:
    raise ValueError("chat templates need jinja2: pip install jinja2") from None
  except Exception as error:  # of Jinja, or of Python, which compiles what Jinja makes of it
    raise ValueError(f"the chat template is not valid: {_line(error)}") from None
  _clock.end, parts, size = time.monotonic() + SECONDS, [], 0
  _clock.most, _clock.made = max(CHARACTERS, 4 * _size(dict(values))), 0
  try:
    for part in compiled.generate(values):
      parts.append(part)
      size += len(part)
      _check(size)
  except _TooMuch as error:
    raise ValueError(f"the chat template was stopped: {error}") from None
  except MemoryError:
    raise ValueError("the chat template was stopped: its text finds no memory") from None
  except Exception as error:  # whatever its code raises
    raise ValueError(f"the chat template refuses these messages: {_line(error)}") from None
  return "".join(parts)


def _line(error: Exception) -> str:
  """An error in one line."""
  return " ".join(str(error).split()) or type(error).__name__


def _check(size: int) -> None:
  if size > _clock.most:
    raise _TooMuch(f"it makes a text of more than {_clock.most} characters")
  if time.monotonic() > _clock.end:
    raise _TooMuch(f"it ran for {SECONDS:g} seconds")


# Bounds ---------------------------------------------------------------------------------------------------------------


def _size(value: Any, known: dict[int, int] | None = None) -> int:
  """Characters and entries of a value written out. Lists that hold one list twice count it twice, in linear time."""
  if isinstance(value, str | bytes):
    return len(value)
  if not isinstance(value, list | tuple | set | frozenset | Mapping):
    return 1
  known = {} if known is None else known
  if id(value) not in known:
    known[id(value)] = 0
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    known[id(value)] = 1 + sum(_size(part, known) for part in parts)
  return known[id(value)]


# Filters that call something for each entry, and maybe return none.
_ONE_BY_ONE = ("map", "select", "reject", "selectattr", "rejectattr", "sum", "min", "max", "unique", "groupby")


def _ticking(values: Iterable[Any]) -> Iterator[Any]:
  """The values, in as much time as there is."""
  for value in values:
    _check(0)
    yield value


def _made(value: Any) -> Any:
  """A value that a template makes, which may keep it: all of them together are bounded, too."""
  _check(_size(value))
  _clock.made += len(value) if isinstance(value, Sized) else 1
  if _clock.made > KEPT * _clock.most:
    raise _TooMuch(f"it makes texts of more than {KEPT * _clock.most} characters in all")
  return value


def _joined(*values: Any) -> str:
  """The operator ~."""
  texts = [str(value) for value in values]
  _check(sum(map(len, texts)))
  return _made("".join(texts))


def _concatenated(parts: Iterable[str]) -> str:
  """The text of a macro or a block."""
  parts = list(parts)
  _check(sum(map(len, parts)))
  return _made("".join(parts))


def _check_numbers(*values: Any) -> None:
  """Widths and counts, which decide how long a text a method or filter makes."""
  for value in values:
    if isinstance(value, int) and abs(value) > CHARACTERS:
      raise _TooMuch("it calls something with a number above what a text may hold")


def _check_format(form: Any, *values: Any) -> None:
  """A format string: the widths and precisions in it and in its values, and each value in each of its places."""
  if isinstance(form, str):
    _check_numbers(*values)
    specs = re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", form)
    with contextlib.suppress(ValueError):  # no format string for braces
      specs += [spec for _, _, spec, _ in string.Formatter().parse(form) if spec]
    numbers = [number for spec in specs for number in re.findall(r"\d+", spec)]
    if any(len(number) > 9 for number in numbers):
      raise _TooMuch("it formats with a width of more than 9 digits")
    # A width that is a value: the largest, which a list or a dictionary does not show.
    held = any(isinstance(value, list | tuple | Mapping) for value in values)
    widest = CHARACTERS if held else max((abs(value) for value in values if isinstance(value, int)), default=0)
    widths = sum(map(int, numbers)) + sum(widest for spec in specs if "*" in spec or "{" in spec)
    _check(
      len(form) + widths + max(form.count("{"), form.count("%")) * max((_size(value) for value in values), default=0)
    )


def _check_growth(name: str, value: Any, args: Sequence[Any]) -> None:
  """What the method or filter `name` makes of a value, where it may be much more than the value and its arguments."""
  texts = [arg for arg in args if isinstance(arg, str)]
  widest = max([1, *(abs(arg) for arg in args if isinstance(arg, int)), *map(_size, args)])
  if name == "replace" and isinstance(value, str) and len(texts) > 1:
    _check(len(value) + value.count(texts[0]) * len(texts[1]))
  elif name == "join":
    parts, between = (args[0] if args else (), value) if isinstance(value, str) and args else (value, "".join(texts))
    _check(_size(parts) + _size(between) * (len(parts) if isinstance(parts, Sized) else 1))
  elif name in ("batch", "slice"):
    _check(256 * widest)
  elif name == "round":
    if any(abs(arg) > DIGITS for arg in args if isinstance(arg, int)):
      raise _TooMuch(f"it rounds to more than {DIGITS} digits")
  elif name in ("expandtabs", "translate", "indent", "wordwrap", "tojson", "urlize"):
    _check(_size(value) * widest)


@functools.lru_cache(maxsize=8)
def _compile(template: str):
  """A chat template compiled with the tags, filters and functions that transformers provides."""
  import jinja2.ext
  import jinja2.nodes as nodes
  import jinja2.sandbox
  import jinja2.utils
  import jinja2.visitor

  class Generation(jinja2.ext.Extension):
    """`{% generation %} .. {% endgeneration %}` marks an assistant's text for training; the text itself stays."""

    tags = frozenset(("generation",))

    def parse(self, parser):
      line = next(parser.stream).lineno
      return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

  class Bounded(jinja2.visitor.NodeTransformer):
    """Checks the bounds at each turn of a loop, each call of a macro, each list, tuple or dictionary, and each ~."""

    def visit_For(self, node, *args, **kwargs):
      self.generic_visit(node, *args, **kwargs)
      call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
      node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
      return node

    visit_Macro = visit_For

    def visit_Concat(self, node, *args, **kwargs):
      self.generic_visit(node, *args, **kwargs)
      return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None).set_lineno(node.lineno)

    def visit_List(self, node, *args, **kwargs):
      self.generic_visit(node, *args, **kwargs)
      if getattr(node, "ctx", "load") != "load":  # names on the left of a =
        return node
      return nodes.Call(nodes.EnvironmentAttribute("made"), [node], [], None, None).set_lineno(node.lineno)

    visit_Tuple = visit_Dict = visit_List

  class Namespace(jinja2.utils.Namespace):
    """Its text is no text of what it holds, which may be itself."""

    def __repr__(self):
      return "<Namespace>"

  class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    tick = staticmethod(lambda: _check(0))
    joined = staticmethod(_joined)
    made = staticmethod(_made)
    concat = staticmethod(_concatenated)

    def call_binop(self, context, operator, left, right):
      numbers = isinstance(left, int) and isinstance(right, int)
      if operator == "+":
        _check(_size(left) + _size(right))
      elif operator == "*" and numbers:
        _check(left.bit_length() + right.bit_length())
      elif operator == "*":
        _check(_size(left) * right if isinstance(right, int) else _size(right) * left if isinstance(left, int) else 0)
      elif operator == "**" and max(abs(left), abs(right)) > 1024:
        raise _TooMuch("it takes a power of numbers above 1024")
      elif operator == "%":
        _check_format(left, *(right if isinstance(right, tuple) else [right]))
      return _made(super().call_binop(context, operator, left, right))

    def call(self, context, function, *args, **kwargs):
      name, given = getattr(function, "__name__", ""), [*args, *kwargs.values()]
      owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
      _check_numbers(*given)
      if name in ("format", "format_map"):
        _check_format(owner, *given)
      elif isinstance(owner, str):
        _check_growth(name, owner, given)
      return _made(super().call(context, function, *args, **kwargs))

  def bounded(name, function):
    marked = any(hasattr(function, kind) for kind in ("jinja_pass_arg", "contextfilter"))  # has the context first

    @functools.wraps(function)
    def call(*args, **kwargs):
      first = args[:1] if marked else ()
      value, *given = args[len(first) :]
      _check_numbers(*given, *kwargs.values())
      if name == "format":
        _check_format(value, *given, *kwargs.values())
      elif name == "join" and not isinstance(value, Sized) and isinstance(value, Iterable):
        value = list(value)
      elif name in _ONE_BY_ONE and isinstance(value, Iterable):
        value = _ticking(value)
      _check_growth(name, value, [*given, *kwargs.values()])
      return _made(function(*first, value, *given, **kwargs))

    return call

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def strftime_now(form):
    if len(form) > 1000:
      raise _TooMuch("it formats the time with more than 1,000 characters")
    return datetime.datetime.now().strftime(form)

  environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
  environment.filters = {name: bounded(name, own) for name, own in {**environment.filters, "tojson": tojson}.items()}
  del environment.globals["lipsum"]  # texts of any length
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": Namespace}
  return environment.from_string(Bounded().visit(environment.parse(template)))
