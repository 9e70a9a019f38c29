"""What the layouts of an export share: weights in shards, gates, configs, README, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp

from dms_jax.config import NEVER, DMSConfig
from dms_jax.convert.safetensors_file import GATES, INDEX, WEIGHTS, write_tensors
from dms_jax.convert.tensors import Output, Progress, from_params
from dms_jax.decoder import Model
from dms_jax.families.huggingface import config_to_hf
from dms_jax.json_files import to_json
from dms_jax.params import param_table
from dms_jax.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
GENERATION, GATES_CONFIG, CARD = "generation_config.json", "dms_config.json", "README.md"
MARK = "Written by dms_jax"  # in every README.md of an export
# Of the neuron gate, in README.md.
PLAIN_NEURON = (
  "Plain transformers evicts nothing and attends with the query channel that the neuron gate borrows. DMS sets it to "
  "0, so their answers differ, even without eviction."
)


@dataclasses.dataclass(frozen=True)
class About:
  """What a layout says of a model and no parameter holds.

  Attributes:
    cr: the compression ratio that the gates were trained for; None if unknown.
    base: hub id or folder of the model that was retrofitted; None if unknown.
  """

  cr: int | float | None = None
  base: str | None = None


def refuse(layout: str, reasons: Sequence[str]) -> None:
  """Raises one ValueError that lists why the layout cannot hold the model; does nothing without a reason."""
  if reasons:
    raise ValueError(f"--layout={layout} cannot hold this model: {'; '.join(reasons)}")


def require(
  layout: str,
  model: Model,
  *,
  families: Sequence[str],
  gate: str,
  shift: int,
  granularities: Sequence[str] = ("head",),
  least_window: int = 0,
  may_be_off: bool = False,
) -> DMSConfig:
  """The gates of the model, which are DMS's own and of the given kind.

  Args:
    families: those that the layout's own code has.
    least_window: the smallest W that it takes.
    may_be_off: whether the layout can say that eviction is switched off (an offset of `config.NEVER`).

  Raises:
    ValueError: they are not, or the family is another; one line with every reason.
  """
  d = model.dms
  reasons = []
  if model.config.family not in families:
    reasons.append(f"family {model.config.family!r} (its code has {' and '.join(families)})")
  if d is None:
    reasons.append("no gates (--layout=transformers holds a model without)")
  elif d.objective != "dms":
    reasons.append(f"gates of retrofit.objective={d.objective} (--layout=transformers holds them)")
  else:
    if d.gate != gate:
      reasons.append(f"gate {d.gate!r} (it holds {gate!r})")
    if d.eviction != "delayed":
      reasons.append(f"eviction {d.eviction!r} (it means 'delayed')")
    if d.shift != shift:
      about = "the token before" if shift else "the token itself"
      why = "the logit about a token is computed from another token, so no change of weights makes them equal"
      reasons.append(f"shift {d.shift} (its decisions are about {about}, shift {shift}; {why})")
    if d.granularity not in granularities:
      reasons.append(f"granularity {d.granularity!r} (it has {' and '.join(map(repr, granularities))})")
    if d.window < least_window:
      reasons.append(f"window {d.window} (its code takes {least_window} or more)")
    if d.elastic:
      low, high = d.elastic
      reasons.append(f"gates for a range of ratios (choose one with --cr, from {low:g} to {high:g})")
    if d.offset == NEVER and not may_be_off:
      reasons.append("eviction switched off (it has no such switch)")
  refuse(layout, reasons)
  return cast(DMSConfig, d)  # None is one of the reasons


def one_ratio(model: Model, about: About) -> Model:
  """The model with gates for a range of ratios read at the one that `about` names (`Model.at`).

  Other gates are left as they are, as are those for a range if `about` names no ratio.

  Raises:
    ValueError: the ratio is outside the range.
  """
  d = model.dms
  if d is None or d.levels is None or about.cr is None:
    return model
  try:
    return model.at(about.cr, merge=False)  # the layout does that, or keeps them apart
  except ValueError as error:
    raise ValueError(f"--{error}") from None


def whole(value: int | float) -> int | float:
  """A number as JSON readers that want an integer take it, where it is one."""
  return int(value) if value == int(value) else value


def base_tensors(model: Model, dtype: str) -> list[Output]:
  """The weights without gates, under Hugging Face's names, for `write_weights`."""
  return _tensors(model, "base", dtype)


