"""Settings of a retrofit run; every field is a flag of `experiments.retrofit`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args, get_type_hints

import jax

from dms_jax.config import DMSConfig, LoRAConfig

# Ranges of single fields: {rule: (test of a value, names of the fields)}.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
  "be at least 1": (
    lambda x: x >= 1,
    "batch_size seq_len microbatches schedule.steps schedule.steps_per_cr memory.loss_chunk memory.vocab_chunk "
    "saving.save_every saving.keep_states saving.calibration trimkv.capacity",
  ),
  "be positive": (lambda x: x > 0, "optimizer.learning_rate optimizer.clip_norm loss.tau loss.bound"),
  "be 0 or more": (
    lambda x: x >= 0,
    "schedule.hold_steps optimizer.warmup_steps optimizer.weight_decay loss.compression_weight trimkv.lm_weight",
  ),
  "lie in [0, 1)": (lambda x: 0.0 <= x < 1.0, "optimizer.beta1 optimizer.beta2 saving.ema_decay"),
  "lie in [0, 1]": (lambda x: 0.0 <= x <= 1.0, "optimizer.final_rate"),
}


def traced(*leaves: str) -> Callable[[type], type]:
  """Class decorator: the config is a pytree with the fields `leaves`; the others are static.

  A jitted function that takes such a config compiles once for all values of its leaves.
  """

  def register(cls: type) -> type:
    static = [f.name for f in dataclasses.fields(cls) if f.name not in leaves]

    def unflatten(values, numbers):
      config = object.__new__(cls)  # without the checks, which cannot read traced numbers
      for name, value in zip((*leaves, *static), (*numbers, *values), strict=True):
        object.__setattr__(config, name, value)
      return config

    flatten = lambda config: ([getattr(config, n) for n in leaves], tuple(getattr(config, n) for n in static))
    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls

  return register


@traced("steps", "initial_cr", "final_cr", "steps_per_cr", "fade_steps", "hold_steps")
@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """The length of a run, in optimizer steps, and its target compression ratio (CR) by step.

  In the first `fade_steps` steps the neuron gate's channel fades out of attention and nothing is evicted (phase 1 of
  arXiv 2506.05345, appendix C, of 2000 steps). Then the target CR rises linearly from `initial_cr` to `final_cr`, by 1
  in `steps_per_cr` steps, and stays there. `steps` counts all steps; 0 means those up to the final CR, `hold_steps` at
  it, and the optimizer's `decay_steps`. `zero_neuron` sets the borrowed weights to 0 after the fading, so that every
  gate starts closed; it needs `trainable` "all".

  With `dms.elastic`, `final_cr` is its highest CR, and every row of a batch draws its own target, between the lowest
  and the highest CR that the ramp has reached. The batch is read at thresholds that meet these targets, so that there
  is no compression loss. `targets` is their distribution: "log_uniform", "uniform", or "uniform_kept", in which 1/CR,
  the share that is kept, is uniform.

  Attributes:
    steps: all steps; 0: ramp, hold_steps and the optimizer's decay_steps.
    hold_steps: steps at the final CR, where steps is 0.
    initial_cr: target CR at the start of the ramp.
    final_cr: target CR at its end; of elastic gates the highest.
    steps_per_cr: steps of the ramp in which the target CR rises by 1.
    fade_steps: steps that fade the neuron gate's channel out before any eviction.
    zero_neuron: zero the borrowed weights after the fading; needs trainable "all".
    targets: how rows draw their CR under dms.elastic.
  """

  steps: int = 1000
  hold_steps: int = 0
  initial_cr: float = 1.0
  final_cr: float = 8.0
  steps_per_cr: int = 100
  fade_steps: int = 0
  zero_neuron: bool = False
  targets: Literal["log_uniform", "uniform", "uniform_kept"] = "log_uniform"

  def step_of_cr(self, cr: float | int) -> int:
    """The first step whose target is at least `cr`."""
    return self.fade_steps + math.ceil((cr - self.initial_cr) * self.steps_per_cr)

  @property
  def ramp_steps(self) -> int:
    """Steps before the first whose target is `final_cr`."""
    return self.step_of_cr(self.final_cr)


@traced("learning_rate", "warmup_steps", "decay_steps", "final_rate")
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with clipping by the global norm. `learning_rate` is the peak: it rises linearly over `warmup_steps` steps
  and falls linearly over the last `decay_steps` (-1: all steps after the warm-up) to the share `final_rate` of it.

  Attributes:
    beta1, beta2: decay of the means of gradients and of their squares.
    weight_decay: a step's share of the learning rate times the weight, taken off the weight.
    clip_norm: greatest norm of all gradients together.
    learning_rate: peak of the learning rate.
    warmup_steps: steps in which it rises linearly to the peak.
    decay_steps: last steps, in which it falls linearly; -1: all after the warm-up.
    final_rate: share of the peak that is left at the end.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 20
  decay_steps: int = 0
  final_rate: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0


@traced("compression_weight")
@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The loss: that of `kind` plus `compression_weight` times the compression loss.

  `kind`: "reverse_kl" is KL(student || teacher), which NVIDIA's trainer computes; "forward_kl" KL(teacher || student);
  "lm" the next token's negative log-likelihood, without a teacher. `teacher`: "original" is the untouched model, "same"
  the current weights with eviction off. `tau` is the temperature of the relaxed decisions. A loss above `bound`, or one
  that is not finite, ends the run. The loss of `kind` does not count the prediction of a document's prompt.

  `counts`: what the compression loss holds against the target, "evicted" the share of decisions to evict, as the paper,
  or "held" the tokens held at the end of a row, so that those of the window count too: the achieved CR at its length.

  Attributes:
    kind: KL(student || teacher), KL(teacher || student), or next-token loss without a teacher.
    counts: of the compression loss: decisions, or tokens held and seen.
  """

  kind: Literal["reverse_kl", "forward_kl", "lm"] = "reverse_kl"
  teacher: Literal["original", "same"] = "original"
  compression_weight: float = 1.0
  tau: float = 0.1
  bound: float = 100.0
  counts: Literal["evicted", "held"] = "evicted"

  @classmethod
  def upgraded(cls, values: dict) -> dict:
    """JSON `values` without the penalties that gates for a range of ratios had before; others had the paper's alone."""
    gone = {"penalty": "shortfall", "tolerance": 0.0}
    return {name: value for name, value in values.items() if name not in gone or value != gone[name]}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Memory against time.

  Activations and frozen weights have the `compute_dtype`; gates stay float32. With `remat` the backward pass recomputes
  whole layers, otherwise only the operations between matrix products. Logits exist for `loss_chunk` positions and
  `vocab_chunk` tokens of the vocabulary at a time.

  Attributes:
    remat: recompute whole layers in the backward pass: less memory, more time.
    loss_chunk: positions whose logits are in memory at once.
    vocab_chunk: vocabulary entries whose logits are in memory at once; 0: all.
  """

  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: bool = False
  loss_chunk: int = 4096
  vocab_chunk: int = 8192


@dataclasses.dataclass(frozen=True)
class SavingConfig:
  """What a run writes. The training state is saved every `save_every` steps; the last `keep_states` are kept.

  `snapshots` writes cr2, cr3, ... as the target reaches each CR, before anything is trained at it. A run of its own for
  each CR, with `schedule.hold_steps` and `optimizer.decay_steps`, ends with a better model, and compiles nothing anew.

  `export`: exported checkpoints hold a small "retrofit" on top of the base, or a whole "model" with low-rank updates
  merged; "auto" means "model" if the base is trained, else "retrofit". With `ema_decay` above 0 they hold the
  exponential moving average of the trained parameters. The thresholds of gates for a range of ratios are measured for
  them at the end, on `calibration` batches after the last that trained.

  Attributes:
    snapshots: write OUTPUT/crN whenever the target CR reaches a whole number.
    export: what final/ holds: gates and updates, or the whole model.
    ema_decay: of a moving average of the weights, which is exported; 0: none.
    calibration: batches that measure the thresholds of elastic gates at the end.
  """

  save_every: int = 100
  keep_states: int = 2
  snapshots: bool = True
  export: Literal["auto", "retrofit", "model"] = "auto"
  ema_decay: float = 0.0
  calibration: int = 16


@dataclasses.dataclass(frozen=True)
class TRIMKVConfig:
  """Of the objective "trimkv" alone (arXiv 2512.03324). `capacity` is M: the capacity loss sets in where
  the decayed retention of a head's tokens sums to more. `loss.compression_weight` weighs that loss, and `lm_weight` the
  next token's negative log-likelihood, which is added to the distillation loss.

  Attributes:
    capacity: tokens a head that the soft limit of memory allows.
    lm_weight: of the next-token loss beside the distillation.
  """

  capacity: int = 512
  lm_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class KVzapConfig:
  """Of the objective "kvzap" alone (arXiv 2601.07891). `prompt` asks the model to repeat the text before it; it ends
  the user's turn, and the repetition is the assistant's, if the tokenizer has a chat template.

  Attributes:
    prompt: text that asks for the reconstruction, whose attention gives the scores.
  """

  prompt: str = "\n\nRepeat the previous context exactly."


@traced("seed", "schedule", "optimizer", "loss")
@dataclasses.dataclass(frozen=True)
class RetrofitConfig:
  """How gates (and weights) are trained.

  `objective`: "dms" trains decisions to evict at a target CR; "trimkv" the retention of each token, under a soft
  capacity; "kvzap" regresses gates on scores of a reconstruction; "dmc" trains decisions to merge at a target CR. The
  modules of these names in `dms_jax.retrofit` say how. "lm" trains all weights of a model without gates to predict the
  next token, as from scratch. `schedule`'s CR is for "dms" and "dmc", and `loss` is not used by "kvzap".

  `trainable`: "gates" alone, "lora" (gates and low-rank updates, base frozen) or "all" weights. A step takes
  `batch_size` rows of `seq_len` tokens, in `microbatches` parts whose gradients are accumulated. `seed` determines the
  data order, the initial gates and the noise.

  Attributes:
    objective: what is trained: eviction, TRIM-KV's retention, KVzap's scores or DMC's merging.
    batch_size: rows of a step.
    seq_len: tokens of a row.
    microbatches: parts of a batch whose gradients are accumulated.
  """

  objective: Literal["dms", "trimkv", "kvzap", "dmc", "lm"] = "dms"
  trainable: Literal["gates", "lora", "all"] = "lora"
  batch_size: int = 2
  seq_len: int = 4096
  microbatches: int = 1
  seed: int = 0
  schedule: ScheduleConfig = ScheduleConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  memory: MemoryConfig = MemoryConfig()
  saving: SavingConfig = SavingConfig()
  trimkv: TRIMKVConfig = TRIMKVConfig()
  kvzap: KVzapConfig = KVzapConfig()

  def __post_init__(self):
    schedule, decay = self.schedule, max(self.optimizer.decay_steps, 0)
    if schedule.hold_steps or schedule.steps == 0:
      if not self.ramps:
        raise ValueError(f"retrofit.schedule: objective={self.objective} has no ramp of the CR; give steps alone")
      steps = schedule.ramp_steps + schedule.hold_steps + decay
      if schedule.steps not in (0, steps):
        raise ValueError(
          f"retrofit.schedule.steps={schedule.steps} is not the ramp's {schedule.ramp_steps} steps + "
          f"hold_steps={schedule.hold_steps} + optimizer.decay_steps={decay}: leave hold_steps out, or give steps=0"
        )
      object.__setattr__(self, "schedule", dataclasses.replace(schedule, steps=steps))
    for config, prefix in ((self, ""), *((getattr(self, name), f"{name}.") for name in _sections(self))):
      for name, annotation in get_type_hints(type(config)).items():
        if get_args(annotation) and (value := getattr(config, name)) not in get_args(annotation):
          raise ValueError(f"retrofit.{prefix}{name}={value!r} is not one of {get_args(annotation)}")
    for rule, (holds, names) in _RANGES.items():
      for name in names.split():
        if not holds(value := operator.attrgetter(name)(self)):
          raise ValueError(f"retrofit.{name}={value!r} must {rule}")
    schedule = self.schedule
    for name in ("schedule.fade_steps", "optimizer.decay_steps"):
      least = -1 if name == "optimizer.decay_steps" else 0
      if not least <= (value := operator.attrgetter(name)(self)) <= schedule.steps:
        raise ValueError(f"retrofit.{name}={value} must lie between 0 and steps={schedule.steps}")
    if not 1.0 <= schedule.initial_cr <= schedule.final_cr:
      raise ValueError(
        f"retrofit.schedule.initial_cr={schedule.initial_cr} must lie between 1 and final_cr={schedule.final_cr}"
      )
    if self.batch_size % self.microbatches:
      raise ValueError(f"retrofit.microbatches={self.microbatches} does not divide batch_size={self.batch_size}")
    if self.loss.teacher == "same" and self.loss.kind == "lm":
      raise ValueError("retrofit.loss.teacher='same' with retrofit.loss.kind='lm': that loss has no teacher")
    if self.loss.teacher == "same" and schedule.fade_steps:
      raise ValueError(
        "retrofit.loss.teacher='same' with retrofit.schedule.fade_steps: its channel is gone from the start; "
        "use 'original'"
      )
    if schedule.zero_neuron and self.trainable != "all":
      raise ValueError(
        f"retrofit.schedule.zero_neuron changes weights that trainable={self.trainable!r} leaves frozen; use 'all'"
      )
    if self.saving.export == "retrofit" and self.trainable == "all":
      raise ValueError(
        "retrofit.saving.export='retrofit' with trainable='all': the base is trained too; use 'model' or 'auto'"
      )

  @property
  def ramps(self) -> bool:
    """Whether the objective trains at a target CR, which `schedule` ramps up."""
    return self.objective in ("dms", "dmc")

  @property
  def whole_model(self) -> bool:
    """Whether checkpoints hold the base too."""
    return self.saving.export == "model" or self.trainable == "all"

  @classmethod
  def upgraded(cls, values: dict) -> dict:
    """JSON `values` with the sections and names of this version; they may be of 0.1, which had no sections."""
    section_of = {field: section for section in _sections(cls) for field in vars(getattr(cls, section))}
    result: dict[str, Any] = {}
    for name, value in values.items():
      if name == "kl":  # before 0.1 had other losses
        name, value = "loss", f"{value}_kl"
      field = {"loss": "kind", "loss_bound": "bound"}.get(name, name)
      if field in section_of and not isinstance(value, dict):
        result.setdefault(section_of[field], {})[field] = value
      else:
        result[name] = value
    return result


def _sections(config: RetrofitConfig | type[RetrofitConfig]) -> list[str]:
  """Names of the fields that are configs themselves."""
  return [f.name for f in dataclasses.fields(config) if dataclasses.is_dataclass(f.default)]


def check(dms: DMSConfig | None, lora: LoRAConfig, config: RetrofitConfig) -> None:
  """Checks that the settings fit together.

  Raises:
    ValueError: they do not; the message names the flags.
  """
  if config.objective == "lm" or dms is None:
    needed = {"objective": "lm", "loss.kind": "lm", "trainable": "all"}
    found = {name: operator.attrgetter(name)(config) for name in needed}
    if dms is not None or found != needed:
      spelled = lambda values: ", ".join(f"retrofit.{name}={value}" for name, value in values.items())
      wrong = {name: value for name, value in found.items() if value != needed[name]}
      raise ValueError(f"a model without gates is trained with {spelled(needed)}, not with {spelled(wrong) or 'gates'}")
    return
  if dms.objective != config.objective:
    raise ValueError(f"dms.objective={dms.objective} follows retrofit.objective={config.objective}: leave it out")
  if config.objective == "kvzap" and config.trainable != "gates":
    raise ValueError(
      f"retrofit.objective=kvzap trains gates alone: retrofit.trainable={config.trainable!r}, use 'gates'"
    )
  if config.trainable == "lora" and not lora.rank:
    raise ValueError("retrofit.trainable='lora' needs lora.rank above 0")
  if config.trainable == "lora":
    lora.check_gates(dms)
  if lora.by_cr and config.trainable == "lora" and config.saving.export == "model":
    raise ValueError("retrofit.saving.export='model' merges low-rank updates; those of lora.by_cr cannot be merged")
  if dms.elastic and config.schedule.final_cr != dms.elastic[1]:
    raise ValueError(
      f"retrofit.schedule.final_cr={config.schedule.final_cr:g} must be the highest CR of "
      f"dms.elastic={dms.elastic[0]:g},{dms.elastic[1]:g}"
    )
  if dms.elastic and dms.gate == "neuron":
    raise ValueError(
      "dms.elastic with dms.gate='neuron': gates for a range of ratios need weights of their own; use 'adapter'"
    )
  if dms.gate != "neuron":
    for name in ("fade_steps", "zero_neuron"):
      if getattr(config.schedule, name):
        raise ValueError(f"retrofit.schedule.{name} is about the borrowed neuron; dms.gate={dms.gate!r} borrows none")
    return
  if config.trainable == "gates":
    raise ValueError("dms.gate='neuron' has no weights of its own: retrofit.trainable must be 'all' or 'lora'")
  if config.trainable == "lora" and "q_proj" not in lora.targets:
    raise ValueError(f"dms.gate='neuron' is read from q_proj, which lora.targets={lora.targets} leaves untrained")


@dataclasses.dataclass(frozen=True)
class SelfTextConfig:
  """Text sampled from the model itself; `rows` 0 means none.

  Each row continues a prompt: a question from `questions` (a .jsonl file of records with `messages` or with the field
  `question_field`) through the chat template, or `prefix_tokens` tokens cut from `prefixes` (a text file); with both,
  half of the rows each. Without either, a model with a chat template asks itself a question and answers it in half of
  the rows; the others, and all rows of a model without a template, start at an end of text, or with `start_tokens`
  random tokens of the vocabulary (arXiv 2305.17888, section 3.1). `batch` rows are sampled at a time.

  Attributes:
    prefixes: text file whose cuts start the rows.
    questions: .jsonl file of questions that rows answer through the chat template.
    question_field: field of its records that holds the question.
    prefix_tokens: tokens of a cut.
    start_tokens: random tokens that start rows without a prompt; 0: an end of text.
    top_p: sample from the fewest likeliest tokens whose probabilities reach it.
  """

  rows: int = 0
  prefixes: str = ""
  questions: str = ""
  question_field: str = "question"
  prefix_tokens: int = 64
  start_tokens: int = 0
  max_new_tokens: int = 1024
  temperature: float = 1.0
  top_p: float = 0.95
  batch: int = 64
  seed: int = 0

  def __post_init__(self):
    for name, least in (("rows", 0), ("prefix_tokens", 1), ("start_tokens", 0), ("max_new_tokens", 1), ("batch", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"self_text.{name}={getattr(self, name)} must be at least {least}")
    if self.start_tokens and (self.prefixes or self.questions):
      raise ValueError(
        f"self_text.start_tokens={self.start_tokens}: rows start with prefixes or questions; leave it out"
      )
    if not self.temperature > 0:
      raise ValueError(f"self_text.temperature={self.temperature} must be positive: greedy text repeats itself")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"self_text.top_p={self.top_p} must lie in (0, 1]")


RECALL = ("facts", "aliases", "records", "events", "quotes", "dialogue", "code")  # kinds of `recall_text`


@dataclasses.dataclass(frozen=True)
class RecallTextConfig:
  """Made-up documents whose end asks for what their middle said; `rows` of them, 0 means none.

  A document has about `tokens[0]` to `tokens[1]` tokens, log-uniform. The `kinds` take turns. Half of the documents
  hide their facts in lines of `self_text`, if that is written, the others in made-up sentences.
  """

  rows: int = 0
  tokens: tuple[int, ...] = (256, 4096)
  kinds: tuple[str, ...] = RECALL
  seed: int = 0

  def __post_init__(self):
    if self.rows < 0:
      raise ValueError(f"recall_text.rows={self.rows} must be at least 0")
    if len(self.tokens) != 2 or not 1 <= self.tokens[0] <= self.tokens[1]:
      raise ValueError(f"recall_text.tokens={self.tokens} must be the least and the most tokens of a document")
    if not self.kinds or (unknown := sorted(set(self.kinds) - set(RECALL))):
      raise ValueError(f"recall_text.kinds={unknown if self.kinds else ()}: there are {', '.join(RECALL)}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to train on. `paths` are files, folders or globs; rows are sampled from them by `weights` (one a path, default
  equal).

  A record of a `.jsonl` or `.json` list is a document: its `text`, after its `prompt` if it has one, its chat
  `messages` (through the model's template), or its `fields`, joined by newlines. Any other file is one document.
  `self_text` adds text of the model's own as the last path, and `recall_text` made-up documents after it. Packed
  documents do not attend to each other unless `separate_documents` is False.

  Rows are cut from the text anywhere. With `whole_documents` they hold whole documents, and padding behind the last;
  documents longer than a row are left out. `families` takes generated problems of these families with their solutions,
  whole, instead of paths; `workers` processes make them ahead of training (-1: one a core, 0: none).

  Attributes:
    paths: files of text (.txt) or records (.jsonl), separated by commas.
    weights: share of each path in the rows; none: by their sizes.
    fields: fields of .jsonl records that hold text, tried in order.
    whole_documents: rows hold whole documents; longer ones are left out.
    families: families of generated problems, for a reasoner.
  """

  paths: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  fields: tuple[str, ...] = ("question", "answer")
  separate_documents: bool = True
  whole_documents: bool = False
  families: tuple[str, ...] = ()
  workers: int = -1
  self_text: SelfTextConfig = SelfTextConfig()
  recall_text: RecallTextConfig = RecallTextConfig()

  def __post_init__(self):
    if self.workers < -1:
      raise ValueError(f"data.workers={self.workers} must be -1 (one a core), 0 or more")
    if self.families and (self.paths or self.self_text.rows or self.recall_text.rows):
      raise ValueError(
        "data.families are generated: leave data.paths, data.self_text and data.recall_text out, or data.families"
      )
    if (self.families or self.whole_documents) and not self.separate_documents:
      raise ValueError("data.separate_documents=false: whole documents of a row never see each other; leave it out")
    count = len(self.paths) + bool(self.self_text.rows) + bool(self.recall_text.rows)
    if self.weights and len(self.weights) != count:
      raise ValueError(
        f"data.weights has {len(self.weights)} numbers for {count} paths (self_text and then recall_text are the last)"
      )
    if any(w <= 0 for w in self.weights):
      raise ValueError(f"data.weights={self.weights} must be positive")
