"""NVIDIA's two layouts: gates as `dms_*` keys in config.json. Token t decides about token t - 1.

Checkpoints on the hub use the neuron gate (`nvidia_neuron`); students of Model-Optimizer have an adapter, whose tensors
are among the weights (`model_optimizer`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dms_jax.config import DMSConfig
from dms_jax.convert.layouts import keys
from dms_jax.convert.layouts.keys import Gates
from dms_jax.convert.writing import NEVER, About, whole
from dms_jax.json_files import shown

ADAPTER, NEURON = "model_optimizer", "nvidia_neuron"
BLOCK = 256  # dms_paged_attention_block_size, tokens, of Model-Optimizer's config class
LEAST_WINDOW = 2  # that class asserts window > block > 0
_NAMES = {
  "window": ("dms_window_size",),
  "scale": ("dms_alpha_scale",),
  "offset": ("dms_initial_alpha_offset", "dms_alpha_offset"),
  "shift": ("dms_shift",),
  "cr": ("dms_cr",),
}
# Keys that no other project writes.
_OWN = {
  "dms_paged_attention_block_size", "dms_disable_eviction", "dms_separate_alpha", "dms_alpha_per", "dms_tau",
  "dms_manual_inference_mode", "dms_chunked_prefill", "dms_preallocate_for_tokens",
}  # fmt: skip


def read(values: dict, source: str) -> Gates | None:
  """The gates that config.json's `values` describe; None without a `dms_*` key.

  FastDMS writes the same keys for window, scale and offset, and means token t, not t - 1. Files are NVIDIA's by
  `auto_map` or by a key that only NVIDIA's code has; others have to state `dms_shift`.

  Args:
    source: name of the checkpoint, for errors.

  Raises:
    ValueError: a value cannot be read, or nothing says which token a decision is about.
  """
  if not any(name.startswith("dms_") for name in values):
    return None
  for name in ("dms_separate_alpha", "dms_disable_eviction"):
    if not isinstance(values.get(name), bool | None):
      raise ValueError(f"{source}: {name} should be true or false, found {shown(values[name])}")
  mapped = values.get("auto_map")
  is_nvidia = _OWN & set(values) or "_dms." in str(mapped)
  if not is_nvidia and values.get("dms_shift") is None:
    raise ValueError(
      f'{source}: nothing says which token a decision is about; add "dms_shift": 1 to config.json for the token before '
      '(NVIDIA\'s code), or "dms_shift": 0 for the token itself (FastDMS)'
    )
  gate, layout = ("adapter", ADAPTER) if values.get("dms_separate_alpha") else ("neuron", NEURON)
  found = keys.read(
    values, source, _NAMES, layout=layout, file="config.json", gate=gate, shift=1, window=512,
    shift_rule="NVIDIA's code decides about the token before",
  )  # fmt: skip
  if values.get("dms_disable_eviction"):
    return dataclasses.replace(found, dms=dataclasses.replace(found.dms, offset=NEVER))
  return found


def written(dms: DMSConfig, about: About) -> dict[str, Any]:
  """The keys that both layouts write, in NVIDIA's order; `dms_cr`, for documentation alone, is left out if unknown."""
  off = dms.offset == NEVER
  values: dict[str, Any] = {
    "dms_alpha_scale": dms.scale, "dms_initial_alpha_offset": 5.0 if off else dms.offset, "dms_window_size": dms.window,
  }  # fmt: skip
  if about.cr is not None:
    values["dms_cr"] = whole(about.cr)
  return values


def block_size(window: int) -> int:
  """Tokens of a page of Model-Optimizer's cache: the largest power of two below `window`, at most its default."""
  return min(BLOCK, 1 << (window - 1).bit_length() - 1)
