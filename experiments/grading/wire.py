"""Python values and calls as JSON lines between a program and its judge, without pickle.

None, bool, int, float, str and list are JSON's own; any other kind is an object with one key, its name. What arrives is
always of Python's own types: a subclass with another `==` does not survive the way.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import json
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

MOST_BYTES = 16 << 20  # of one line
MOST_DIGITS = 50_000  # of a number written in decimal, as in LiveCodeBench's harness
MOST_ITEMS = 1_000_000  # of an iterator that a call returns
MOST_ALIKE = 100  # items of one hash in a set or dict, whose time grows with their square
TYPES = {"tuple": tuple, "set": set, "frozenset": frozenset}


class WireError(Exception):
  """A line that is no value, or a value that has no line."""


def encode(value: Any) -> Any:
  """`value` as JSON's types.

  Raises:
    WireError: a type that is not one of Python's containers or numbers, or one of numpy's scalars.
  """
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, list):
    return [encode(item) for item in value]
  for name, kind in TYPES.items():
    if isinstance(value, kind):
      return {name: [encode(item) for item in value]}
  if isinstance(value, Mapping):
    return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
  if isinstance(value, bytes | bytearray):
    return {"bytes": value.hex()}
  if isinstance(value, complex):
    return {"complex": [value.real, value.imag]}
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real) or (type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()):
    return encode(value.item()) if hasattr(value, "item") else float(value)
  if isinstance(value, Iterator):
    items = []
    for item in value:
      items.append(encode(item))
      if len(items) > MOST_ITEMS:
        raise WireError(f"an iterator of more than {MOST_ITEMS} items")
    return {"iterator": items}
  raise WireError(f"a {type(value).__name__} cannot be compared from outside")


def decode(value: Any) -> Any:
  """The inverse of `encode`; raises WireError for anything that `encode` does not give."""
  if isinstance(value, list):
    return [decode(item) for item in value]
  if not isinstance(value, dict):
    return value
  try:
    ((name, inner),) = value.items()
    if name in TYPES:
      items = decode(inner)
      return TYPES[name](items if name == "tuple" else _spread(items))
    if name == "dict":
      keys = _spread([decode(key) for key, _ in inner])
      return dict(zip(keys, (decode(item) for _, item in inner), strict=True))
    if name == "bytes":
      return bytes.fromhex(inner)
    if name == "complex":
      return complex(*inner)
    if name == "iterator":
      return iter(decode(inner))
  except (TypeError, ValueError) as error:
    raise WireError(f"not a value: {error}") from None
  raise WireError(f"not a value: {name!r}")


def _spread(items: Sequence[Any]) -> Sequence[Any]:
  """`items`, unless so many have one hash that a set of them would keep its reader busy; then raises WireError."""
  if max(collections.Counter(map(hash, items)).values(), default=0) > MOST_ALIKE:
    raise WireError("a set or dict of items that were made to collide")
  return items


def dumps(value: Any) -> bytes:
  """One line."""
  return json.dumps(encode(value)).encode() + b"\n"


def loads(line: bytes) -> Any:
  """The value of one line; raises WireError if it is none, was cut short, or is nested too deeply."""
  if not line.endswith(b"\n"):
    raise WireError("the program ended without an answer" if not line else "an answer that was cut short")
  try:
    return decode(json.loads(line))
  except (ValueError, RecursionError) as error:
    raise WireError(f"not a value: {type(error).__name__}") from None


def answers(requests: BinaryIO, replies: BinaryIO, find: Callable[[str], Callable]) -> None:
  """Answers each call of `requests`, a line (name, arguments), with ("returned", value) or ("raised", name, text)."""
  for line in requests:
    name, arguments = loads(line)
    try:
      reply = dumps(("returned", find(name)(*arguments)))
    except BaseException as error:  # a program may raise anything, SystemExit included
      reply = dumps(("raised", type(error).__name__, str(error)[:300]))
    replies.write(reply)
    replies.flush()


def result(line: bytes) -> Any:
  """The value that a reply's call returned.

  Raises:
    WireError: no such line.
    Exception: what the call raised, if it is a class of Python's own; else RuntimeError.
  """
  match loads(line):
    case ("returned", value):
      return value
    case ("raised", str(name), str(text)):
      raise _raised(name, text)
  raise WireError("not an answer")


def _raised(name: str, text: str) -> Exception:
  kind = getattr(builtins, name, None)
  ends = StopIteration, StopAsyncIteration  # raised within a loop of the tests they would end it, as if all were right
  if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
    with contextlib.suppress(TypeError):  # some need more than a text
      return kind(text)
  return RuntimeError(f"{name}: {text}")
