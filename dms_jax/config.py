"""Configurations of a model, its eviction gates and its low-rank updates, and their JSON.

Letters in every einsum, annotation and docstring of this project: B batch, T query tokens, S cache slots, N query
heads, K KV heads, G = N/K, H head size, D model width, F feed-forward width, V vocabulary, L layers, W window, R
low-rank width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dms_jax.levels import Levels

_LARGEST = 2**31 - 1  # of a size: positions and shapes are int32
_LARGEST_FACTOR = 1e9  # of logits and updates: products stay within float32
# The offset of gates that never evict (`dms_disable_eviction`): no logit is above it. The neuron's channel is still
# left out of attention, as in NVIDIA's code.
NEVER = 1e30
NO_FLAG = {"flag": False}  # metadata of a field that no program sets from its command line


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's frequency scaling (`rope_type` "llama3"); lengths are in tokens."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
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
  """Architecture of a Llama-style decoder.

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
    rope_scaling: Llama 3.1's change of them; None for none.
    rms_norm_eps: added to the mean square in a norm.
    tie_embeddings: the embedding is the output projection too.
    qkv_bias: q, k and v have biases (Qwen2).
    qk_norm: each query and key head has an RMSNorm (Qwen3).
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
  ratio. Such gates are read at a threshold for each CR (`levels.Levels`): `elastic_slope`, by default 4, is its slope,
  and `elastic_pivot`, by default 4 or the nearest end, the CR whose threshold is 0. The default `offset` is then that
  at which untrained gates evict as rarely at the lowest CR as those for one ratio do.
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
  elastic_slope: float = None  # type: ignore[assignment]
  elastic_pivot: float = None  # type: ignore[assignment]

  def __post_init__(self):
    if self.objective not in GATE_DEFAULTS:
      raise ValueError(f"dms.objective={self.objective!r} is not one of {sorted(GATE_DEFAULTS)}")
    self._check_elastic()
    if self.elastic and self.offset is None:
      (low, _), pivot = self.elastic, self.elastic_pivot
      highest = 0.0 if low == pivot else -self.elastic_slope * math.log((low - 1) / (pivot - 1))
      object.__setattr__(self, "offset", GATE_DEFAULTS["dms"]["offset"] - highest)
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
    """Fills in the numbers of the levels; a ValueError if they are out of range."""
    given = {name: getattr(self, name) for name in ("elastic_slope", "elastic_pivot")}
    if not self.elastic:
      for name, value in given.items():
        if value is not None:
          raise ValueError(f"dms.{name}={value} is of gates for a range of ratios: give dms.elastic=LOWEST,HIGHEST too")
      return
    if len(self.elastic) != 2 or not 1 < self.elastic[0] <= self.elastic[1] < math.inf:
      spelled = ",".join(f"{value:g}" for value in self.elastic)
      raise ValueError(f"dms.elastic={spelled} must be two compression ratios above 1, the lowest and the highest")
    if self.objective != "dms":
      raise ValueError(f"dms.elastic is for retrofit.objective=dms, not for {self.objective}")
    low, high = self.elastic
    defaults = {"elastic_slope": 4.0, "elastic_pivot": min(max(4.0, low), high)}
    for name, value in given.items():
      object.__setattr__(self, name, defaults[name] if value is None else value)
    if not 0 <= self.elastic_slope < math.inf:
      raise ValueError(f"dms.elastic_slope={self.elastic_slope} must be 0 or more")
    if not low <= self.elastic_pivot <= high:
      raise ValueError(f"dms.elastic_pivot={self.elastic_pivot} must lie in dms.elastic={low:g},{high:g}")

  @property
  def levels(self) -> Levels | None:
    """The threshold of each CR; None for gates of one ratio."""
    if not self.elastic:
      return None
    low, high = self.elastic
    return Levels(low, high, self.elastic_slope, self.elastic_pivot)

  def lag(self, window: int | None = None) -> int:
    """Tokens from the one that a decision is about to the one that computes it; 0 to W + 1.

    Args:
      window: overrides the config's.
    """
    return self.shift + ((self.window if window is None else window) if self.eviction == "immediate" else 0)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank updates: each projection in `targets` becomes W + `scale` * B A; `rank` 0 means no updates."""

  rank: int = 0
  scale: float = 2.0
  targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank={self.rank} must be 0 or more")
    if not abs(self.scale) <= _LARGEST_FACTOR:
      raise ValueError(f"lora.scale={self.scale} must be between -{_LARGEST_FACTOR:g} and {_LARGEST_FACTOR:g}")


def to_json(config: Any) -> dict:
  """A config dataclass as plain JSON values; paths are the same text in every locale."""
  return as_text(json.loads(json.dumps(dataclasses.asdict(config))))


def from_json(cls: type, values: Any, source: str = "config") -> Any:
  """Builds config `cls` from JSON values, each of which must be of its field's type.

  A class method `cls.upgraded`, if there is one, first converts older values. A whole number stands for a float. Floats
  are finite.

  Raises:
    ValueError: a key is unknown, a value is of another type, or the config refuses it; the message names `source`.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{source}: should be an object, found {shown(values)}")
  try:
    values = cls.upgraded(values) if hasattr(cls, "upgraded") else dict(values)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f"{source}: values of an earlier version cannot be read ({error})") from None
  hints = get_type_hints(cls)
  defaults = {f.name: f.default for f in dataclasses.fields(cls)}
  if unknown := sorted(set(values) - set(hints)):
    raise ValueError(f"{source}: unknown field(s) {unknown} for {cls.__name__}; it has {sorted(hints)}")
  for name, value in values.items():
    if value is not None or defaults[name] is not None:
      values[name] = typed(hints[name], value, source, name)
  try:
    return cls(**values)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{source}: {error}") from None


