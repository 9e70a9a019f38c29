"""Inputs that tests of several files share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.tokenizer import byte_tokenizer

# Checkpoints ----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def save_checkpoints(folder: Path) -> tuple[Path, Path]:
  """A tiny model with a byte tokenizer and a chat template, and a retrofit of it."""
  tokenizer = dataclasses.replace(byte_tokenizer(), settings={**byte_tokenizer().settings, "chat_template": TEMPLATE})
  cfg = tiny.config(vocab_size=257, max_position_embeddings=8192)
  checkpoint.save(folder / "base", tiny.model(cfg), tokenizer)
  gated = tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0), LoRAConfig(rank=2, scale=0.1))
  checkpoint.save(folder / "retrofit", gated, groups=("gate", "lora"))
  return folder / "base", folder / "retrofit"


# Files of tasks -------------------------------------------------------------------------------------------------------

SIX_LINES = "".join(
  f"Act {i}: First {i}. she\n{i % 4}\n" + "".join(f"end {i}{letter}.\n" for letter in "abcd") for i in range(4)
)


def write_mmlu(folder: Path) -> Path:
  for part, count in (("dev", 3), ("test", 2)):
    (folder / part).mkdir(parents=True)
    rows = "".join(f'" Q{part}{i}, ""so""? ",w{i},x{i},"y, {i}",z{i},{i % 4}\n' for i in range(count))
    (folder / part / f"high_school_physics_{part}.csv").write_text(
      "question,choice0,choice1,choice2,choice3,answer\n" + rows
    )
    (folder / part / f"anatomy_{part}.csv").write_text(
      "".join(f"q{part}{i},a,b,c,d,{'ABCD'[i]}\n" for i in range(count))
    )
  return folder


def write_gsm8k(path: Path, count: int = 4) -> Path:
  path.write_text(
    "".join(
      json.dumps({"question": f"How many {i}? ", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"})
      + "\n"
      for i in range(count)
    )
  )
  return path
