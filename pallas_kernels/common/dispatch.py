"""Choosing an implementation: the first that can do the case, or a named one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Expected(NotImplementedError):
  """A refusal that slows nothing down: another device than the kernel's, or a case that XLA does as well."""


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
  """Logs a message, the first time that it comes."""
  logging.getLogger("pallas_kernels").log(level, "%s", message)


def call(
  operation: str, implementations: Mapping[str, Callable], choice: str | Sequence[str] | None, *args, **kwargs
) -> Any:
  """Calls the first of `implementations` (in order, or those named by `choice`) that accepts the case.

  An implementation refuses a case with NotImplementedError and its reason; each reason is logged once. It is a warning
  if "xla" takes over from a kernel of this device, unless the refusal was `Expected`.

  Raises:
    ValueError: `choice` names an unknown implementation.
    NotImplementedError: every candidate refused; the message holds all reasons.
  """
  names = named(implementations, choice)
  unknown = [n for n in names if n not in implementations]
  if unknown:
    raise ValueError(f"{operation}: unknown implementation {unknown}; there are {list(implementations)}")
  reasons, slow = [], []
  for name in names:
    try:
      result = implementations[name](*args, **kwargs)
    except NotImplementedError as error:
      reasons.append(f"{operation}/{name}: {error}")
      log_once(reasons[-1])
      slow += [] if isinstance(error, Expected) else reasons[-1:]
      continue
    for reason in slow if name == "xla" else ():
      log_once(f"{reason}; XLA takes over, which is slower", logging.WARNING)
    return result
  raise NotImplementedError("; ".join(reasons))


def named(implementations: Mapping[str, Callable], choice: str | Sequence[str] | None) -> tuple[str, ...]:
  """The names that `choice` means, known or not; None means all."""
  return tuple(implementations) if choice is None else (choice,) if isinstance(choice, str) else tuple(choice)


def supports(dtypes: Sequence[str], **arrays: Any) -> None:
  """Raises NotImplementedError, with the reason, unless the named arrays have one dtype, and that one of `dtypes`."""
  found = [str(x.dtype) for x in arrays.values()]
  if len(set(found)) > 1 or found[0] not in dtypes:
    wanted = " or all ".join(dtypes)
    raise NotImplementedError(f"{', '.join(arrays)} must all be {wanted}, not {', '.join(found)}")


def supports_head_size(size: int, sizes: Sequence[int] = (64, 128)) -> None:
  """Raises NotImplementedError for another head size than `sizes`."""
  if size not in sizes:
    raise NotImplementedError(f"head size {size}: only {', '.join(map(str, sizes[:-1]))} and {sizes[-1]}")


def check_sinks(sinks: Any, heads: int) -> None:
  """Raises ValueError unless `sinks` is None or has one number for each of `heads` query heads."""
  check(sinks is None or sinks.shape == (heads,), f"sinks {getattr(sinks, 'shape', None)} must be [N] = {(heads,)}")


def check(condition: bool, message: str) -> None:
  """Raises ValueError(message) unless `condition`; for static shape checks."""
  if not condition:
    raise ValueError(message)
