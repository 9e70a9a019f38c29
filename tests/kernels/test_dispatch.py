"""Dispatch: the first able implementation; one warning where XLA takes over from a kernel."""

from __future__ import annotations

import logging

import pytest

from pallas_kernels.common import dispatch


def refusing(error: Exception):
  def implementation():
    raise error

  return implementation


def warnings_of(caplog, implementations, choice=None) -> list[str]:
  dispatch.log_once.cache_clear()
  with caplog.at_level(logging.INFO, "pallas_kernels"):
    caplog.clear()
    assert [dispatch.call("decode", implementations, choice) for _ in range(2)] == ["done"] * 2
  return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_slow_fallback_warns_once(caplog):
  slow, other = refusing(NotImplementedError("head size 7")), refusing(dispatch.Expected("needs a TPU"))
  done = lambda: "done"
  assert warnings_of(caplog, {"gpu": slow, "tpu": other, "xla": done}) == [
    "decode/gpu: head size 7; XLA takes over, which is slower"
  ]
  assert len(caplog.records) == 3  # both refusals too, for those who read them
  assert warnings_of(caplog, {"tpu": other, "xla": done}) == []
  assert warnings_of(caplog, {"gpu": slow, "tpu": done, "xla": done}) == []  # another kernel
  assert warnings_of(caplog, {"gpu": slow, "xla": done}, "xla") == []  # as chosen


def test_all_reasons_are_given():
  with pytest.raises(NotImplementedError, match=r"decode/gpu: head size 7; decode/tpu: needs a TPU"):
    implementations = {"gpu": NotImplementedError("head size 7"), "tpu": dispatch.Expected("needs a TPU")}
    dispatch.call("decode", {name: refusing(error) for name, error in implementations.items()}, None)


def test_a_head_size_is_one_of_the_kernels_sizes():
  dispatch.supports_head_size(256, (64, 128, 256))
  with pytest.raises(NotImplementedError, match="head size 256: only 64 and 128"):
    dispatch.supports_head_size(256)
  with pytest.raises(NotImplementedError, match="head size 32: only 64, 128 and 256"):
    dispatch.supports_head_size(32, (64, 128, 256))
