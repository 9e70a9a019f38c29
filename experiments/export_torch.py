"""Writes a checkpoint as a Hugging Face directory that transformers loads.

    python -m experiments.export_torch --checkpoint=checkpoints/smollm2-135m-instruct --retrofit=retrofits/cr4 \\
      --output=export/smollm2-cr4 --dtype=bfloat16

Low-rank updates are merged. Gates are written to separate files, which plain transformers ignores: dms_config.json, and
dms_gates.safetensors for the adapter. experiments.convert_weights reads the directory back, with its gates.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dms_jax import checkpoint
from dms_jax.convert import export
from dms_jax.tokenizer import TOKENIZER_FILE, Tokenizer
from experiments.common import program
from experiments.common.files import check_retrofit


@dataclasses.dataclass(frozen=True)
class Config:
  """Input and output. `dtype`: float32, bfloat16 or float16; default the checkpoint's."""

  checkpoint: str
  output: str
  retrofit: str | None = None
  dtype: str | None = None
  overwrite: bool = False


def main() -> None:
  config = program.read_flags("", Config)
  check_retrofit("retrofit", config.retrofit)
  model = checkpoint.load(config.checkpoint, retrofit=config.retrofit)
  holds_tokenizer = (Path(config.checkpoint) / TOKENIZER_FILE).exists()
  tokenizer = Tokenizer.load(config.checkpoint) if holds_tokenizer else None
  path = export(
    config.output, model, tokenizer, dtype=config.dtype, overwrite=config.overwrite,
    progress=lambda done, total, name: program.log(f"  {done}/{total} files ({name})"),
  )  # fmt: skip
  files = {f.name: f.stat().st_size for f in sorted(path.iterdir())}
  gates = None if model.dms is None else model.dms.gate
  if gates == "neuron":
    program.log(
      "note: plain transformers attends with the query channel that the neuron gate borrows, and dms_jax sets it to 0;"
      " their answers differ, even without eviction, until transformers' attention clears that channel too"
    )
  program.finish({"output": str(path), "family": model.config.family, "gates": gates, "files": files})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="file")
