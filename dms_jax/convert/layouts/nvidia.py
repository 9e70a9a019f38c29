"""NVIDIA's layout: gates as `dms_*` keys in config.json, adapter tensors among the weights.

Checkpoints on the hub use the neuron gate; students of Model-Optimizer use the adapter (`dms_separate_alpha`). Token t
decides about token t - 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dms_jax.config import DMSConfig, is_number, shown

# The offset of gates that never evict (`dms_disable_eviction`): no logit is above it. The neuron's channel is still
# left out of attention, as in NVIDIA's code.
NEVER = 1e30


def gates(values: dict, source: str) -> DMSConfig | None:
  """The gates that config.json's `values` describe; None without a `dms_*` key.

  Args:
    source: name of the checkpoint, for errors.

  Raises:
    ValueError: a value cannot be read.
  """
  if not any(name.startswith("dms_") for name in values):
    return None
  for name in ("dms_separate_alpha", "dms_disable_eviction"):
    if not isinstance(values.get(name), bool | None):
      raise ValueError(f"{source}: {name} should be true or false, found {shown(values[name])}")
  gates = from_keys(values, source, "adapter" if values.get("dms_separate_alpha") else "neuron", shift=1, window=512)
  return dataclasses.replace(gates, offset=NEVER) if values.get("dms_disable_eviction") else gates


def from_keys(values: dict, source: str, gate: Literal["adapter", "neuron"], shift: int, window: int) -> DMSConfig:
  """The gates of NVIDIA's keys, with or without the prefix `dms_`.

  Args:
    window: W if the keys give none.

  Raises:
    ValueError: a value cannot be read.
  """

  def number(default: int | float, *names: str) -> Any:
    value = next((values[n] for n in names if values.get(n) is not None), default)
    if not is_number(value) or abs(value) > 1e9:
      raise ValueError(f"{source}: {names[0]} should be a number, found {shown(value)}")
    return value

  window = number(window, "dms_window_size", "window_size")
  if window != int(window):
    raise ValueError(f"{source}: dms_window_size={window} is not a whole number of tokens")
  if not (scale := number(100.0, "dms_alpha_scale", "alpha_scale")):
    raise ValueError(f"{source}: dms_alpha_scale=0: every gate would say the same")
  try:
    return DMSConfig(
      gate=gate,
      window=int(window),
      scale=float(scale),
      offset=float(number(5.0, "dms_initial_alpha_offset", "dms_alpha_offset", "alpha_offset")),
      shift=shift,
      granularity=values.get("dms_alpha_per") or "head",
    )
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None