def gate_tensors(model: Model, dtype: str = "float32") -> list[Output]:
  """The gates' tensors, under NVIDIA's names; none for the neuron gate."""
  return _tensors(model, "gate", dtype)


def _tensors(model: Model, group: str, dtype: str) -> list[Output]:
  table = {n: spec for n, spec in param_table(model.config, model.dms).items() if spec.group == group}
  return list(from_params(table, model.params, jnp.dtype(dtype)))


def write_weights(
  directory: Path, tensors: Sequence[Output], shard_bytes: int, progress: Progress | None = None
) -> None:
  """Writes model.safetensors; above `shard_bytes` model-00001-of-N.safetensors and their index.

  Args:
    shard_bytes: most bytes of one file; a larger tensor gets a file of its own.
    progress: called as progress(done, total, file name).
  """
  shards: list[list[Output]] = [[]]
  free = shard_bytes
  for tensor in tensors:
    if tensor.nbytes > free and shards[-1]:
      shards.append([])
      free = shard_bytes
    shards[-1].append(tensor)
    free -= tensor.nbytes
  total = len(shards)
  numbered = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
  names = numbered if total > 1 else [WEIGHTS]
  written = 0
  for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
    written += write_tensors(directory / name, shard)
    if progress is not None:
      progress(i + 1, total, name)
  if total > 1:
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})


def write_gates(directory: Path, model: Model) -> None:
  """Writes the gates to dms_config.json and dms_gates.safetensors; nothing for a model without gates.

  The tensors are float32: they are small, and a rounded logit can flip a decision.
  """
  if model.dms is not None:
    write_json(directory / GATES_CONFIG, to_json(model.dms))
  if tensors := gate_tensors(model):
    write_tensors(directory / GATES, tensors)


def write_configs(
  directory: Path, model: Model, tokenizer: Tokenizer | None, dtype: str, **keys: Any
) -> dict[str, Any]:
  """Writes config.json with the additional `keys`, generation_config.json and the tokenizer; returns the first.

  A key whose value is `...` is left out.
  """
  values = config_to_hf(model.config, dtype)
  write_json(directory / GENERATION, {"eos_token_id": values["eos_token_id"]})
  if tokenizer is not None:
    tokenizer.save(directory)
    values["bos_token_id"] = tokenizer.bos_token_id
  values = {name: value for name, value in {**values, **keys}.items() if value is not ...}
  write_json(directory / "config.json", values)
  return values


def write_card(
  directory: Path, layout: str, model: Model, about: About, *, loading: str, missing: Sequence[str], reading: str = ""
) -> None:
  """Writes README.md: what the folder holds, how to load it, and what the layout cannot hold.

  Args:
    loading: an indented block of code, or text.
    reading: more flags of the program that reads the folder back.
    missing: a sentence for each thing that the layout cannot hold, or that its reader does otherwise than dms_jax.
  """
  d = model.dms
  gates = "none" if d is None else (
    f"{d.gate}, window {d.window}, scale {d.scale:g}, offset {d.offset:g}, shift {d.shift} (token t decides about "
    f"token t - {d.shift}), granularity {d.granularity}"
  )  # fmt: skip
  facts = {
    "family": model.config.family, "gates": gates, "base model": about.base,
    "compression ratio trained for": None if about.cr is None else f"{about.cr:g}",
  }  # fmt: skip
  listed = lambda lines: "\n".join(f"- {line}" for line in lines)
  sections = [
    f"# {layout}",
    f"{MARK} in the layout `{layout}`.",
    listed(f"{name}: {value}" for name, value in facts.items() if value is not None),
    "## Loading",
    loading.strip("\n"),
    f"`python -m experiments.convert_weights --source=THIS_FOLDER{reading} --output=CHECKPOINT` reads it back.",
    "## What this layout does not hold",
    listed(missing or ["Nothing is lost."]),
  ]
  front = "" if about.base is None else f"---\nbase_model: {about.base}\n---\n\n"  # as the Hugging Face hub reads it
  text = front + "\n\n".join(sections) + "\n"
  (directory / CARD).write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict) -> None:
  """Writes one JSON object, indented."""
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
