"""Inputs that tests of several files share."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.model import Model
from dms_jax.params import map_table, param_table

# Golden outputs of NVIDIA's PyTorch code ------------------------------------------------------------------------------

GOLDENS = Path(__file__).parent / "goldens"
GATES = {"separate_head": "adapter", "neuron_head": "neuron"}


@functools.cache
def load_golden(kind: str) -> tuple[Model, dict[str, np.ndarray]]:
  """The model of golden set `kind`, a key of `GATES`, and its arrays."""
  raw = json.loads((GOLDENS / f"{kind}.config.json").read_text())
  cfg = ModelConfig(
    "qwen3", raw["num_hidden_layers"], raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"],
    raw["num_key_value_heads"], raw["head_dim"], raw["vocab_size"], raw["max_position_embeddings"], raw["rope_theta"],
    None, raw["rms_norm_eps"], raw["tie_word_embeddings"], qk_norm=True, eos_token_ids=(raw["eos_token_id"],),
  )  # fmt: skip
  dms = DMSConfig(GATES[kind], raw["dms_window_size"], raw["dms_alpha_scale"], raw["dms_initial_alpha_offset"], shift=1)
  state = load_file(GOLDENS / f"{kind}.safetensors")

  def leaf(_, spec):
    if not spec.layered:
      return jnp.asarray(state[spec.hf_name]).reshape(spec.shape)
    layers = [state[spec.hf_name.format(layer=i)].reshape(spec.shape[1:]) for i in range(cfg.num_layers)]
    return jnp.asarray(np.stack(layers))

  golden = dict(np.load(GOLDENS / f"{kind}_f32.npz"))
  return Model(map_table(leaf, param_table(cfg, dms)), cfg, dms), golden


# Configs --------------------------------------------------------------------------------------------------------------


def changed(config: Any, **changes: Any) -> Any:
  """`config` with other values; `loss__tau=1.0` changes the field `tau` of the nested config `loss`."""
  fields: dict[str, Any] = {}
  for name, value in changes.items():
    section, _, field = name.partition("__")
    fields.setdefault(section, {}).update({field: value} if field else {"": value})
  return dataclasses.replace(
    config, **{n: v[""] if "" in v else changed(getattr(config, n), **v) for n, v in fields.items()}
  )
