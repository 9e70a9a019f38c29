"""GGUF files of every family, written as llama.cpp writes them: logits against transformers."""

from __future__ import annotations

import dataclasses
import io
import json

import gguf
import jax
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFWriter
from safetensors.numpy import load_file

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.convert import convert, export
from dms_jax.convert.gguf import read
from dms_jax.model import forward, unembed
from tests.convert import gguf_files
from tests.helpers import OTHER_FAMILIES, ROOT, family

LOGITS = 1e-4  # as in test_families: sums in float32, in another order
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32, kind="yarn", beta_fast=8.0)
LINEAR = RopeScaling(factor=4.0, kind="linear")
CHANGES = {  # what a GGUF file does not state, as llama.cpp has it
  "gpt_oss": dict(swiglu_limit=7.0),
  "gpt2": dict(d_ff=128),
  "gemma2": dict(attention_scale=8**-0.5),
  "gemma3": dict(attention_scale=8**-0.5, num_layers=6, sliding_layers=(True,) * 5 + (False,)),
  "smollm3": dict(num_layers=4, rope_layers=(True, True, True, False)),
}
CONFIGS = {
  "llama": tiny.config(tie_embeddings=False),
  "llama-tied-head-dim": tiny.config(head_dim=24),
  "mistral": family("mistral", tie_embeddings=False),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, tie_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e6),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, head_dim=32, rms_norm_eps=1e-6),
  **{name: dataclasses.replace(config, **CHANGES.get(name, {})) for name, config in OTHER_FAMILIES.items()},
  "llama-linear": tiny.config(rope_scaling=LINEAR, tie_embeddings=False),
  "llama-yarn": tiny.config(rope_scaling=YARN, tie_embeddings=False),
  "qwen3-yarn-factor": tiny.config(
    family="qwen3", qk_norm=True, rope_scaling=dataclasses.replace(YARN, attention_factor=0.75)
  ),
  "gpt_neox-in-turn": family("gpt_neox", num_kv_heads=4, rope_fraction=0.5, parallel=False, tie_embeddings=False),
  "gemma3-one-rope": dataclasses.replace(
    OTHER_FAMILIES["gemma3"], **CHANGES["gemma3"], rope_scaling=None, local_rope_theta=1e4, rope_theta=1e4
  ),
  "gemma2-46-layers": dataclasses.replace(  # the size whose scores have another scale
    OTHER_FAMILIES["gemma2"], num_layers=46, sliding_layers=(True, False) * 23, attention_scale=(48 / 4) ** -0.5,
    d_model=48, embed_scale=48**0.5,
  ),
}  # fmt: skip
ARCHITECTURES = {
  "LlamaForCausalLM": MODEL_ARCH.LLAMA, "MistralForCausalLM": MODEL_ARCH.LLAMA,
  "MixtralForCausalLM": MODEL_ARCH.LLAMA, "GraniteForCausalLM": MODEL_ARCH.GRANITE,
  "SmolLM3ForCausalLM": MODEL_ARCH.SMOLLM3, "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
  "Qwen3ForCausalLM": MODEL_ARCH.QWEN3, "Qwen3MoeForCausalLM": MODEL_ARCH.QWEN3MOE,
  "Phi3ForCausalLM": MODEL_ARCH.PHI3, "Olmo2ForCausalLM": MODEL_ARCH.OLMO2, "Olmo3ForCausalLM": MODEL_ARCH.OLMO2,
  "GPT2LMHeadModel": MODEL_ARCH.GPT2, "GPTNeoXForCausalLM": MODEL_ARCH.GPTNEOX,
  "GptOssForCausalLM": MODEL_ARCH.GPT_OSS, "Gemma2ForCausalLM": MODEL_ARCH.GEMMA2,
  "Gemma3ForCausalLM": MODEL_ARCH.GEMMA3,
}  # fmt: skip
LLAMAS = (
  MODEL_ARCH.LLAMA,
  MODEL_ARCH.MISTRAL3,
  MODEL_ARCH.GRANITE,
  MODEL_ARCH.SMOLLM3,
)  # subclasses of LlamaModel: q and k permuted
GEMMAS = (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3)
TOKENS = [*map(chr, range(ord("!"), ord("!") + 90)), "ab", "<eos>"]


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
  """`LlamaModel.permute`."""
  shape = heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
  return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def tensors(arch: MODEL_ARCH, values: dict, state: dict[str, np.ndarray]):
  """(name, tensor) as `modify_tensors` of each model of llama.cpp's conversion yields them."""
  heads = values.get("num_attention_heads", values.get("n_head"))
  layers = values.get("num_hidden_layers", values.get("n_layer"))
  names = gguf.get_tensor_name_map(arch, layers)
  experts: dict[str, dict[int, np.ndarray]] = {}

  def named(name: str, value: np.ndarray):
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found, np.ascontiguousarray(value)

  for name, value in state.items():
    if arch in LLAMAS and name.endswith("q_proj.weight"):
      value = permute(value, heads)
    if arch in LLAMAS and name.endswith("k_proj.weight"):
      value = permute(value, values["num_key_value_heads"])
    if arch in GEMMAS and name.endswith("norm.weight"):
      value = value + np.float32(1)
    if arch == MODEL_ARCH.GPT2 and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
      value = value.T
    if arch == MODEL_ARCH.GPTNEOX and "query_key_value" in name:  # of bloom's order to GPT-2's
      parts = value.reshape(heads, 3, -1, *value.shape[1:])
      value = np.concatenate([parts[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    if name.endswith("sinks"):
      name += ".weight"
    if arch == MODEL_ARCH.GPT_OSS and ".experts." in name:
      kind = "bias" if name.endswith("_bias") else "weight"
      value = value if kind == "bias" else value.swapaxes(-1, -2)
      stem = name.removesuffix("_bias")
      if "gate_up" in stem:
        yield named(f"{stem.replace('gate_up_proj', 'gate_proj')}.{kind}", value[:, ::2])
        yield named(f"{stem.replace('gate_up_proj', 'up_proj')}.{kind}", value[:, 1::2])
      else:
        yield named(f"{stem}.{kind}", value)
    elif ".experts." in name:  # model.layers.0.mlp.experts.3.up_proj.weight: stacked
      before, after = name.split(".experts.")
      number, projection = after.split(".", 1)
      before = before.removesuffix(".block_sparse_moe") + (".feed_forward" if "block_sparse" in before else "")
      before = before.removeprefix("model.") if arch == MODEL_ARCH.LLAMA else before
      mine = experts.setdefault(f"{before}.experts.{projection}", {})
      mine[int(number)] = value
      if len(mine) == values.get("num_local_experts", values.get("num_experts")):
        yield named(f"{before}.experts.{projection}", np.stack([mine[i] for i in range(len(mine))]))
    else:
      yield named(name, value)


def write(path, folder, arch: MODEL_ARCH | None = None) -> None:
  """Writes the directory `folder` of transformers as llama.cpp's converter would; `arch`: other than by its class.

  `set_gguf_parameters` of `TextModel`, and of each model where it differs.
  """
  values = json.loads((folder / "config.json").read_text())
  arch = arch or ARCHITECTURES[values["architectures"][0]]
  writer = GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
  given = lambda *keys: next((values[key] for key in keys if values.get(key) is not None), None)
  heads, width = given("num_attention_heads", "n_head"), given("hidden_size", "n_embd")
  writer.add_block_count(given("num_hidden_layers", "n_layer"))
  writer.add_context_length(given("max_position_embeddings", "n_positions"))
  writer.add_embedding_length(width)
  writer.add_feed_forward_length(4 * width if arch == MODEL_ARCH.GPT2 else given("intermediate_size", "d_ff") or 0)
  writer.add_head_count(heads)
  if (kv_heads := given("num_key_value_heads")) is not None:
    writer.add_head_count_kv(kv_heads)
  if arch in (MODEL_ARCH.GPT2, MODEL_ARCH.GPTNEOX):
    writer.add_layer_norm_eps(given("layer_norm_epsilon", "layer_norm_eps"))
  else:
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
  if arch not in (MODEL_ARCH.GPT2, MODEL_ARCH.GPTNEOX, MODEL_ARCH.PHI3):
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
  rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
  rope = rope.get("full_attention", rope)
  local = values.get("rope_parameters", {}).get("sliding_attention", {}).get("rope_theta")
  if arch not in (MODEL_ARCH.GPT2, MODEL_ARCH.GPTNEOX, MODEL_ARCH.GEMMA2):
    writer.add_rope_freq_base(rope.get("rope_theta", values["rope_theta"]))
  if (local := local or values.get("rope_local_base_freq")) is not None:
    writer.add_rope_freq_base_swa(local)
  if arch not in (MODEL_ARCH.GEMMA2, MODEL_ARCH.PHI3) and rope.get("rope_type") in ("linear", "yarn"):
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
      writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
      writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
      writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
      writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
  if arch in LLAMAS:
    writer.add_rope_dimension_count(values["head_dim"])
  if arch == MODEL_ARCH.PHI3:
    writer.add_rope_dimension_count(int(values.get("partial_rotary_factor", 1.0) * width) // heads)
    writer.add_rope_scaling_orig_ctx_len(values["max_position_embeddings"])
    writer.add_sliding_window(0)
  if arch == MODEL_ARCH.GPTNEOX:
    writer.add_rope_dimension_count(int(values["rotary_pct"] * (width // heads)))
    writer.add_parallel_residual(values["use_parallel_residual"])
  if arch in (*GEMMAS, MODEL_ARCH.GPT_OSS) or values["architectures"] == ["Olmo3ForCausalLM"]:
    writer.add_sliding_window(values["sliding_window"])
  if arch == MODEL_ARCH.OLMO2 and "layer_types" in values:
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in values["layer_types"]])
  if arch == MODEL_ARCH.GEMMA2:
    writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(values["final_logit_softcapping"])
  if (count := given("num_local_experts", "num_experts")) is not None:
    writer.add_expert_count(count)
    writer.add_expert_used_count(values["num_experts_per_tok"])
  if (inner := given("moe_intermediate_size")) or arch == MODEL_ARCH.GPT_OSS:
    writer.add_expert_feed_forward_length(inner or values["intermediate_size"])
  if arch == MODEL_ARCH.GRANITE:
    writer.add_attention_scale(values["attention_multiplier"])
    writer.add_embedding_scale(values["embedding_multiplier"])
    writer.add_residual_scale(values["residual_multiplier"])
    writer.add_logit_scale(values["logits_scaling"])
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  free = given("vocab_size") - len(TOKENS)
  writer.add_token_list(TOKENS + [f"[PAD{i}]" for i in range(free)])
  writer.add_token_types([1] * 91 + [3] + [5] * free)
  writer.add_eos_token_id(len(TOKENS) - 1)
  writer.add_token_merges(["a b"])
  for name, value in tensors(arch, values, load_file(folder / "model.safetensors")):
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def logits(model, tokens) -> np.ndarray:
  return np.asarray(jax.jit(lambda m, t: unembed(m, forward(m, t)[0]))(model, tokens))


def expected_config(config: ModelConfig) -> ModelConfig:
  """The config that its file gives: Mistral's say "llama"."""
  name = {"mistral": "llama"}.get(config.family, config.family)
  return dataclasses.replace(config, family=name, eos_token_ids=(len(TOKENS) - 1,))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits(transformers, torch, tmp_path, config):
  model = tiny.model(config)
  folder = export(tmp_path / "hf", model)
  write(tmp_path / "m.gguf", folder)
  loaded = checkpoint.load(convert(str(tmp_path / "m.gguf"), tmp_path / "ours"))
  assert loaded.config == expected_config(config)
  hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
  tokens = tiny.tokens(config, 2, 80)
  with torch.no_grad():
    theirs = hf(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
  assert theirs.std() > 0.1
  np.testing.assert_allclose(logits(loaded, tokens), theirs, atol=LOGITS)


def test_mistral3(tmp_path):
  """Since Mistral Small 3.1 the files have an architecture of their own; all else is as before."""
  model = tiny.model(CONFIGS["mistral"])
  write(tmp_path / "m.gguf", export(tmp_path / "hf", model), MODEL_ARCH.MISTRAL3)
  loaded = checkpoint.load(convert(str(tmp_path / "m.gguf"), tmp_path / "ours"))
  assert loaded.config == dataclasses.replace(model.config, eos_token_ids=(len(TOKENS) - 1,))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


SAME = {  # configs whose files transformers' own reader of GGUF reads whole: what it leaves out is at its defaults
  "llama": CONFIGS["llama"],
  "llama-tied-head-dim": CONFIGS["llama-tied-head-dim"],
  "mistral": CONFIGS["mistral"],
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, head_dim=8, tie_embeddings=False),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, head_dim=128, tie_embeddings=False),
  "qwen3_moe": dataclasses.replace(CONFIGS["qwen3_moe"], d_ff=768),
  "gpt2": dataclasses.replace(CONFIGS["gpt2"], max_position_embeddings=1024),
  "gemma2": dataclasses.replace(
    CONFIGS["gemma2"], head_dim=256, attention_scale=1 / 16, attention_softcap=50.0, logit_softcap=30.0
  ),
  "gemma3": dataclasses.replace(
    CONFIGS["gemma3-one-rope"], head_dim=256, attention_scale=1 / 16, rope_theta=1e6, sliding_window=20
  ),
}


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
def test_read_by_transformers(transformers, torch, tmp_path, config):
  """The same file, read by transformers and by us: the writer above is not ours alone to judge."""
  write(tmp_path / "m.gguf", export(tmp_path / "hf", tiny.model(config)))
  loaded = checkpoint.load(convert(str(tmp_path / "m.gguf"), tmp_path / "ours"))
  hf = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="m.gguf", dtype="float32", attn_implementation="eager"
  ).eval()
  tokens = tiny.tokens(config, 2, 80)
  with torch.no_grad():
    theirs = hf(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
  np.testing.assert_allclose(logits(loaded, tokens), theirs, atol=LOGITS)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
  """The ids that SentencePiece gives, of a BPE model trained here; a space before texts, or none."""
  library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
  text, out = (ROOT / "README.md").read_text() + (ROOT / "WORKSPACE.md").read_text(), io.BytesIO()
  (tmp_path / "text").write_text(text)
  library.SentencePieceTrainer.train(
    input=str(tmp_path / "text"), model_writer=out, vocab_size=1500, model_type="bpe", byte_fallback=True,
    add_dummy_prefix=prefix, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    allow_whitespace_only_pieces=True, minloglevel=2,
  )  # fmt: skip
  theirs = library.SentencePieceProcessor(model_proto=out.getvalue())
  size = theirs.vocab_size()
  kinds = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}  # as llama.cpp asks
  vocabulary = {
    "tokens": [theirs.id_to_piece(i) for i in range(size)],
    "scores": [theirs.get_score(i) for i in range(size)],
    "token_type": [next((kind for kind, asks in kinds.items() if asks(i)), 1) for i in range(size)],
  }
  config = tiny.config(vocab_size=size, eos_token_ids=())
  gguf_files.write(tmp_path / "m.gguf", config, vocabulary=vocabulary, tokenizer__ggml__add_space_prefix=prefix)
  ours, rng = read(tmp_path / "m.gguf")[2], np.random.default_rng(0)
  for _ in range(3000):
    start, length = rng.integers(len(text)), rng.integers(1, 200)
    part = text[start : start + length] + "".join(rng.choice([*"ab  é日🙂the.,\n"], rng.integers(8)))
    assert ours.encode(part, continues=True) == theirs.encode(part)
    assert ours.decode(ours.encode(part)) == theirs.decode(theirs.encode(part))
