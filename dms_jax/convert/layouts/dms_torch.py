"""The layout that evicts in PyTorch: dense weights, gates, and one file of code for transformers 5.

`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` runs modeling_dms.py of the folder, which needs
torch and transformers and no dms_jax. This package copies that file and never imports it.
"""

from __future__ import annotations

from pathlib import Path

from dms_jax.config import DMSConfig
from dms_jax.convert.layouts import transformers
from dms_jax.convert.tensors import Progress
from dms_jax.convert.writing import (
  GATES_CONFIG,
  About,
  base_tensors,
  gate_tensors,
  refuse,
  write_card,
  write_configs,
  write_json,
  write_weights,
)  # fmt: skip
from dms_jax.decoder import Model
from dms_jax.families import base
from dms_jax.json_files import to_json
from dms_jax.tokenizer import Tokenizer

NAME = "dms_torch"
_FAMILIES = ("llama", "qwen2", "qwen3")  # of modeling_dms.py
CODE = Path(__file__).with_name("modeling_dms.py")


def write(
  directory: Path,
  model: Model,
  tokenizer: Tokenizer | None,
  *,
  dtype: str,
  shard_bytes: int,
  progress: Progress | None = None,
  about: About = About(),
) -> None:
  """Writes weights and gates together, low-rank updates merged, with their settings in config.json, and the code.

  Gates are float32. dms_config.json holds them for `transformers.read`, with what the code in PyTorch does not use.

  Raises:
    ValueError: the code lacks the family, or the model has no gates, or gates whose decisions the code does not know.
  """
  family = model.config.family
  known = [] if family in _FAMILIES else [f"family {family!r} (its code has {', '.join(_FAMILIES)})"]
  refuse(NAME, known + _reasons(model.dms))
  model = model.merged()
  write_weights(directory, base_tensors(model, dtype) + gate_tensors(model), shard_bytes, progress)
  write_json(directory / GATES_CONFIG, to_json(model.dms))
  architecture = f"DMS{base.get(model.config.family).architecture}"
  write_configs(
    directory, model, tokenizer, dtype, architectures=[architecture],
    auto_map={"AutoModelForCausalLM": f"{CODE.stem}.{architecture}"}, **settings(model.dms),
  )  # fmt: skip
  (directory / CODE.name).write_bytes(CODE.read_bytes())
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_missing(model))


def settings(dms: DMSConfig) -> dict:
  """The keys of config.json that modeling_dms.py reads, under NVIDIA's names where NVIDIA has one."""
  return {
    "dms_separate_alpha": dms.gate == "adapter",
    "dms_window_size": dms.window,
    "dms_alpha_scale": dms.scale,
    "dms_initial_alpha_offset": dms.offset,
    "dms_alpha_per": dms.granularity,
    "dms_shift": dms.shift,
    "dms_threshold": float(dms.levels.threshold(dms.levels.usual)) if dms.levels else 0.0,
    "dms_disable_eviction": False,
  }


def _reasons(dms: DMSConfig | None) -> list[str]:
  """Why modeling_dms.py cannot run these gates."""
  if dms is None:
    return [f"it has no gates (pass --retrofit, or --layout={transformers.NAME})"]
  reasons = []
  if dms.objective != "dms":
    reasons.append(f"its gates were trained with retrofit.objective={dms.objective}")
  elif dms.gate not in ("adapter", "neuron"):
    reasons.append(f"dms.gate={dms.gate}")
  if dms.eviction != "delayed":
    reasons.append(f"dms.eviction={dms.eviction}")
  return reasons


_LOADING = """Needs torch and transformers 5. modeling_dms.py is the whole code; read it before you trust it.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")

Without `trust_remote_code=True`, transformers loads the dense model and evicts nothing.
"""


def _missing(model: Model) -> list[str]:
  """What the code in PyTorch does otherwise than dms_jax."""
  missing = ["Only the policy of the gates, DMS, is there, and neither kernels nor caches of fewer bits."]
  if (levels := model.dms.levels) is not None:
    ratios = sorted({levels.low, levels.usual, levels.high})
    listed = ", ".join(f"{round(float(levels.threshold(cr)), 5) + 0.0:g} for a ratio of {cr:g}" for cr in ratios)
    missing.append(f"The compression ratio is no argument; set `model.config.dms_threshold` to {listed}.")
  return missing
