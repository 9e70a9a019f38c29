"""The properties of a model family, and the registry of families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from dms_jax.config import ModelConfig
from dms_jax.json_files import is_number, shown

LAYER_KINDS = _SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class GGUF:
  """How llama.cpp's convert_hf_to_gguf.py writes the models of a family.

  Attributes:
    architecture: `general.architecture`, which is also the prefix of the family's metadata keys. Families that share it
      differ in whether they have experts or sliding layers.
    names: tensor names that differ from the usual ones (`convert.gguf`), by path in the parameter table. Parameters of
      the same name are parts of one tensor, one after another.
    keys: keys of config.json by the metadata key, without its prefix, that holds the same value.
    unwritten: further values of config.json, which llama.cpp knows and no file states, from those that files do.
    paired_rope: whether rows of q and k are stored in pairs, for interleaved RoPE.
  """

  architecture: str
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  keys: dict[str, str] = dataclasses.field(default_factory=dict)
  unwritten: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
  paired_rope: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
  """The properties that distinguish one family from the others.

  Attributes:
    name: Hugging Face's `model_type`.
    architecture: the class in transformers.
    defaults: values that the transformers class assumes for keys missing from config.json.
    own_keys: keys written to config.json for this family only.
    fixed: fields of `ModelConfig` that all models of the family share.
    keys: keys of config.json for numbers that are fields of `ModelConfig`, which other families lack.
    read: further fields of `ModelConfig`, from config.json.
    write: further keys of config.json, from the `ModelConfig`; the inverse of `read`.
    partial_rope: whether its class in transformers may turn a part of the channels (`partial_rotary_factor`).
    experts: whether its layers may be mixtures of experts.
    quantised: values of `quant_method` whose weights are widened as they are read.
    slides: whether its class in transformers has layers with sliding windows that are supported here.
    rope_types: values of `rope_type` that its class in transformers knows.
    renamed: keys of config.json, by the name that Llama's has for the same thing.
    wide: hidden units of an MLP for each channel of the residual stream, where config.json leaves them out.
    layout: how a layer's projections are stored by Hugging Face: "rows" as [outputs, inputs], "columns" as [inputs,
      outputs]; "heads" as rows in which the parts of a tensor alternate, head by head.
    prefix: what some files leave out of tensor names; None for nothing.
    ignored: tensors that older files hold and that no model reads, as a regular expression.
    names: Hugging Face's tensor names that differ from Llama's, by path in the parameter table. Parameters of the same
      name are parts of one tensor, in the order of the table.
    gguf: how GGUF files hold its models; None if llama.cpp does not have them.
    presets: public sizes, as the fields of a `ModelConfig`.
  """

  name: str
  architecture: str
  defaults: dict[str, Any]
  own_keys: dict[str, Any]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  keys: dict[str, str] = dataclasses.field(default_factory=dict)
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
  write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
  partial_rope: bool = False
  experts: bool = False
  quantised: tuple[str, ...] = ()
  slides: bool = False
  rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
  renamed: dict[str, str] = dataclasses.field(default_factory=dict)
  wide: int | None = None
  layout: Literal["rows", "columns", "heads"] = "rows"
  prefix: str | None = None
  ignored: str | None = None
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  gguf: GGUF | None = None
  presets: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def config(self, **fields: Any) -> ModelConfig:
    """The config of a model of this family; `fields` are the fields of `ModelConfig` that the family does not fix."""
    return ModelConfig(family=self.name, **self.fixed, **fields)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
  """Adds `family` to the registry; returns it."""
  FAMILIES[family.name] = family
  return family


def get(name: str) -> Family:
  """The family called `name`.

  Raises:
    ValueError: there is no such family.
  """
  if name not in FAMILIES:
    raise ValueError(f"model.family={name!r} is not one of {', '.join(FAMILIES)}")
  return FAMILIES[name]


def refusals(experts: list[str], latent: list[str], sliding: list[str]) -> list[str]:
  """Reasons against a model whose metadata has these keys, or settings, of what no family has."""
  kinds = {
    "mixture of experts": experts, "multi-head latent attention, MLA": latent, "sliding window attention": sliding,
  }  # fmt: skip
  return [f"{kind} ({', '.join(keys)})" for kind, keys in kinds.items() if keys]


def size(
  num_layers: int, d_model: int, d_ff: int, num_heads: int, num_kv_heads: int, head_dim: int, **others: Any
) -> dict[str, Any]:
  """A preset: fields of a `ModelConfig`, with the shape given by position."""
  return dict(
    num_layers=num_layers, d_model=d_model, d_ff=d_ff, num_heads=num_heads, num_kv_heads=num_kv_heads,
    head_dim=head_dim, **others,
  )  # fmt: skip


def pattern(layers: int, period: int) -> tuple[bool, ...]:
  """By layer, whether it slides: all but every `period`-th."""
  return tuple(index % period != 0 for index in range(1, layers + 1))


def read_sliding(values: dict[str, Any], period: int) -> dict[str, Any]:
  """`sliding_window` and `sliding_layers`, from config.json; nothing if no layer slides.

  Args:
    period: every `period`-th layer sees the whole text where the file does not name the layers.

  Raises:
    ValueError: a value is malformed or not supported.
  """
  layers, kinds = values["num_hidden_layers"], values.get("layer_types")
  every = values.get("sliding_window_pattern") or period
  if every < 1:
    raise ValueError(f"sliding_window_pattern={shown(every)} must be a positive number")
  slides = tuple(kind == _SLIDING for kind in kinds) if kinds else pattern(layers, every)
  return {"sliding_window": values["sliding_window"], "sliding_layers": slides} if any(slides) else {}


def write_sliding(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_sliding`."""
  slides = config.sliding_layers or (False,) * config.num_layers
  kinds = [_SLIDING if slid else _FULL for slid in slides]
  return {"sliding_window": config.sliding_window, "layer_types": kinds}


