"""Finds the program in a model's text, runs it and compares what it gives."""

from __future__ import annotations

import dataclasses
import decimal
import json
from collections.abc import Sequence
from typing import Any

from experiments.grading import sandbox, wire

FENCE = "```"
LEAST_BYTES = 1 << 20  # an answer may always hold; four times the right answer's if that is more


def last_block(text: str) -> str:
  """The lines between the last two lines with a fence, as LiveCodeBench's harness takes them; "" without two."""
  lines = text.split("\n")
  fences = [number for number, line in enumerate(lines) if FENCE in line]
  return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def before_fence(text: str) -> str:
  """The text before its first fence: a block that the prompt has opened."""
  return text.partition(FENCE)[0]


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of `stops` in it."""
  return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def same_output(found: str, expected: str) -> bool:
  """Whether a program printed what it should, by the rules of LiveCodeBench's harness.

  White space around the output and around lines does not count. Different lines are equal if both hold only numbers and
  these are equal as decimals.
  """
  ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
  return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(found: str, expected: str) -> bool:
  try:
    ours, theirs = ([decimal.Decimal(word) for word in line.split()] for line in (found, expected))
    return ours == theirs
  except decimal.InvalidOperation:
    return False


def prints_right(code: str, tests: Sequence[tuple[str, str]], limits: sandbox.Limits) -> bool:
  """Whether a program prints the output of each (input, output); it runs anew for each, until one is wrong.

  Raises:
    SandboxError: this machine cannot run programs safely.
  """
  for given, expected in tests:
    within = dataclasses.replace(limits, output=max(LEAST_BYTES, 4 * len(expected)))
    outcome = sandbox.run_program(code, given, within, prelude=True)
    if outcome.ended != "exit" or not same_output(outcome.stdout, expected):
      return False
  return bool(tests)


def returns_right(code: str, name: str, tests: Sequence[tuple[Sequence[Any], Any]], limits: sandbox.Limits) -> bool:
  """Whether function `name` of a program returns the value of each (arguments, value); a tuple is as good as a list.

  Raises:
    SandboxError: this machine cannot run programs safely.
  """
  caps = [max(LEAST_BYTES, 4 * len(json.dumps(value))) for _, value in tests]
  calls = [arguments for arguments, _ in tests]
  _, replies = sandbox.call_function(code, name, calls, limits, prelude=True, cap=sum(caps))
  if not tests or len(replies) != len(tests):
    return False
  try:
    for (_, expected), reply, cap in zip(tests, replies, caps, strict=True):
      value = wire.result(reply) if len(reply) <= cap else None
      if len(reply) > cap or (list(value) if isinstance(value, tuple) else value) != expected:
        return False
  except Exception:  # what the program raised, or sent instead of an answer
    return False
  return True
