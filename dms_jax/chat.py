"""Chat templates: Jinja in a sandbox, with what transformers provides, bounded in time and size."""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

SECONDS = 2.0  # a real template takes milliseconds
CHARACTERS = 2**26  # of a text that a template makes, beyond those of its messages
_clock = threading.local()


class _TooMuch(Exception):
  """A template exceeds its bounds."""


def render(template: str, values: Mapping[str, Any]) -> str:
  """The text of a chat template.

  Templates come with checkpoints, so they run in a sandbox. One that runs for more than `SECONDS` or makes a text of
  more than `CHARACTERS` characters is stopped.

  Args:
    values: its variables, `messages` among them.

  Raises:
    ValueError: the template is no valid Jinja, refuses the messages, fails, or exceeds a bound.
  """
  try:
    import jinja2
  except ImportError:
    raise ValueError("chat templates need jinja2: pip install jinja2") from None
  try:
    compiled = _compile(template)
  except (jinja2.TemplateError, RecursionError) as error:
    raise ValueError(f"the chat template is not valid: {_line(error)}") from None
  _clock.end, parts, size = time.monotonic() + SECONDS, [], 0
  most = CHARACTERS + sum(len(m["content"]) for m in values["messages"] if _has_text(m))
  _clock.most = most
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


def _has_text(message: Any) -> bool:
  return isinstance(message, Mapping) and isinstance(message.get("content"), str)


def _line(error: Exception) -> str:
  """An error in one line."""
  return " ".join(str(error).split()) or type(error).__name__


def _check(size: int) -> None:
  if size > _clock.most:
    raise _TooMuch(f"it makes a text of more than {_clock.most} characters")
  if time.monotonic() > _clock.end:
    raise _TooMuch(f"it ran for {SECONDS:g} seconds")


def _joined(*values: Any) -> str:
  """The operator ~."""
  texts = [str(value) for value in values]
  _check(sum(map(len, texts)))
  return "".join(texts)


def _check_numbers(*values: Any) -> None:
  """Widths and counts, which decide how long a text a method or filter makes."""
  for value in values:
    if isinstance(value, int) and abs(value) > CHARACTERS:
      raise _TooMuch(f"it calls something with the number {value}")


def _check_format(form: Any) -> None:
  """The widths in a format string."""
  if isinstance(form, str) and (width := re.search(r"[%:][^\s\w]{0,3}\d{7,}", form)):
    raise _TooMuch(f"it formats with the width {width[0]}")


def _length(value: Any) -> int:
  return len(value) if isinstance(value, str | bytes | list | tuple) else 0


@functools.lru_cache(maxsize=8)
def _compile(template: str):
  """A chat template compiled with the tags, filters and functions that transformers provides."""
  import jinja2.ext
  import jinja2.nodes as nodes
  import jinja2.sandbox
  import jinja2.visitor

  class Generation(jinja2.ext.Extension):
    """`{% generation %} .. {% endgeneration %}` marks an assistant's text for training; the text itself stays."""

    tags = frozenset(("generation",))

    def parse(self, parser):
      line = next(parser.stream).lineno
      return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

  class Bounded(jinja2.visitor.NodeTransformer):
    """Checks the bounds at each turn of a loop, each call of a macro, and each ~."""

    def visit_For(self, node, *args, **kwargs):
      self.generic_visit(node, *args, **kwargs)
      call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
      node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
      return node

    visit_Macro = visit_For

    def visit_Concat(self, node, *args, **kwargs):
      self.generic_visit(node, *args, **kwargs)
      return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None).set_lineno(node.lineno)

  class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    tick = staticmethod(lambda: _check(0))
    joined = staticmethod(_joined)

    def call_binop(self, context, operator, left, right):
      if operator == "+":
        _check(_length(left) + _length(right))
      elif operator == "*":
        _check(max(_length(left), 1) * right if _length(left) and isinstance(right, int) else 0)
        _check(max(_length(right), 1) * left if _length(right) and isinstance(left, int) else 0)
      elif operator == "**" and max(abs(left), abs(right)) > 1024:
        raise _TooMuch(f"it takes {left} to the power of {right}")
      elif operator == "%":
        _check_format(left)
      return super().call_binop(context, operator, left, right)

    def call(self, context, function, *args, **kwargs):
      _check_numbers(*args, *kwargs.values())
      if getattr(function, "__name__", "") in ("format", "format_map"):
        _check_format(getattr(function, "__self__", None))
      return super().call(context, function, *args, **kwargs)

  def bounded(function):
    @functools.wraps(function)
    def call(value, *args, **kwargs):
      _check_numbers(*args, *kwargs.values())
      if function is formatting:
        _check_format(value)
      return function(value, *args, **kwargs)

    return call

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
  formatting = environment.filters["format"]
  environment.filters = {name: bounded(own) for name, own in environment.filters.items()}
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(Bounded().visit(environment.parse(template)))
