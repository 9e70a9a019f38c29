"""Text that the model itself writes, to distil on: a retrofit then needs hardly any data set, or none.

    python -m experiments.self_text --checkpoint=checkpoints/smollm2-135m-instruct --output=self.jsonl --rows=256 \\
      --prefixes=text.txt --questions=chats.jsonl --max_new_tokens=1024

With both sources half of the rows continue 64-token prefixes cut from `--prefixes` at random places, and half answer
`--questions` (records with `messages`, or the field `--question_field`) through the chat template. Without any the
model asks itself questions and answers them, or writes on from an end of text, in turn. One JSON record {"text": ...} a
row. Run the same command again after an interruption: finished batches are kept beside the output until all is there.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import dms_jax
from dms_jax.retrofit import SelfTextConfig
from dms_jax.retrofit.self_text import write
from experiments.common import program


@dataclasses.dataclass(frozen=True)
class Config:
  """Which model writes, where to, and in which precision; an output that is there already is an error."""

  checkpoint: str
  output: str
  dtype: str = "bfloat16"


def main() -> None:
  config, settings = program.read_flags("", Config), program.read_flags("", SelfTextConfig)
  if Path(config.output).exists():
    raise ValueError(f"--output={config.output} exists; remove it or choose another")
  model, tokenizer = dms_jax.load(config.checkpoint, dtype=config.dtype)
  start = time.perf_counter()
  written = write(
    model, tokenizer, settings, config.output, progress=lambda items: program.progress(items, desc="writing")
  )
  seconds = time.perf_counter() - start
  program.finish({"rows": settings.rows, "tokens_written": written, "tokens_per_second": written / seconds})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", SelfTextConfig, rows=256)
  program.run(main)
