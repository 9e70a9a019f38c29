"""Writes a checkpoint in a layout of PyTorch.

    python -m experiments.export_torch --checkpoint=checkpoints/smollm2-135m-instruct --retrofit=smollm2-135m-cr4 \\
      --output=export/smollm2-cr4 --dtype=bfloat16 --layout=transformers

| layout | folder |
| --- | --- |
| transformers | the dense model, as AutoModelForCausalLM loads it; gates in dms_config.json and dms_gates.safetensors |
| model_optimizer | NVIDIA Model-Optimizer's student: Qwen3, adapter tensors among the weights, shift 1 |
| nvidia_neuron | as nvidia/Qwen3-8B-DMS-8x: Qwen3, neuron gate, shift 1, settings in config.json |
| fastdms | FastDMS: Llama or Qwen3, neuron gate, shift 0, settings in dms_metadata.json |
| peft | the low-rank updates alone, for PEFT; gates beside them, as for transformers |
| dms_torch | weights, gates and a file of code, with which transformers 5 evicts: trust_remote_code=True |

All but peft merge low-rank updates into the weights. A layout that cannot hold the model refuses it and says why. The
README.md of the folder says how to load it and what it does not hold. experiments.convert_weights reads each back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dms_jax import checkpoint
from dms_jax.convert import About, export
from dms_jax.convert.api import noted_gates
from dms_jax.convert.layouts import LAYOUTS
from dms_jax.convert.writing import SHARD_BYTES
from dms_jax.json_files import is_number
from dms_jax.tokenizer import TOKENIZER_FILE, Tokenizer
from experiments.common import program
from experiments.common.files import check_retrofit


@dataclasses.dataclass(frozen=True)
class Config:
  """Input and output. `dtype`: float32, bfloat16 or float16; default the checkpoint's.

  `layout`: transformers, model_optimizer, nvidia_neuron, fastdms, peft or dms_torch. `shard_bytes`: most bytes of one
  file of weights. `cr`: the compression ratio that the gates were trained for, which some layouts note; default as the
  retrofit notes it. Gates for a range of ratios are fixed at it in the layouts that hold one ratio. `base`: name of the
  base model, which fastdms, peft and README.md note; default the hub id that the checkpoint was converted from.

  Attributes:
    cr: CR that the gates were trained for; none: as the retrofit notes it.
    base: name of the base model in the export; none: the hub id it came from.
  """

  checkpoint: str
  output: str
  retrofit: str | None = None
  layout: str = dataclasses.field(default="transformers", metadata={"choices": LAYOUTS})
  dtype: str | None = None
  overwrite: bool = False
  shard_bytes: int = SHARD_BYTES
  cr: float | None = None
  base: str | None = None


def main() -> None:
  config = program.read_flags("", Config)
  check_retrofit("retrofit", config.retrofit)
  if config.shard_bytes < 1:
    raise ValueError(f"--shard_bytes={config.shard_bytes}: must be at least 1")
  if config.cr is not None and not 1 <= config.cr < 1e6:
    raise ValueError(f"--cr={config.cr:g}: must be at least 1")
  model = checkpoint.load(config.checkpoint, retrofit=config.retrofit, merge=False, stored=True)
  holds_tokenizer = (Path(config.checkpoint) / TOKENIZER_FILE).exists()
  tokenizer = Tokenizer.load(config.checkpoint) if holds_tokenizer else None
  about = About(config.cr, config.base)
  noted = [checkpoint.read_config(path)[0]["metadata"] for path in (config.retrofit, config.checkpoint) if path]
  if about.cr is None and model.dms is not None and not model.dms.elastic:
    about = dataclasses.replace(about, cr=next((cr for values in noted if (cr := trained_ratio(values))), None))
  if about.base is None:
    about = dataclasses.replace(about, base=next((name for values in noted if (name := base_name(values))), None))
  path = export(
    config.output, model, tokenizer, layout=config.layout, dtype=config.dtype, overwrite=config.overwrite,
    shard_bytes=config.shard_bytes, about=about,
    progress=lambda done, total, name: program.log(f"  {done}/{total} files ({name})"),
  )  # fmt: skip
  files = {f.name: f.stat().st_size for f in sorted(path.iterdir())}
  program.log(f"{path / 'README.md'} says how to load it, and what this layout does not hold")
  program.finish(
    {
      "output": str(path), "layout": config.layout, "family": model.config.family,
      "gates": None if model.dms is None else model.dms.gate, "cr": about.cr, "base": about.base, "files": files,
    }
  )  # fmt: skip


def trained_ratio(metadata: Mapping[str, Any]) -> float | None:
  """The compression ratio that a checkpoint's metadata notes; None if it notes none.

  A retrofit notes the end of its ramp, a converted checkpoint what its source said.
  """
  retrofit = metadata.get("retrofit")
  settings = retrofit.get("schedule", retrofit) if isinstance(retrofit, dict) else None
  noted = [noted_gates(metadata).get("cr"), settings.get("final_cr") if isinstance(settings, dict) else None]
  return next((float(cr) for cr in noted if is_number(cr) and cr >= 1), None)


def base_name(metadata: Mapping[str, Any]) -> str | None:
  """The hub id of the base model that a converted checkpoint's metadata notes; None if it notes none."""
  names = [noted_gates(metadata).get("base"), metadata.get("base_model"), metadata.get("source")]
  is_hub_id = lambda name: isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
  return next((name for name in names if is_hub_id(name) and not Path(name).exists()), None)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="tree")
