"""Settings of a retrofit run; every field is a flag of `experiments.retrofit`."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RetrofitConfig:
  """How gates (and weights) are trained.

  The target compression rises linearly from `initial_cr`, `steps_per_cr` steps a unit, to `final_cr`, and stays there
  until `steps`. `trainable`: "gates" alone, "lora" (gates and low-rank updates, base frozen) or "all" weights.
  `teacher`: "original" is the untouched model, "same" today's weights with eviction off. `kl`: "reverse" is
  KL(student || teacher), what NVIDIA's trainer computes; "forward" is KL(teacher || student).
  """

  trainable: Literal["gates", "lora", "all"] = "lora"
  steps: int = 1000
  batch_size: int = 2  # rows a step
  seq_len: int = 4096  # tokens a row
  microbatches: int = 1  # gradient accumulation: the rows of a step are split in so many parts
  initial_cr: float = 1.0
  final_cr: float = 8.0
  steps_per_cr: int = 100
  tau: float = 0.1
  teacher: Literal["original", "same"] = "original"
  kl: Literal["reverse", "forward"] = "reverse"
  compression_weight: float = 1.0
  learning_rate: float = 1e-3
  warmup_steps: int = 20
  decay_steps: int = 0  # the last so many steps fall linearly to 0
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  ema_decay: float = 0.0  # > 0: checkpoints hold this exponential moving average of the trained parameters
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: bool = False  # recompute layers in the backward pass
  loss_chunk: int = 1024  # positions whose vocabulary-wide logits stand in memory at once
  seed: int = 0
  save_every: int = 100  # steps between checkpoints of the training state
  keep_states: int = 2

  def __post_init__(self):
    for name, choices in (
      ("trainable", ("gates", "lora", "all")),
      ("teacher", ("original", "same")),
      ("kl", ("reverse", "forward")),
      ("compute_dtype", ("bfloat16", "float32")),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(f"retrofit.{name}={getattr(self, name)!r} is not one of {choices}")
    for name in ("steps", "batch_size", "seq_len", "microbatches", "steps_per_cr", "loss_chunk", "save_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must be at least 1")
    if self.batch_size % self.microbatches:
      raise ValueError(f"retrofit.microbatches={self.microbatches} does not divide batch_size={self.batch_size}")
    if not 1.0 <= self.initial_cr <= self.final_cr:
      raise ValueError(f"retrofit.initial_cr={self.initial_cr} must lie between 1 and final_cr={self.final_cr}")
    if not self.tau > 0:
      raise ValueError(f"retrofit.tau={self.tau} must be positive")
    if not 0.0 <= self.ema_decay < 1.0:
      raise ValueError(f"retrofit.ema_decay={self.ema_decay} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to distil on. Paths are files, folders or globs; `weights` (one a path, default equal) share out the rows.

  `.jsonl` and `.json` lists hold a document a record: `text`, chat `messages`, or the `fields` named, joined by
  newlines; every other file is one document. Documents of a row never see each other unless `separate_documents` is
  False.
  """

  paths: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  fields: tuple[str, ...] = ("question", "answer")
  separate_documents: bool = True

  def __post_init__(self):
    if self.weights and len(self.weights) != len(self.paths):
      raise ValueError(f"data.weights has {len(self.weights)} numbers for {len(self.paths)} paths")
    if any(w <= 0 for w in self.weights):
      raise ValueError(f"data.weights={self.weights} must be positive")
