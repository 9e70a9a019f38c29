"""Configurations of a model, its eviction gates and its low-rank updates.

Letters in every einsum, annotation and docstring of this project: B batch, T query tokens, S cache slots, N query
heads, K KV heads, G = N/K, H head size, D model width, F feed-forward width, V vocabulary, L layers, W window, R
low-rank width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from dms_jax.levels import Levels

_LARGEST = 2**31 - 1  # of a size: positions and shapes are int32
_LARGEST_FACTOR = 1e9  # of logits and updates: products stay within float32
# The offset of gates that never evict (`dms_disable_eviction`): no logit is above it. The neuron's channel is still
# left out of attention, as in NVIDIA's code.
NEVER = 1e30
NO_FLAG = {"flag": False}  # metadata of a field that no program sets from its command line
# Metadata of a field that files leave out at its default, so that earlier versions, which lack the field, read them.
_LATER = NO_FLAG | {"later": True}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """A change of RoPE's frequencies for longer texts; lengths are in tokens.

  Attributes:
    factor: by which the context grows.
    low_freq_factor, high_freq_factor: of "llama3".
    original_max_position_embeddings: the length before, of "llama3" and "yarn".
    kind: config.json's `rope_type`. "linear" divides every frequency, "llama3" (Llama 3.1) and "yarn" (arXiv
      2309.00071) those of long waves alone.
    beta_fast, beta_slow: rotations over the original length between which "yarn" blends.
    attention_factor: multiplies the cosines and sines of "yarn"; default 0.1 ln(factor) + 1.
    truncate: whether "yarn" rounds the blended channels to whole ones.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192
  kind: Literal["llama3", "linear", "yarn"] = dataclasses.field(default="llama3", metadata=_LATER)
  beta_fast: float = dataclasses.field(default=32.0, metadata=_LATER)
  beta_slow: float = dataclasses.field(default=1.0, metadata=_LATER)
  attention_factor: float | None = dataclasses.field(default=None, metadata=_LATER)
  truncate: bool = dataclasses.field(default=True, metadata=_LATER)

  def __post_init__(self):
    if self.attention_factor is None and self.kind == "yarn":
      object.__setattr__(self, "attention_factor", 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)
    if self.attention_factor is not None and not 1e-3 <= self.attention_factor <= 1e6:
      raise ValueError(f"rope_scaling.attention_factor={self.attention_factor} must be between 0.001 and a million")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
      if not 1e-3 <= getattr(self, name) <= 1e6:
        raise ValueError(f"rope_scaling.{name}={getattr(self, name)} must be between 0.001 and a million")
    if self.high_freq_factor <= self.low_freq_factor:
      factors = f"high_freq_factor={self.high_freq_factor}, low_freq_factor={self.low_freq_factor}"
      raise ValueError(f"rope_scaling: {factors}: the first must be larger")
    if not 1 <= self.original_max_position_embeddings <= _LARGEST:
      length = self.original_max_position_embeddings
      raise ValueError(f"rope_scaling.original_max_position_embeddings={length} must be 1 to {_LARGEST} tokens")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder: Llama's, with the differences that its family or its config.json names.

  Attributes:
    family: a name in `dms_jax.families`, the Hugging Face `model_type`.
    num_layers: number of layers, L.
    d_model: channels of the residual stream, D.
    d_ff: hidden units of an MLP.
    num_heads: query heads, N, a multiple of the KV heads.
    num_kv_heads: KV heads, K.
    head_dim: channels of a head, H, even.
    vocab_size: rows of the embedding, V.
    max_position_embeddings: tokens of the longest text.
    rope_theta: base of RoPE's frequencies.
    rope_scaling: a change of them for longer texts; None for none.
    rope_fraction: share of a head's channels, the first ones, that RoPE turns; 0 for a model without RoPE.
    rope_layers: by layer, whether it has RoPE (SmolLM3); empty for all.
    sliding_window: tokens that a sliding layer sees and holds, the newest included; None without such layers.
    sliding_layers: by layer, whether it slides; some layer does not.
    local_rope_theta: base of the frequencies of sliding layers, not scaled; None if all layers have the same RoPE.
    rms_norm_eps: added to the mean square in a norm.
    tie_embeddings: the embedding is the output projection too.
    qkv_bias: q, k and v have biases (Qwen2).
    qk_norm: each query and key head has an RMSNorm (Qwen3).
    qk_norm_over: "head", or "all": one RMSNorm over all query heads together, and one over all key heads (OLMo-2).
    norms: whether attention and MLP are normed "before" (what they read), "after" (what they add, OLMo-2) or "both".
    norm_plus_one: a norm multiplies by 1 + its weight, in float32 (Gemma).
    layer_norm: norms are LayerNorms with biases, not RMSNorms (GPT-2).
    activation: of the MLP, or of its gate.
    gated_mlp: the MLP's hidden units are multiplied by a gate.
    proj_bias: the attention's output, the MLP's projections and its router have biases (GPT-2).
    num_experts: MLPs of a layer, E, of `d_ff` hidden units each; 0 for one MLP without a router.
    experts_per_token: of them, those that a token reads.
    norm_experts: the weights of a token's experts are divided by their sum.
    swiglu_alpha, swiglu_limit: a and m of experts whose hidden units are g sigmoid(a g) (u + 1), with the gate g
      at most m and u within -m .. m (gpt-oss); None for those of `activation`.
    parallel: attention and MLP read the same residual stream (GPT-NeoX).
    learned_positions: an embedding of each position is added to the token's (GPT-2).
    embed_scale, residual_scale: factors of the embeddings, and of what attention and MLP add (Granite).
    attention_scale: factor of attention scores; None for head_dim ** -0.5.
    logit_divisor: divides the logits (Granite).
    attention_softcap, logit_softcap: bounds c of attention scores and of logits x, which become c tanh(x / c) (Gemma
      2); None for none.
    attention_sinks: each query head has a learned logit whose exponential joins the sum of its softmax (gpt-oss).
    eos_token_ids: any of them ends a generated row.
  """

  family: str = "llama"
  num_layers: int = 2
  d_model: int = 64
  d_ff: int = 128
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  vocab_size: int = dataclasses.field(default=256, metadata=NO_FLAG)
  max_position_embeddings: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = dataclasses.field(default=None, metadata=NO_FLAG)
  rms_norm_eps: float = 1e-5
  tie_embeddings: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata=NO_FLAG)
  rope_fraction: float = dataclasses.field(default=1.0, metadata=_LATER)
  rope_layers: tuple[bool, ...] = dataclasses.field(default=(), metadata=_LATER)
  sliding_window: int | None = dataclasses.field(default=None, metadata=_LATER)
  sliding_layers: tuple[bool, ...] = dataclasses.field(default=(), metadata=_LATER)
  local_rope_theta: float | None = dataclasses.field(default=None, metadata=_LATER)
  qk_norm_over: Literal["head", "all"] = dataclasses.field(default="head", metadata=_LATER)
  norms: Literal["before", "after", "both"] = dataclasses.field(default="before", metadata=_LATER)
  norm_plus_one: bool = dataclasses.field(default=False, metadata=_LATER)
  layer_norm: bool = dataclasses.field(default=False, metadata=_LATER)
  activation: Literal["silu", "gelu_tanh", "gelu"] = dataclasses.field(default="silu", metadata=_LATER)
  gated_mlp: bool = dataclasses.field(default=True, metadata=_LATER)
  proj_bias: bool = dataclasses.field(default=False, metadata=_LATER)
  num_experts: int = dataclasses.field(default=0, metadata=_LATER)
  experts_per_token: int = dataclasses.field(default=0, metadata=_LATER)
  norm_experts: bool = dataclasses.field(default=False, metadata=_LATER)
  swiglu_alpha: float | None = dataclasses.field(default=None, metadata=_LATER)
  swiglu_limit: float | None = dataclasses.field(default=None, metadata=_LATER)
  parallel: bool = dataclasses.field(default=False, metadata=_LATER)
  learned_positions: bool = dataclasses.field(default=False, metadata=_LATER)
  embed_scale: float = dataclasses.field(default=1.0, metadata=_LATER)
  residual_scale: float = dataclasses.field(default=1.0, metadata=_LATER)
  attention_scale: float | None = dataclasses.field(default=None, metadata=_LATER)
  logit_divisor: float = dataclasses.field(default=1.0, metadata=_LATER)
  attention_softcap: float | None = dataclasses.field(default=None, metadata=_LATER)
  logit_softcap: float | None = dataclasses.field(default=None, metadata=_LATER)
  attention_sinks: bool = dataclasses.field(default=False, metadata=_LATER)

  def __post_init__(self):
    from dms_jax import families  # imports this module

    families.get(self.family)
    for name in (
      "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_position_embeddings",
    ):  # fmt: skip
      if not 1 <= getattr(self, name) <= _LARGEST:
        raise ValueError(f"{name}={getattr(self, name)} must be 1 to {_LARGEST}")
    if not 1 <= self.rope_theta <= 1e15:
      raise ValueError(f"rope_theta={self.rope_theta} must be between 1 and 1e15")
    if not 1e-30 <= self.rms_norm_eps < 1:  # float32 holds 1e-38
      raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be at least 1e-30 and below 1")
    if outside := [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]:
      raise ValueError(f"eos_token_ids: {outside} are outside the vocabulary of {self.vocab_size} tokens")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs of channels")
    if not 0 <= self.rope_fraction <= 1 or self.rotated % 2:
      raise ValueError(f"rope_fraction={self.rope_fraction}: RoPE must turn an even number of {self.head_dim} channels")
    if self.rope_layers and len(self.rope_layers) != self.num_layers:
      raise ValueError(f"rope_layers has {len(self.rope_layers)} entries for num_layers={self.num_layers}")
    self._check_sliding()
    if not (0 < self.experts_per_token <= self.num_experts <= 2**16 or self.num_experts == self.experts_per_token == 0):
      raise ValueError(f"experts_per_token={self.experts_per_token} must be 1 to num_experts={self.num_experts}")
    clamped = self.swiglu_limit is not None
    if clamped != (self.swiglu_alpha is not None) or (clamped and not self.num_experts):
      raise ValueError("give swiglu_alpha and swiglu_limit together, to experts")
    for name in (
      "embed_scale",
      "residual_scale",
      "logit_divisor",
      "attention_scale",
      "attention_softcap",
      "logit_softcap",
      "swiglu_alpha",
      "swiglu_limit",
    ):
      value = getattr(self, name)
      if value is not None and not 1e-6 <= value <= 1e6:
        raise ValueError(f"{name}={value} must be between a millionth and a million")

  def _check_sliding(self) -> None:
    """A ValueError if the sliding layers are malformed, or if no other layer is there for a policy."""
    if (self.sliding_window is None) != (not self.sliding_layers):
      raise ValueError("give sliding_window and sliding_layers together, or neither")
    if self.sliding_window is None:
      return
    if not 2 <= self.sliding_window <= 2**30:
      raise ValueError(f"sliding_window={self.sliding_window} must be 2 to {2**30} tokens")
    if len(self.sliding_layers) != self.num_layers:
      raise ValueError(f"sliding_layers has {len(self.sliding_layers)} entries for num_layers={self.num_layers}")
    if all(self.sliding_layers):
      raise ValueError("every layer slides: no layer keeps tokens that a policy could evict")
    if self.local_rope_theta is not None and not 1 <= self.local_rope_theta <= 1e15:
      raise ValueError(f"local_rope_theta={self.local_rope_theta} must be between 1 and 1e15")

  @property
  def ring_window(self) -> int | None:
    """The window of sliding layers, in which the newest token is not counted; None without such layers."""
    return None if self.sliding_window is None else self.sliding_window - 1

  @property
  def global_layers(self) -> list[int]:
    """The layers that do not slide."""
    return [layer for layer in range(self.num_layers) if not (self.sliding_layers and self.sliding_layers[layer])]

  @property
  def rotated(self) -> int:
    """Channels of a head that RoPE turns."""
    return int(self.head_dim * self.rope_fraction)

  @property
  def plain_rope(self) -> bool:
    """Whether RoPE turns all channels of every layer and changes no length: a policy can turn keys back."""
    factor = 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor or 1.0
    alike = all(self.rope_layers) and self.local_rope_theta is None
    return self.rotated == self.head_dim and alike and factor == 1.0

  @property
  def group_size(self) -> int:
    """G, query heads that share one KV head."""
    return self.num_heads // self.num_kv_heads


Objective = Literal["dms", "trimkv", "kvzap", "dmc"]
# Defaults of `DMSConfig` that depend on the objective.
GATE_DEFAULTS: dict[str, dict[str, Any]] = {
  "dms": {"gate": "adapter", "scale": 100.0, "offset": 5.0, "shift": 1},
  "trimkv": {"gate": "mlp", "scale": 1.0, "offset": -10.0, "shift": 0},
  "kvzap": {"gate": "mlp", "scale": 1.0, "offset": 0.0, "shift": 0},
  "dmc": {"gate": "linear", "scale": 100.0, "offset": 5.0, "shift": 0},
}


@dataclasses.dataclass(frozen=True)
class DMSConfig:
  """A model's gates and the meaning of their logits (arXiv 2506.05345).

  `objective`: what the gates were trained for, and so the policy that reads them. "dms": a logit above the threshold
  evicts. "trimkv": a logit's sigmoid is the token's retention beta (arXiv 2512.03324). "kvzap": a logit is the token's
  score (arXiv 2601.07891). "dmc": K logits decide to merge, and of K more the negative's sigmoid is the importance
  omega (arXiv 2403.09636). It sets the fields that are None (`GATE_DEFAULTS`): by default DMS's decisions are about the
  token before, by an adapter; the others' logits are about the token itself.

  `gate`: "neuron" reads the last channel of each group's first query head. The others read the residual stream after a
  norm of their own: "adapter" projects it, "linear" also adds a bias, "mlp" has one hidden layer of `hidden` units. A
  gate logit is `scale` * raw - `offset`. Token t decides about token t - `shift`. `window` is W: an evicted token stays
  visible to the next W tokens. `granularity` "layer": KV head 0 decides for its whole layer. `eviction` "delayed"
  decides about a token on its arrival and evicts it W tokens later. "immediate", an ablation of the paper, decides when
  the token leaves the window and evicts it at once: token t decides about t - `shift` - W.

  `elastic` is the lowest and the highest CR of gates that one retrofit trains for all ratios between; none means one
  ratio. Such gates are read at a threshold for each CR: `elastic_thresholds` are those of CRs from the lowest to the
  highest (`levels.Levels`), which a retrofit measures at its end. Before, they are those of a logistic distribution of
  scale 4 whose threshold for CR 4, or the nearest end, is 0.

  Attributes:
    shift: token t decides about token t - shift; none: 1, as in NVIDIA's checkpoints.
    hidden: units of the hidden layer of an "mlp" gate.
    elastic: lowest and highest CR of gates trained for all ratios between; none: one ratio.
    elastic_thresholds: thresholds of elastic gates, measured at the end of their retrofit.
  """

  gate: Literal["adapter", "neuron", "linear", "mlp"] = None  # type: ignore[assignment]
  window: int = 256
  scale: float = None  # type: ignore[assignment]
  offset: float = None  # type: ignore[assignment]
  shift: int = None  # type: ignore[assignment]
  granularity: Literal["head", "layer"] = "head"
  eviction: Literal["delayed", "immediate"] = "delayed"
  objective: Objective = "dms"
  hidden: int = 512
  elastic: tuple[float, ...] = ()
  elastic_thresholds: tuple[float, ...] = ()

  def __post_init__(self):
    if self.objective not in GATE_DEFAULTS:
      raise ValueError(f"dms.objective={self.objective!r} is not one of {sorted(GATE_DEFAULTS)}")
    self._check_elastic()
    for name, value in GATE_DEFAULTS[self.objective].items():
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    if self.gate not in ("adapter", "neuron", "linear", "mlp"):
      raise ValueError(f"dms.gate={self.gate!r} must be 'adapter', 'neuron', 'linear' or 'mlp'")
    if self.hidden < 1:
      raise ValueError(f"dms.hidden={self.hidden} must be at least 1")
    if self.objective != "dms":
      if self.gate == "neuron":
        raise ValueError(f"dms.gate='neuron' cannot be trained with retrofit.objective={self.objective}: use 'mlp'")
      if self.objective == "dmc" and self.granularity == "layer":
        raise ValueError("dms.granularity='layer' with retrofit.objective=dmc: each KV head merges its own tokens")
      if self.shift != 0 or self.eviction != "delayed":
        raise ValueError(
          f"dms.shift={self.shift}, dms.eviction={self.eviction!r}: gates of retrofit.objective={self.objective} score "
          "the token that computes them; leave both out"
        )
    if self.granularity not in ("head", "layer"):
      raise ValueError(f"dms.granularity={self.granularity!r} must be 'head' or 'layer'")
    if self.shift not in (0, 1):
      raise ValueError(f"dms.shift={self.shift} must be 1 (NVIDIA's checkpoints and ours) or 0 (shisa-ai's)")
    for name, most in (("scale", _LARGEST_FACTOR), ("offset", NEVER)):
      if not abs(getattr(self, name)) <= most:
        raise ValueError(f"dms.{name}={getattr(self, name)} must be between -{most:g} and {most:g}")
    if self.window < 0:
      raise ValueError(f"dms.window={self.window} must be 0 or more tokens")
    if self.window > 2**30:
      raise ValueError(f"dms.window={self.window}: at most {2**30} tokens")
    if self.eviction not in ("delayed", "immediate"):
      raise ValueError(f"dms.eviction={self.eviction!r} must be 'delayed' or 'immediate'")

  def _check_elastic(self) -> None:
    """Fills in the thresholds of untrained gates; a ValueError if the numbers are out of range."""
    table = self.elastic_thresholds
    if not self.elastic:
      if table:
        raise ValueError("dms.elastic_thresholds are of gates for a range of ratios: give dms.elastic=LOWEST,HIGHEST")
      return
    if len(self.elastic) != 2 or not 1 < self.elastic[0] <= self.elastic[1] < math.inf:
      spelled = ",".join(f"{value:g}" for value in self.elastic)
      raise ValueError(f"dms.elastic={spelled} must be two compression ratios above 1, the lowest and the highest")
    if self.objective != "dms":
      raise ValueError(f"dms.elastic is for retrofit.objective=dms, not for {self.objective}")
    low, high = self.elastic
    if not table:
      untrained = Levels.logistic(low, high, slope=4.0, zero=Levels(low, high, ()).usual)
      object.__setattr__(self, "elastic_thresholds", untrained.thresholds)
    elif (len(table) < 2 and low < high) or any(not a >= b for a, b in itertools.pairwise(table)):
      raise ValueError("dms.elastic_thresholds must be two or more numbers that never rise")

  @classmethod
  def upgraded(cls, values: dict) -> dict:
    """JSON `values` with this version's thresholds; files of before hold the slope and the zero of a logistic one."""
    values = dict(values)
    slope, zero = values.pop("elastic_slope", None), values.pop("elastic_pivot", None)
    if slope is not None and values.get("elastic"):
      low, high = values["elastic"]
      values["elastic_thresholds"] = list(Levels.logistic(low, high, slope, zero).thresholds)
    return values

  @property
  def levels(self) -> Levels | None:
    """The threshold of each CR; None for gates of one ratio."""
    if not self.elastic:
      return None
    low, high = self.elastic
    return Levels(low, high, self.elastic_thresholds)

  def lag(self, window: int | None = None) -> int:
    """Tokens from the one that a decision is about to the one that computes it; 0 to W + 1.

    Args:
      window: overrides the config's.
    """
    return self.shift + ((self.window if window is None else window) if self.eviction == "immediate" else 0)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank updates: each projection in `targets` becomes W + `scale` * B A; `rank` 0 means no updates.

  With `by_cr` a row that is read at CR c has W + `scale` * s(c) * B A, where s(c) = log(c) / log(highest CR) with gates
  for a range of ratios (`DMSConfig.elastic`): nothing of the update at CR 1, all of it at the highest. Such updates are
  not merged into the weights, since each row has its own.

  Attributes:
    scale: factor of the updates.
    by_cr: scale the update of each row by log(its CR) / log(highest CR of dms.elastic).
  """

  rank: int = 0
  scale: float = 2.0
  targets: tuple[str, ...] = dataclasses.field(default=PROJECTIONS[:4], metadata={"choices": PROJECTIONS})
  by_cr: bool = dataclasses.field(default=False, metadata={"later": True})

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank={self.rank} must be 0 or more")
    if not abs(self.scale) <= _LARGEST_FACTOR:
      raise ValueError(f"lora.scale={self.scale} must be between -{_LARGEST_FACTOR:g} and {_LARGEST_FACTOR:g}")

  def check_gates(self, dms: DMSConfig | None) -> None:
    """Raises ValueError for updates that depend on each row's CR beside gates that know none."""
    if self.by_cr and not (dms and dms.elastic):
      raise ValueError(
        "lora.by_cr scales updates by the CR that each row asks for: it needs dms.elastic=LOWEST,HIGHEST"
      )
