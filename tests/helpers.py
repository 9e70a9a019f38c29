"""Inputs that tests of several files share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

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


# Pages of a pool ------------------------------------------------------------------------------------------------------


def check_pages(cache):
  """Every page is free or owned, as often as tables say; all live slots lie in owned pages. Returns the owners."""
  table, pool = jax.device_get((cache.table, cache.table.pool))
  owned = np.arange(table.pages.shape[3]) < table.owned[..., None]
  numbers, counts = np.unique(table.pages[owned], return_counts=True)
  owners = np.zeros(cache.pages, int)
  owners[numbers] = counts
  np.testing.assert_array_equal(owners, pool.owners)
  free = pool.free[: int(pool.count)]
  assert sorted([*free, *numbers]) == list(range(cache.pages))
  assert (-(-np.asarray(cache.archived) // cache.page_size) <= table.owned).all()
  return owners
