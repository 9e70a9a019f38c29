"""The layout of nvidia/Qwen3-8B-DMS-8x: plain Qwen3 weights, neuron gate, keys in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dms_jax.convert.layouts import nvidia
from dms_jax.convert.tensors import Progress
from dms_jax.convert.writing import (
  PLAIN_NEURON,
  About,
  base_tensors,
  one_ratio,
  require,
  write_card,
  write_configs,
  write_weights,
)
from dms_jax.decoder import Model
from dms_jax.tokenizer import Tokenizer

NAME = nvidia.NEURON
_MODULES = {
  "AutoConfig": "configuration_qwen3_dms.Qwen3Config",
  "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLM",
}
_LOADING = """The model's code is part of nvidia/Qwen3-8B-DMS-8x on the Hugging Face hub and is not in this folder. Copy
configuration_qwen3_dms.py, modeling_qwen3_dms.py, dms_attention.py and dms_cache.py from there into this folder; that
code needs transformers 4.57.3. Then:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="bfloat16", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""
_MISSING = (
  "Low-rank updates apart from the weights: they are merged.",
  PLAIN_NEURON,
  "That code computes decisions in the dtype of the weights, dms_jax in float32: decisions close to the threshold may "
  "differ.",
)


def write(
  directory: Path,
  model: Model,
  tokenizer: Tokenizer | None,
  *,
  dtype: str,
  shard_bytes: int,
  progress: Progress | None = None,
  about: About = About(),
) -> None:
  """Writes the dense weights, low-rank updates merged, and the gate's settings in config.json.

  Raises:
    ValueError: the gate is not the neuron of shift 1 for each head, the window has fewer than 2 tokens, eviction is
      switched off, or the family is not Qwen3.
  """
  model = one_ratio(model, about)
  dms = require(NAME, model, families=("qwen3",), gate="neuron", shift=1, least_window=nvidia.LEAST_WINDOW)
  model = model.merged()
  write_weights(directory, base_tensors(model, dtype), shard_bytes, progress)
  # Model-Optimizer's code, which loads these checkpoints too, asserts that its page is smaller than the window.
  page: dict[str, Any] = {}
  if dms.window <= nvidia.BLOCK:
    page["dms_paged_attention_block_size"] = nvidia.block_size(dms.window)
  write_configs(directory, model, tokenizer, dtype, auto_map=_MODULES, **nvidia.written(dms, about), **page)
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_MISSING)
