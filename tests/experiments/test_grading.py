"""Grading of maths answers: what is equal, canonical forms for votes, endless work ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from experiments.grading import maths

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
  ("text", "reference"),
  [
    (r"so it is $\boxed{\frac12}$.", r"\frac{1}{2}"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"It is $\boxed{3}$. Wait, it is $\boxed{4}$.", "4"),
    (r"They are \boxed{2} and \boxed{-1}.", "-1, 2"),
    (r"\boxed{33} and later 12 apples", "33"),  # a box goes before other numbers
    (r"\boxed{033}", "33"),
    ("The answer is 1,234.", "1234"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{\left(3,\frac{\pi}{2}\right)}", r"(3, \pi/2)"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{2, -1}", r"-1,2"),
    (r"\boxed{[1,2)}", "[1,2)"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{50\%}", "50"),
  ],
)
def test_right_answers_and_their_votes(text, reference):
  assert maths.correct(text, reference)
  assert maths.answer(text) == maths.answer(f"\\boxed{{{reference}}}") is not None


@pytest.mark.parametrize(
  ("text", "reference"),
  [
    ("", "5"),
    ("I do not know.", "5"),
    (r"\boxed{}", "5"),
    ("1. First, take the 5.\n2. Then $x=5$, so 5", "5"),  # cut short
    (r"\boxed{", "5"),
    (r"\boxed{6}", "5"),
    (r"\boxed{5} or rather \boxed{6}", "5"),
    (r"\boxed{(1,2]}", "[1,2]"),
    (r"\boxed{-x}", "x"),
    (r"\boxed{\frac{1}{0}}", "5"),
    (r"\boxed{\frac{\frac{\frac}}}", "5"),
    ("\ud800\x00", "5"),  # half a character, as from a text that was cut
  ],
)
def test_wrong_answers(text, reference):
  assert not maths.correct(text, reference)
  assert maths.answer(text) != maths.answer(f"\\boxed{{{reference}}}")


def test_canonical_forms():
  shown = {
    r"\boxed{\frac{3}{4}}": "0.75", r"\boxed{204}": "204", r"\boxed{10^{20}}": "1.000000000e+20",
    r"\boxed{12345678901234567}": "12345678901234567",
    r"\boxed{\frac{1}{3}}": "0.3333333333", r"\boxed{3+4i}": "4*i + 3", r"\boxed{\{3, 1\}}": "{1, 3}",
    r"\boxed{[0, \infty)}": "[0, oo)", r"\boxed{b+a}": "a + b", r"\boxed{\text{East}}": "east",
    r"\boxed{2^{2^{40}}}": "8.057232245e+330985980541", "nothing": None,
  }  # fmt: skip
  assert {text: maths.answer(text) for text in shown} == shown
  assert maths.answer("\\boxed{\\text{" + "long" * 300 + "}}") is None


def test_answers_that_ask_for_endless_work_end(monkeypatch):
  """In a step's time, which is shorter here; the numbers are wrong, and the process goes on."""
  monkeypatch.setattr(maths, "STEP_S", 1)
  worker = maths._Worker()
  monkeypatch.setattr(maths, "_WORKER", worker)
  texts = [
    r"\boxed{10^{10^{10}}}", "The answer is 10^10^10", r"\boxed{9!!!!}", "\\boxed{" + "{" * 5000 + "}" * 5000 + "}",
    "Answer: " + "9" * 100000,
    "Answer: " + "1 " * 60000,
  ]  # fmt: skip
  try:
    assert maths.correct(r"\boxed{5}", "5")
    first = worker.process.pid
    for text in texts:
      start = time.monotonic()
      assert not maths.correct(text, "5")
      assert time.monotonic() - start < maths.LIMIT_S
    assert maths.correct(r"\boxed{5}", "5") and worker.process.pid == first
  finally:
    worker.close()


def test_a_worker_that_hangs_or_dies_is_replaced(monkeypatch):
  worker = maths._Worker()
  try:
    assert worker.ask("correct", r"\boxed{5}", "5")
    process = worker.process
    monkeypatch.setattr(maths, "LIMIT_S", 0.2)
    os.kill(process.pid, signal.SIGSTOP)  # as if no signal interrupted it
    assert worker.ask("correct", r"\boxed{5}", "5") is None and process.returncode is not None
    monkeypatch.setattr(maths, "LIMIT_S", 20.0)
    assert worker.ask("answer", r"\boxed{5}") == "5"
    monkeypatch.setattr(worker.connection, "poll", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      worker.ask("answer", r"\boxed{6}")
    assert worker.ask("answer", r"\boxed{5}") == "5"  # and not the reply to the request before
    worker.process.kill()
    assert worker.ask("answer", r"\boxed{5}") in (None, "5")  # None if it was not yet seen to be dead
    assert worker.ask("answer", r"\boxed{5}") == "5"
  finally:
    worker.close()
  assert worker.process is None


def test_threads_share_the_worker():
  found = {}

  def grade(number):
    found[number] = [maths.correct(f"\\boxed{{{number}}}", str(each)) for each in range(6)]

  threads = [threading.Thread(target=grade, args=(number,)) for number in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {number: [number == each for each in range(6)] for number in range(6)}


def test_without_math_verify(monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  with pytest.raises(ValueError, match=r"needs math-verify: pip install 'dms_jax\[maths\]'"):
    maths.check()
