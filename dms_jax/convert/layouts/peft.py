"""PEFT's layout of low-rank updates: adapter_config.json, adapter_model.safetensors; gates beside.

The gates are in files of their own, as in the layout of transformers, because servers of LoRA refuse other tensors in
adapter_model.safetensors. A folder of PEFT holds no base: it becomes a retrofit, which is loaded on top of its base.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.convert.layouts.keys import Gates
from dms_jax.convert.safetensors_file import GATES, open_tensors, write_tensors
from dms_jax.convert.tensors import Progress, Tensors, from_params, to_params
from dms_jax.convert.writing import GATES_CONFIG, PLAIN_NEURON, About, write_card, write_gates, write_json
from dms_jax.decoder import Model
from dms_jax.json_files import from_json, is_number, read_json, shown
from dms_jax.params import Params, ParamSpec, join_params, param_table
from dms_jax.tokenizer import Tokenizer

NAME = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_[AB]\.weight")
# Initialisations that change the base's weights, so that the adapter fits no public base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_LOADING = """    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("BASE_MODEL", dtype="auto")
    model = PeftModel.from_pretrained(base, "THIS_FOLDER")

For dms_jax this folder is a retrofit, which --retrofit loads on top of its base.
"""


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
  """Writes the low-rank updates for PEFT, and the gates to dms_config.json and dms_gates.safetensors in float32.

  Raises:
    ValueError: the model has no low-rank updates apart from its weights.
  """
  if model.lora is None or not model.lora.rank:
    raise ValueError(
      f"--layout={NAME} cannot hold this model: no low-rank updates apart from its weights; it takes a checkpoint "
      "and a retrofit of --retrofit.trainable=lora, not merged"
    )
  write_tensors(
    directory / WEIGHTS, list(from_params(_table(model.config, model.lora), model.params, jnp.dtype(dtype)))
  )
  write_gates(directory, model)
  write_json(directory / CONFIG, _config(model.lora, about))
  if tokenizer is not None:
    tokenizer.save(directory)
  if progress is not None:
    progress(1, 1, WEIGHTS)
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_missing(model), reading=" --base=BASE")


def own_dtype(model: Model) -> str:
  """dtype of the low-rank updates, which may differ from the base's."""
  layers = model.stacked().params["layers"]
  return next((str(value.dtype) for name, value in layers.items() if name.endswith("_lora_a")), str(model.dtype))


def is_adapter(path: Path) -> bool:
  """Whether a directory holds an adapter of PEFT and no model."""
  return (path / CONFIG).exists() and not (path / "config.json").exists()


def base_name(path: Path) -> str | None:
  """The base that the adapter in `path` names; None if it names none."""
  name = read_json(path / CONFIG).get("base_model_name_or_path")
  return name if isinstance(name, str) and name else None


def read(
  path: Path, config: ModelConfig, dtype: str | None = None, progress: Progress | None = None
) -> tuple[Model, Gates | None]:
  """The updates and gates in `path` as a model without a base's values, for `checkpoint.save` of a retrofit.

  An adapter without dms_config.json is a LoRA of any kind: it becomes a retrofit without gates.

  Args:
    config: the base's.
    dtype: dtype of the updates; default the stored. Gates keep theirs.

  Raises:
    ValueError: a file is missing or damaged, the adapter is no plain LoRA, or it does not fit the base.
  """
  tensors = _open(path)
  values, source = read_json(path / CONFIG), str(path / CONFIG)
  rank, scale, targets = _lora(values, tensors.shapes, source)
  try:
    table = _table(config, lora := LoRAConfig(rank, scale, targets))
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None
  params = to_params(table, tensors, jnp.dtype(dtype or tensors.dtype), progress=progress)
  gates, dms = None, None
  if (path / GATES_CONFIG).exists():
    dms = from_json(DMSConfig, read_json(path / GATES_CONFIG), str(path / GATES_CONFIG))
    gates = Gates(dms, NAME, GATES_CONFIG, base=base_name(path))
    params = join_params(params, _gate_params(path, config, dms))
  return Model(params, config, dms, lora), gates


def _gate_params(path: Path, config: ModelConfig, dms: DMSConfig) -> Params:
  table = {n: spec for n, spec in param_table(config, dms).items() if spec.group == "gate"}
  if not table:  # the neuron gate
    return {}
  if not (path / GATES).is_file():
    raise ValueError(f"{path}: {GATES_CONFIG} describes gates with tensors, and {GATES} is missing; fetch it again")
  tensors = open_tensors(path, [path / GATES])
  return to_params(table, tensors, jnp.float32)


