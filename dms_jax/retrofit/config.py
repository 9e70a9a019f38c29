"""Settings of a retrofit run; every field is a flag of `experiments.retrofit`."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_type_hints

from dms_jax.config import DMSConfig, LoRAConfig


@dataclasses.dataclass(frozen=True)
class RetrofitConfig:
  """How gates (and weights) are trained.

  `trainable`: "gates" alone, "lora" (gates and low-rank updates, base frozen) or "all" weights. The neuron gate's
  channel may first fade out of attention, over `fade_steps` steps in which nothing is evicted (phase 1 of arXiv
  2506.05345, appendix C, where they are 2000). Then the target compression rises linearly from `initial_cr`,
  `steps_per_cr` steps a unit, to `final_cr`, and stays there until `steps`, which count all of it.

  `loss`: "reverse_kl" is KL(student || teacher), what NVIDIA's trainer computes; "forward_kl" KL(teacher || student);
  "lm" the next token's negative log-likelihood, without a teacher. `teacher`: "original" is the untouched model, "same"
  today's weights with eviction off. `export`: what checkpoints hold: a small "retrofit" on top of the base, or a whole
  "model" with low-rank updates merged; "auto" is a retrofit unless the base is trained too.
  """

  trainable: Literal["gates", "lora", "all"] = "lora"
  steps: int = 1000
  batch_size: int = 2  # rows a step
  seq_len: int = 4096  # tokens a row
  microbatches: int = 1  # gradient accumulation: the rows of a step are split in so many parts
  fade_steps: int = 0
  zero_neuron: bool = False  # after fading set the borrowed weights to 0, so that no gate starts open; trainable "all"
  initial_cr: float = 1.0
  final_cr: float = 8.0
  steps_per_cr: int = 100
  tau: float = 0.1
  loss: Literal["reverse_kl", "forward_kl", "lm"] = "reverse_kl"
  teacher: Literal["original", "same"] = "original"
  compression_weight: float = 1.0
  learning_rate: float = 1e-3
  warmup_steps: int = 20
  decay_steps: int = 0  # the last so many steps fall linearly to 0
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  ema_decay: float = 0.0  # > 0: checkpoints hold this exponential moving average of the trained parameters
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and frozen weights; gates stay float32
  remat: bool = False  # recompute whole layers in the backward pass, else only what lies between products
  loss_chunk: int = 4096  # positions, and
  vocab_chunk: int = 8192  # words, whose logits stand in memory at once
  loss_bound: float = 100.0  # a loss above it ends the run, as one that is not finite does
  seed: int = 0
  save_every: int = 100  # steps between checkpoints of the training state
  keep_states: int = 2
  export: Literal["auto", "retrofit", "model"] = "auto"

  def __post_init__(self):
    for name, annotation in get_type_hints(RetrofitConfig).items():
      if (choices := get_args(annotation)) and getattr(self, name) not in choices:
        raise ValueError(f"retrofit.{name}={getattr(self, name)!r} is not one of {choices}")
    for name in (
      "steps", "batch_size", "seq_len", "microbatches", "steps_per_cr", "loss_chunk", "vocab_chunk", "save_every",
      "keep_states",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must be at least 1")
    if self.warmup_steps < 0:
      raise ValueError(f"retrofit.warmup_steps={self.warmup_steps} must be 0 or more")
    for name in ("fade_steps", "decay_steps"):
      if not 0 <= getattr(self, name) <= self.steps:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must lie between 0 and steps={self.steps}")
    for name in ("tau", "learning_rate", "clip_norm", "loss_bound"):
      if not getattr(self, name) > 0:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must be positive")
    for name in ("compression_weight", "weight_decay"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must be 0 or more")
    for name in ("beta1", "beta2", "ema_decay"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(f"retrofit.{name}={getattr(self, name)} must lie in [0, 1)")
    if self.batch_size % self.microbatches:
      raise ValueError(f"retrofit.microbatches={self.microbatches} does not divide batch_size={self.batch_size}")
    if not 1.0 <= self.initial_cr <= self.final_cr:
      raise ValueError(f"retrofit.initial_cr={self.initial_cr} must lie between 1 and final_cr={self.final_cr}")
    if self.teacher == "same" and self.loss == "lm":
      raise ValueError("retrofit.teacher='same' with retrofit.loss='lm': that loss has no teacher")
    if self.teacher == "same" and self.fade_steps:
      raise ValueError("retrofit.teacher='same' with fade_steps: its channel is gone from the start; use 'original'")
    if self.zero_neuron and self.trainable != "all":
      raise ValueError(
        f"retrofit.zero_neuron changes weights that trainable={self.trainable!r} leaves frozen; use 'all'"
      )
    if self.export == "retrofit" and self.trainable == "all":
      raise ValueError(
        "retrofit.export='retrofit' with trainable='all': the base is trained too; use 'model' or 'auto'"
      )

  @property
  def whole_model(self) -> bool:
    """Whether checkpoints hold the base too."""
    return self.export == "model" or self.trainable == "all"


def check(dms: DMSConfig, lora: LoRAConfig, config: RetrofitConfig) -> None:
  """Whether the settings make sense together.

  Raises:
    ValueError: they do not; names the flags.
  """
  if config.trainable == "lora" and not lora.rank:
    raise ValueError("retrofit.trainable='lora' needs lora.rank above 0")
  if dms.gate != "neuron":
    for name in ("fade_steps", "zero_neuron"):
      if getattr(config, name):
        raise ValueError(f"retrofit.{name} is about the borrowed neuron; dms.gate={dms.gate!r} borrows none")
    return
  if config.trainable == "gates":
    raise ValueError("dms.gate='neuron' has no weights of its own: retrofit.trainable must be 'all' or 'lora'")
  if config.trainable == "lora" and "q_proj" not in lora.targets:
    raise ValueError(f"dms.gate='neuron' is read from q_proj, which lora.targets={lora.targets} leaves untrained")


@dataclasses.dataclass(frozen=True)
class SelfTextConfig:
  """Text sampled from the model itself; `rows` 0 is none.

  A row continues a prompt: a question of `questions` (a .jsonl file of `messages`, or with a `question_field`) through
  the chat template, `prefix_tokens` tokens cut from `prefixes` (a text file), or, where neither is given, nothing: a
  model with a chat template asks itself a question and answers it, and every other row, or each of a model without
  one, begins at an end of text. The rows are shared out evenly. `batch` rows are written at once.
  """

  rows: int = 0
  prefixes: str = ""
  questions: str = ""
  question_field: str = "question"
  prefix_tokens: int = 64
  max_new_tokens: int = 1024
  temperature: float = 1.0
  top_p: float = 0.95
  batch: int = 64
  seed: int = 0

  def __post_init__(self):
    for name, least in (("rows", 0), ("prefix_tokens", 1), ("max_new_tokens", 1), ("batch", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"self_text.{name}={getattr(self, name)} must be at least {least}")
    if not self.temperature > 0:
      raise ValueError(f"self_text.temperature={self.temperature} must be positive: greedy text repeats itself")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"self_text.top_p={self.top_p} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to train on. Paths are files, folders or globs; `weights` (one a path, default equal) share out the rows.

  `.jsonl` and `.json` lists hold a document a record: `text`, chat `messages` (through the model's template), or the
  `fields` named, joined by newlines; every other file is one document. `self_text` adds text of the model's own as a
  last path. Documents of a row never see each other unless `separate_documents` is False.
  """

  paths: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  fields: tuple[str, ...] = ("question", "answer")
  separate_documents: bool = True
  self_text: SelfTextConfig = SelfTextConfig()

  def __post_init__(self):
    count = len(self.paths) + bool(self.self_text.rows)
    if self.weights and len(self.weights) != count:
      raise ValueError(f"data.weights has {len(self.weights)} numbers for {count} paths (self_text is the last)")
    if any(w <= 0 for w in self.weights):
      raise ValueError(f"data.weights={self.weights} must be positive")