def sliding_theta(values: dict[str, Any], key: str, default: float) -> float:
  """The base frequency of sliding layers, from the settings of RoPE by layer type, else from `key` of config.json.

  Raises:
    ValueError: it is no number, or their RoPE is scaled.
  """
  settings = (values.get("rope_parameters") or {}).get(_SLIDING) or {}
  theta = settings.get("rope_theta") or values.get(key) or default
  if settings.get("rope_type", "default") != "default":
    raise ValueError(f"RoPE scaling of type {shown(settings['rope_type'])} in sliding layers: not supported")
  if not is_number(theta):
    raise ValueError(f"{key} should be a positive number, found {shown(theta)}")
  return float(theta)


# Names of q, k and v in one tensor of a GGUF file, weights and biases.
GGUF_FUSED = {
  **{f"layers/{name}_proj": "attn_qkv.weight" for name in "qkv"},
  **{f"layers/{name}_bias": "attn_qkv.bias" for name in "qkv"},
}

# Numbers of experts where config.json calls them local.
LOCAL_EXPERTS = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
GGUF_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}


def read_experts(values: dict[str, Any], keys: dict[str, str]) -> dict[str, int]:
  """Numbers of experts as fields of `ModelConfig`; `keys` are the fields, by their key of config.json.

  Raises:
    ValueError: a value is no whole number.
  """
  if bad := [theirs for theirs in keys if not is_number(values[theirs], int)]:
    raise ValueError(f"{', '.join(bad)} should be whole numbers")
  return {ours: values[theirs] for theirs, ours in keys.items()}


def write_experts(config: ModelConfig, keys: dict[str, str]) -> dict[str, int]:
  """The inverse of `read_experts`."""
  return {theirs: getattr(config, ours) for theirs, ours in keys.items()}


def with_biases(
  layer: str, modules: dict[str, str], *, fused: str, norms: tuple[str, str], final_norm: str
) -> dict[str, str]:
  """Names of tensors whose modules all have biases, with q, k and v in one; an argument of `Family.names`.

  Args:
    layer: prefix of a layer's names.
    modules: those of the projections "o", "up" and "down".
    fused: the module of q, k and v.
    norms: the modules of a layer's norms, attention's and the MLP's.
    final_norm: the last norm's module, by its whole name.
  """
  modules = {f"layers/{name}": layer + module for name, module in (dict.fromkeys("qkv", fused) | modules).items()}
  normed = dict(zip(("layers/attn_norm", "layers/mlp_norm"), (layer + norm for norm in norms), strict=True))
  normed["final_norm"] = final_norm
  names = {f"{path}_proj": f"{module}.weight" for path, module in modules.items()}
  names |= {f"{path}_bias": f"{module}.bias" for path, module in modules.items()}
  names |= {path: f"{module}.weight" for path, module in normed.items()}
  return names | {f"{path}_bias": f"{module}.bias" for path, module in normed.items()}
