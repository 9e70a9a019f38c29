"""Samples text from a model, to train its retrofit on without a data set.

    python -m experiments.self_text --checkpoint=checkpoints/smollm2-135m-instruct --output=self.jsonl --rows=256 \\
      --prefixes=text.txt --questions=chats.jsonl --max_new_tokens=1024

With both sources, half of the rows continue random 64-token slices of `--prefixes`, and half answer `--questions`
(records with `messages`, or with the field `--question_field`) through the chat template. Without either, the model
asks itself questions and answers them, or continues an end of text, in turn (--start_tokens=2: two random tokens, which
lead to texts of more kinds). Each row is a JSON record {"text": ...}. After an interruption, run the same command
again: finished batches are kept until the output is complete.
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
  """The model, the output file and the dtype of weights and cache; an existing output is an error."""

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
    model, tokenizer, settings, config.output, progress=lambda items: program.progress(items, desc="sampling")
  )
  seconds = time.perf_counter() - start
  program.finish({"rows": settings.rows, "tokens_written": written, "tokens_per_second": written / seconds})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", SelfTextConfig, rows=256)
  program.run(main, writes="file", goes_on=True)
