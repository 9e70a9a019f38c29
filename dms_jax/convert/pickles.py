"""Refusal of weights that are Python pickles, which can run code, with the way to safetensors."""

from __future__ import annotations

import zipfile
from pathlib import Path

from dms_jax.convert.tensors import NO_PICKLES

_STUDENT = b"student_model."  # prefix of the names in a checkpoint of Model-Optimizer's training


def refusal(path: Path, files: list[Path]) -> str:
  """Why the pickles `files` of the folder `path` are not read, and what to do instead."""
  names = ", ".join(file.name for file in files)
  if any(_mentions(file, _STUDENT) for file in files):
    return (
      f"{path}: only {names}, a checkpoint of Model-Optimizer's training with student and teacher: {NO_PICKLES}: "
      f"python -m models.qwen3.extract --config {path.parent}/config.yaml --checkpoint {path} --output STUDENT, in its "
      "experimental/dms, and convert STUDENT"
    )
  return (
    f'{path}: only {names}: {NO_PICKLES}: python -c "from transformers import AutoModelForCausalLM as A; '
    f"A.from_pretrained('{path}', dtype='auto').save_pretrained('NEW')\", and convert NEW with --tokenizer={path}"
  )


def find(path: Path) -> list[Path]:
  """The files of pickled weights in a folder."""
  return sorted(path.glob("pytorch_model*.bin"))


def _mentions(file: Path, text: bytes) -> bool:
  """Whether the names in a file of `torch.save`, which is a zip archive, hold `text`; nothing is unpickled."""
  try:
    with zipfile.ZipFile(file) as archive:
      return any(text in archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
  except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError):
    return False
