"""Text that the model itself writes, to distil on: a retrofit then needs hardly any data set.

    python -m experiments.self_text --checkpoint=checkpoints/smollm2-135m-instruct --output=self.jsonl \\
      --prefixes=text.txt --questions=chats.jsonl --rows=256 --max_new_tokens=1024

Half of the rows continue 64-token prefixes cut from `--prefixes` at random places, half answer `--questions` (records
with `messages`, or the field `--question_field`) through the chat template. One JSON record {"text": ...} a row.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

import dms_jax
from experiments import program


@dataclasses.dataclass(frozen=True)
class Config:
  """`batch` rows are written at once; `temperature` and `top_p` shape the sampling."""

  checkpoint: str
  output: str
  prefixes: str = ""
  questions: str = ""
  question_field: str = "question"
  rows: int = 256
  batch: int = 64
  prefix_tokens: int = 64
  max_new_tokens: int = 1024
  temperature: float = 1.0
  top_p: float = 0.95
  dtype: str = "bfloat16"
  seed: int = 0


def prompts(config: Config, tokenizer) -> list[list[int]]:
  """Token ids of every prompt, prefixes first.

  Raises:
    ValueError: neither source is given, or one is too small.
  """
  rng = np.random.default_rng(config.seed)
  if not config.prefixes and not config.questions:
    raise ValueError("give --prefixes (a text file), --questions (a .jsonl file) or both")
  asked = (config.rows // 2 if config.prefixes else config.rows) if config.questions else 0
  rows = []
  if config.prefixes:
    ids = np.asarray(tokenizer.encode(Path(config.prefixes).read_text(encoding="utf-8")), np.int32)
    if len(ids) <= config.prefix_tokens:
      raise ValueError(f"--prefixes={config.prefixes} has {len(ids)} tokens, no more than one prefix")
    starts = rng.integers(0, len(ids) - config.prefix_tokens, config.rows - asked)
    rows += [ids[s : s + config.prefix_tokens].tolist() for s in starts]
  if asked:
    lines = [line for line in Path(config.questions).read_text(encoding="utf-8").splitlines() if line.strip()]
    for index in rng.choice(len(lines), asked, replace=asked > len(lines)):
      record = json.loads(lines[index])
      if config.question_field not in record and "messages" not in record:
        raise ValueError(f"--questions: line {index + 1} has neither `messages` nor `{config.question_field}`")
      messages = record.get("messages") or [{"role": "user", "content": record[config.question_field]}]
      rows.append(tokenizer.encode(tokenizer.chat(messages)))
  return rows


def main() -> None:
  config = program.read_flags("", Config)
  model, tokenizer = dms_jax.load(config.checkpoint, dtype=config.dtype)
  rows = prompts(config, tokenizer)
  keys = jax.random.split(jax.random.key(config.seed), len(rows))
  output, start, written = Path(config.output), time.perf_counter(), 0
  output.parent.mkdir(parents=True, exist_ok=True)
  part = output.with_name(output.name + ".part")
  with open(part, "w", encoding="utf-8") as file:
    for first in program.progress(range(0, len(rows), config.batch), desc="writing"):
      batch = rows[first : first + config.batch]
      out = dms_jax.generate(
        model, batch, policy=dms_jax.Vanilla(), max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_p=config.top_p, key=keys[first : first + config.batch],
        capacity=max(map(len, batch)) + config.max_new_tokens,
      )  # fmt: skip
      for prompt, answer in zip(batch, out.tokens, strict=True):
        written += len(answer)
        file.write(json.dumps({"text": tokenizer.decode([*prompt, *answer], skip_special=False)}) + "\n")
  os.replace(part, output)
  seconds = time.perf_counter() - start
  program.finish({"rows": len(rows), "tokens_written": written, "tokens_per_second": written / seconds})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
