"""The properties of a model family, and the registry of families."""

from __future__ import annotations

import dataclasses
from typing import Any

from dms_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """The properties that distinguish one family from the others.

  Attributes:
    name: Hugging Face's `model_type`, which is also GGUF's architecture.
    architecture: the class in transformers.
    defaults: values that the transformers class assumes for keys missing from config.json.
    own_keys: keys written to config.json for this family only.
    qkv_bias, qk_norm: see `ModelConfig`.
    paired_rope: whether GGUF files store rows of q and k in pairs, for interleaved RoPE.
    presets: public sizes, as the fields of a `ModelConfig`.
  """

  name: str
  architecture: str
  defaults: dict[str, Any]
  own_keys: dict[str, Any]
  qkv_bias: bool = False
  qk_norm: bool = False
  paired_rope: bool = False
  presets: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def config(self, **fields: Any) -> ModelConfig:
    """The config of a model of this family; `fields` are the fields of `ModelConfig` that the family does not fix."""
    return ModelConfig(family=self.name, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm, **fields)


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
