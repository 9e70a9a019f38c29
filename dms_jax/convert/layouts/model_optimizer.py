"""NVIDIA Model-Optimizer's student: Qwen3, adapter tensors among the weights, keys in config.json."""

from __future__ import annotations

from pathlib import Path

from dms_jax.convert.layouts import nvidia
from dms_jax.convert.tensors import Progress
from dms_jax.convert.writing import (
  NEVER,
  About,
  base_tensors,
  gate_tensors,
  one_ratio,
  require,
  write_card,
  write_configs,
  write_weights,
)
from dms_jax.decoder import Model
from dms_jax.tokenizer import Tokenizer

NAME = nvidia.ADAPTER
_MODULES = {
  "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
  "AutoModel": "modeling_qwen3_dms.Qwen3ModelDMS",
  "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
  "AutoModelForQuestionAnswering": "modeling_qwen3_dms.Qwen3ForQuestionAnsweringDMS",
  "AutoModelForSequenceClassification": "modeling_qwen3_dms.Qwen3ForSequenceClassificationDMS",
  "AutoModelForTokenClassification": "modeling_qwen3_dms.Qwen3ForTokenClassificationDMS",
}
_LOADING = """The model's code is part of NVIDIA Model-Optimizer and is not in this folder. Copy
configuration_qwen3_dms.py and modeling_qwen3_dms.py from its experimental/dms/models/qwen3 into this folder, and
install the package that they import: pip install -e Model-Optimizer/experimental/dms. Then:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="bfloat16", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""
_MISSING = (
  "Low-rank updates apart from the weights: they are merged.",
  "Gates of another dtype than the weights: they are rounded to it, and that code computes decisions in it, while "
  "dms_jax computes them in float32. Decisions close to the threshold may differ.",
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
  """Writes the student as Model-Optimizer's training saves it, without its Python files.

  A window of `nvidia.BLOCK` tokens or less also gets a smaller page, because the config class asserts that pages are
  smaller than the window.

  Raises:
    ValueError: the gates are no adapter of shift 1, the window has fewer than 2 tokens, or the family is not Qwen3.
  """
  model = one_ratio(model, about)
  dms = require(
    NAME, model, families=("qwen3",), gate="adapter", shift=1, granularities=("head", "layer"),
    least_window=nvidia.LEAST_WINDOW, may_be_off=True,
  )  # fmt: skip
  model = model.merged()
  write_weights(directory, [*base_tensors(model, dtype), *gate_tensors(model, dtype)], shard_bytes, progress)
  write_configs(
    directory, model, tokenizer, dtype,
    architectures=...,
    auto_map=_MODULES,
    **nvidia.written(dms, about),
    dms_paged_attention_block_size=nvidia.block_size(dms.window),
    dms_disable_eviction=dms.offset == NEVER,
    dms_separate_alpha=True,
    dms_alpha_per=dms.granularity,
    dms_tau=0.1,  # of training, as are these defaults of its speed
    dms_manual_inference_mode=False,
    dms_chunked_prefill=None,
    dms_preallocate_for_tokens=4096,
  )  # fmt: skip
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_MISSING)
