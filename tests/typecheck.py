"""Checks of arguments and results that the import hook adds, made as a function is first called.

jaxtyping's own decorator makes two checks of each function as it is imported, and of each function inside another in
every call of that: a quarter of the time of tests that compile little. Here those inside others are checked where they
name dimensions. Constructors of dataclasses are left alone: JAX rebuilds a pytree with whatever its leaves have become
(tracers, specs, shardings), so the annotation of a field describes it and does not bind it.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing

import jaxtyping
from beartype import beartype

DIMENSIONS = jaxtyping.jaxtyped("context")  # in it, a dimension's name means one size


def install(packages: list[str]):
  """Checks the functions of `packages`, which are not imported yet."""
  jaxtyping.jaxtyped = checked  # what the hook puts around each function and class
  jaxtyping.install_import_hook(packages, None)


def checked(function=None, *, typechecker=None):
  """`function` with its arguments and result checked against its annotations."""
  if function is None:
    return functools.partial(checked, typechecker=typechecker)
  if inspect.isclass(function) or not function.__annotations__:
    return function
  if "<locals>" in function.__qualname__ and not any('"' in str(text) for text in function.__annotations__.values()):
    return function
  check = None

  @functools.wraps(function)
  def call(*args, **kwargs):
    __tracebackhide__ = True
    nonlocal check
    if check is None:
      function.__annotations__ = {n: _type(text, function.__globals__) for n, text in function.__annotations__.items()}
      check = beartype(function)
    with DIMENSIONS:
      return check(*args, **kwargs)

  return call


def _type(text, names):
  """What an annotation means; anything, where it names what type checkers alone import."""
  holder = types.SimpleNamespace(__annotations__={"value": text})
  try:
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
  except NameError:
    return typing.Any