def typed(hint: Any, value: Any, source: str, name: str) -> Any:
  """A JSON value as `hint` means it: lists become tuples, whole numbers floats, objects configs.

  Raises:
    ValueError: the value is of another type, an integer of more than 64 bits, or a float that is not finite.
  """
  kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
  for kind in kinds:
    if kind is Any or (kind is type(None) and value is None):
      return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
      return from_json(kind, value, f"{source}: {name}")
    if get_origin(kind) is Literal and type(value) in {type(choice) for choice in get_args(kind)}:
      return value
    if kind in (bool, str) and isinstance(value, kind):
      return value
    if kind is int and is_number(value, int) and abs(value) < 2**63:
      return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
      members = get_args(kind)
      if members[-1] is Ellipsis:
        members = members[:1] * len(value)
      if len(members) == len(value):
        return tuple(typed(m, v, source, f"{name}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))
    if kind is Path and isinstance(value, str | Path):
      return Path(value)
  if float in kinds and is_number(value):
    return float(value)
  wanted = " or ".join(getattr(kind, "__name__", str(kind)) if kind is not type(None) else "null" for kind in kinds)
  raise ValueError(f"{source}: {name} should be {wanted}, found {shown(value)}")


def is_number(value: Any, kinds: type | types.UnionType = int | float) -> bool:
  """Whether a value of a JSON file is a finite number; `true` and `false` are none."""
  return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e300


def shown(value: Any) -> str:
  """A value of a file as a message shows it: short, and on one line."""
  if isinstance(value, dict | list) and value:
    return f"a {type(value).__name__} of {len(value)}"
  text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**64 else repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: str | Path) -> dict:
  """Reads one JSON object, in UTF-8 whatever the locale. It is the one reader of JSON files in this package.

  Raises:
    ValueError: the file is missing or damaged, or is not a JSON object; the message names it.
  """
  return parse_json(read_file(path), str(path))


def read_file(path: str | Path) -> bytes:
  """The content of a small file that others wrote.

  Raises:
    ValueError: it is missing, or cannot be read, or is a pipe or a device, which may have no end; the message names it.
  """
  try:
    if (path := Path(path)).exists() and not (path.is_file() or path.is_dir()):
      raise ValueError(f"{path}: a pipe or a device, where a file is expected")
    return path.read_bytes()
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file") from None
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(data: bytes | str, source: str) -> dict:
  """One JSON object from its text; bytes are UTF-8, with or without a byte order mark.

  Raises:
    ValueError: as `json_value`, or it is not an object; the message names `source`.
  """
  values = json_value(data, source)
  if not isinstance(values, dict):
    raise ValueError(f"{source}: expected a JSON object, found {type(values).__name__}")
  return values


def json_value(data: bytes | str, source: str) -> Any:
  """Any JSON value from its text, such as a line of a file; bytes are UTF-8, with or without a byte order mark.

  Raises:
    ValueError: it is not valid JSON, is nested too deep, or holds a number beyond float64; the message names `source`.
  """
  try:
    return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"), parse_int=_whole_number)
  except RecursionError:
    raise ValueError(f"{source}: JSON nested too deep; the file is damaged") from None
  except ValueError as error:  # of UTF-8, of JSON, or of a number with too many digits
    reason = f"not valid JSON ({shown(str(error))[1:-1]})"
    raise ValueError(f"{source}: {reason}; {damage(data)}") from None


def damage(content: bytes | str) -> str:
  """What is wrong with a file that cannot be read, and what to do, from its content or the start of it."""
  start = bytes(content[:99], "utf-8", "replace") if isinstance(content, str) else content[:99]
  if start.startswith(b"version https://git-lfs"):
    return "it is a pointer of Git LFS: run git lfs pull in the clone"
  if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
    return "it is a web page, such as a server answers in place of a file: fetch it again"
  return "the file is damaged or was cut short"


def as_text(value: Any) -> Any:
  """A text of the command line or of standard input, or a JSON value with such texts, as UTF-8 in every locale.

  Where the locale (such as C) cannot decode a character, Python holds its bytes as halves of surrogate pairs.
  """
  if isinstance(value, str):
    try:
      return os.fsencode(value).decode("utf-8")
    except UnicodeError:
      return value
  if isinstance(value, dict):
    return {as_text(key): as_text(each) for key, each in value.items()}
  return [as_text(each) for each in value] if isinstance(value, list | tuple) else value


def _whole_number(text: str) -> int:
  """A whole number of JSON; a ValueError if it has so many digits that no float is as large."""
  if len(text) > sys.float_info.max_10_exp:
    raise ValueError(f"a number of {len(text)} digits")
  return int(text)


HALF_PAIR = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def has_half_pair(value: Any) -> bool:
  """Whether a text, or any text in a JSON value, holds half of a surrogate pair: JSON can write it, UTF-8 cannot."""
  try:
    (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
  except UnicodeEncodeError:
    return True
  return False