def _open(path: Path) -> Tensors:
  if not (path / WEIGHTS).is_file():
    if (path / "adapter_model.bin").exists():
      raise ValueError(
        f"{path}: only adapter_model.bin: pickles can run code and are not read; load the adapter with PEFT and save "
        "it again with save_pretrained, which writes safetensors"
      )
    raise ValueError(f"{path}: {CONFIG} without {WEIGHTS}; fetch it again")
  return open_tensors(path, [path / WEIGHTS])


def _table(config: ModelConfig, lora: LoRAConfig) -> dict[str, ParamSpec]:
  """The updates' part of the parameter table, with PEFT's names."""
  table, named = param_table(config, None, lora), {}
  for path, spec in table.items():
    if spec.group == "lora":
      target, _, side = path.rpartition("_lora_")
      if sum(other.hf_name == table[target].hf_name for other in table.values()) > 1:
        fused = f"{config.family} models hold {target.removeprefix('layers/')} with others in one tensor"
        raise ValueError(f"layout {NAME}: {fused}, whose update PEFT's adapters do not divide: not supported")
      if not str(table[target].hf_name).endswith(f".{(module := target.removeprefix('layers/'))}.weight"):
        raise ValueError(f"layout {NAME}: {config.family} models have no module {module}: not supported")
      module = str(table[target].hf_name).removesuffix(".weight")
      named[path] = dataclasses.replace(spec, hf_name=f"{_PREFIX}{module}.lora_{side.upper()}.weight")
  return named


def _config(lora: LoRAConfig, about: About) -> dict[str, Any]:
  """adapter_config.json, in which alpha / r is the scale."""
  alpha = lora.scale * lora.rank
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": about.base,
    "r": lora.rank,
    "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
    "target_modules": list(lora.targets),
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_dropout": 0.0,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
  }


def _lora(values: dict, shapes: dict[str, tuple[int, ...]], source: str) -> tuple[int, float, tuple[str, ...]]:
  """(rank, scale, targets) of the updates that adapter_config.json and the tensors' names describe."""
  reasons = []
  if values.get("peft_type") != "LORA":
    reasons.append(f"peft_type {shown(values.get('peft_type'))}; supported is 'LORA'")
  if values.get("bias", "none") != "none":
    reasons.append(f"bias {shown(values['bias'])}")
  # Each of these is null, false or empty in a plain LoRA.
  for name in (
    "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication",
    "trainable_token_indices", "target_parameters", "use_qalora", "alora_invocation_tokens", "layers_to_transform",
  ):  # fmt: skip
    if values.get(name):
      reasons.append(f"{name}={shown(values[name])}")
  start = values.get("init_lora_weights")
  if isinstance(start, str) and start.startswith(_CHANGES_BASE):
    reasons.append(f"init_lora_weights={shown(start)}, which changes the base's weights, too")
  if reasons:
    raise ValueError(f"{source}: not supported: {'; '.join(reasons)}")
  rank, alpha = values.get("r"), values.get("lora_alpha", 8)
  if not is_number(rank, int) or rank < 1:
    raise ValueError(f"{source}: r should be a positive number, found {shown(rank)}")
  if not is_number(alpha):
    raise ValueError(f"{source}: lora_alpha should be a number, found {shown(alpha)}")
  found = {match[2] for name in shapes if (match := _TENSOR.fullmatch(name))}
  if not found:
    raise ValueError(f"{source}: no tensor of a LoRA of a causal model in {WEIGHTS}")
  named = values.get("target_modules")
  order = list(named) if isinstance(named, list) and found == set(map(str, named)) else _ORDER
  targets = (*(name for name in order if name in found), *sorted(found - set(order)))
  scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
  return rank, scale, targets


_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _missing(model: Model) -> list[str]:
  lost = ["The base's weights: this folder is used on top of them."]
  if model.dms is not None:
    lost.append(
      f"Eviction, for others: PEFT and servers of LoRA read the updates alone. The gates are in {GATES_CONFIG}"
      + ("" if model.dms.gate == "neuron" else f" and {GATES}")
      + ", which dms_jax reads; whoever ignores them runs the updated model with its full cache."
    )
    if model.dms.gate == "neuron":
      lost.append(PLAIN_NEURON)
  return lost
