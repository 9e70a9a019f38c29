"""The one place where dms_jax chooses attention: every model and cache calls through here, into `pallas_kernels`.

`use` forces a choice for a block of code (traced functions keep the choice they were traced with).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Sequence

from pallas_kernels import decode, prefill, retrofit
from pallas_kernels.prefill import NEVER as NEVER

_choice: contextvars.ContextVar[str | Sequence[str] | None] = contextvars.ContextVar("attention", default=None)


@contextlib.contextmanager
def use(implementation: str | Sequence[str] | None):
  """Forces the implementation ("xla", ...) of every attention traced inside."""
  token = _choice.set(implementation)
  try:
    yield
  finally:
    _choice.reset(token)


def decode_attention(*args, **kwargs):
  """`pallas_kernels.decode.decode_attention`: one query a row over the live slots of a cache, its pages, or both."""
  return decode.decode_attention(*args, implementation=_choice.get(), **kwargs)


def prefill_attention(*args):
  """`pallas_kernels.prefill.prefill_attention`: a chunk of queries over keys with first and last visible position."""
  return prefill.prefill_attention(*args, implementation=_choice.get())


def retrofit_attention(*args):
  """`pallas_kernels.retrofit.retrofit_attention`: causal attention with a bias on keys beyond the window."""
  return retrofit.retrofit_attention(*args, implementation=_choice.get())
