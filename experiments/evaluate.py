"""Quality of a checkpoint or retrofit on a text: perplexity, KL from the original, achieved compression.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct --text=wiki.test.raw \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --lengths=1024,4096

Procedure of every quality figure of this project: the whole text in chunks of T tokens, every position but a chunk's
first, hard decisions, KL(original || retrofit) in nats per token. `--max_tokens=20480 --lengths=1024 --dtype=float32`
without a retrofit is the perplexity check of the converted weights. `--retrofit` takes several, comma-separated.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from dms_jax import checkpoint
from dms_jax.evaluation import text_quality
from dms_jax.tokenizer import Tokenizer
from experiments import program


@dataclasses.dataclass(frozen=True)
class Config:
  """`max_tokens` 0 reads the whole text; `thresholds` sweeps the eviction threshold without retraining."""

  checkpoint: str
  text: str
  retrofit: tuple[str, ...] = ()
  lengths: tuple[int, ...] = (4096,)
  thresholds: tuple[float, ...] = (0.0,)
  max_tokens: int = 0
  batch: int = 1
  dtype: str = "bfloat16"
  output: str = ""


def main() -> None:
  config = program.read_flags("", Config)
  text = Path(config.text).read_text(encoding="utf-8")
  tokens = np.asarray(Tokenizer.load(config.checkpoint).encode(text), np.int32)
  tokens = tokens[: config.max_tokens or None]
  original = checkpoint.load(config.checkpoint, dtype=config.dtype)
  original = original.replace(dms=None) if config.retrofit else original
  rows = []
  header = f"{'T':>6} {'retrofit':<28} {'threshold':>9} {'ppl':>8} {'change':>8} {'KL':>8} {'CR at T':>8}"
  print(header)
  for name in config.retrofit or ("",):
    model = checkpoint.load(config.checkpoint, retrofit=name, dtype=config.dtype) if name else None
    for length in config.lengths:
      for threshold in config.thresholds:
        progress = partial(program.progress, desc=f"T {length}")
        row = text_quality(
          original, model, tokens, length, threshold=threshold, batch=config.batch, progress=progress
        )  # fmt: skip
        rows.append({"retrofit": name, "threshold": threshold, **row})
        print(
          f"{length:>6} {Path(name).name or 'original':<28} {threshold:>9.2f} "
          f"{row.get('perplexity', row['perplexity_original']):>8.3f} {row.get('perplexity_change', 0):>+8.2%} "
          f"{row.get('kl', 0):>8.4f} {row.get('achieved_cr', 1):>8.2f}",
          flush=True,
        )
  result = {"tokens": len(tokens), "quality": rows}
  if config.output:
    program.save_json(config.output, {"config": program.flag_values(), "environment": program.environment(), **result})
  program.finish(result)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
