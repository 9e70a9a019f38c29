"""Model families: presets, config.json both ways, refusals, gates of released checkpoints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dms_jax import testing as tiny
from dms_jax.config import RopeScaling
from dms_jax.families import PRESETS, Family, base, register
from dms_jax.families.huggingface import config_from_hf, config_to_hf
from dms_jax.params import abstract_params, count_params, param_table

LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64)
LLAMA = tiny.config(rope_theta=500000.0, rope_scaling=LLAMA3, eos_token_ids=(3, 4))
PARAMETERS = {
  "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560,
  "mixtral-8x7b": 46_702_792_704,
  "mixtral-8x22b": 140_620_634_112,
  "mixtral-8x22b-v0.3": 140_630_071_296,
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "pythia-70m": 70_426_624,
  "pythia-160m": 162_322_944,
  "pythia-410m": 405_334_016,
  "pythia-1b": 1_011_781_632,
  "pythia-1.4b": 1_414_647_808,
  "pythia-2.8b": 2_775_208_960,
  "pythia-6.9b": 6_857_302_016,
  "pythia-12b": 11_846_072_320,
  "gemma-2-2b": 2_614_341_888,
  "gemma-2-9b": 9_241_705_984,
  "gemma-2-27b": 27_227_128_320,
  "gemma-3-270m": 268_098_176,
  "gemma-3-1b": 999_885_952,
  "granite-3.3-2b": 2_533_539_840,
  "granite-3.3-8b": 8_170_864_640,
  "mistral-7b-v0.3": 7_248_023_552,
  "mistral-nemo-12b": 12_247_782_400,
  "mistral-small-24b": 23_572_403_200,
  "olmo-2-1b": 1_484_916_736,
  "olmo-2-7b": 7_298_617_344,
  "olmo-2-13b": 13_716_198_400,
  "olmo-2-32b": 32_234_279_936,
  "olmo-3-7b": 7_298_011_136,
  "olmo-3-32b": 32_233_522_176,
  "gpt-oss-20b": 20_914_757_184,
  "gpt-oss-120b": 116_829_156_672,
  "phi-4": 14_659_507_200,
  "smollm3-3b": 3_075_098_624,
  "smollm2-135m": 134_515_008,
  "llama-2-7b": 6_738_415_616,
  "llama-3-8b": 8_030_261_248,
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-32b": 32_763_876_352,
  "qwen-r1-1.5b": 1_777_088_000,
  "qwen-r1-7b": 7_615_616_512,
  "qwen-r1-32b": 32_763_876_352,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
  """Published parameter counts, and the config file that describes them, both ways."""
  config = PRESETS[name]
  table = param_table(config)
  assert count_params(table) == PARAMETERS[name]
  tree = abstract_params(table, jnp.bfloat16)
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == PARAMETERS[name]
  each = (config.num_experts,) if config.num_experts else ()
  assert tree["layers"]["down_proj"].shape == (config.num_layers, *each, config.d_model, config.d_ff)
  assert config_from_hf(config_to_hf(config, "bfloat16"), name) == config


def hf_values(**changes) -> dict:
  return {**config_to_hf(LLAMA, "float32"), **changes}


def test_transformers_5_style():
  values = config_to_hf(LLAMA, "float32")
  scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
  values["rope_parameters"] = {**scaling, "rope_theta": theta}
  values["dtype"] = values.pop("torch_dtype")
  values["layer_types"] = ["full_attention"] * 2
  assert config_from_hf(values, "x") == LLAMA


def test_settings_keyed_by_layer_type():
  """As transformers 5 writes them for models whose layers may differ."""
  values = config_to_hf(LLAMA, "float32")
  settings = {**values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta")}
  values["rope_parameters"] = {"full_attention": settings, "sliding_attention": {"rope_theta": 7.0}}
  assert config_from_hf(values, "x") == LLAMA
  values["rope_parameters"] = {"sliding_attention": settings}
  with pytest.raises(ValueError, match="RoPE scaling of type 'sliding_attention"):
    config_from_hf(values, "x")
  values["rope_parameters"] = {"full_attention": {**settings, "partial_rotary_factor": 0.5}}
  with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
    config_from_hf(values, "x")


def test_olmo3_spelled_by_transformers_4():
  """As published: one theta for all layers, and the scaling of the global ones."""
  values = config_to_hf(PRESETS["olmo-3-7b"], "bfloat16")
  del values["rope_parameters"], values["layer_types"]
  assert config_from_hf(values, "x") == PRESETS["olmo-3-7b"]
  values["rope_parameters"] = {"sliding_attention": {"rope_type": "yarn"}}
  with pytest.raises(ValueError, match="RoPE scaling of type 'yarn' in sliding layers"):
    config_from_hf(values, "x")


def test_what_gpt_oss_leaves_out():
  """Layers that slide, the numbers of SwiGLU, and YaRN, as transformers has them; RoPE that is not scaled says so."""
  preset = PRESETS["gpt-oss-20b"]
  values = config_to_hf(preset, "bfloat16")
  for name in (
    "layer_types",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
    "rope_scaling",
    "rope_theta",
    "head_dim",
  ):
    del values[name]
  assert config_from_hf(values, "x") == preset
  plain = dataclasses.replace(preset, rope_scaling=None)
  assert config_from_hf(config_to_hf(plain, "bfloat16"), "x") == plain


def test_two_settings_of_rope():
  """rope_scaling is used, as in transformers 5; the theta inside the settings precedes the one beside them."""
  values = hf_values(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=3e4)
  assert config_from_hf(values, "x") == dataclasses.replace(LLAMA, rope_theta=3e4)
  values["rope_scaling"]["rope_theta"] = 2e4
  assert config_from_hf(values, "x") == dataclasses.replace(LLAMA, rope_theta=2e4)
  values.update(rope_scaling=None, rope_parameters={"rope_type": "linear", "factor": 1.0})
  assert config_from_hf(values, "x") == dataclasses.replace(LLAMA, rope_scaling=None, rope_theta=3e4)


def test_trained_length_of_llama3_scaling():
  """Beside the settings before inside, and max_position_embeddings where neither says it, as in transformers 5."""
  values = hf_values()
  values["rope_scaling"].pop("original_max_position_embeddings")
  assert config_from_hf(values, "x").rope_scaling.original_max_position_embeddings == LLAMA.max_position_embeddings
  assert config_from_hf({**values, "original_max_position_embeddings": 48}, "x").rope_scaling == dataclasses.replace(
    LLAMA3, original_max_position_embeddings=48
  )


def test_a_sliding_window_that_no_layer_has():
  for values in (
    dict(max_window_layers=2), dict(layer_types=["full_attention"] * 2, max_window_layers=0), dict(sliding_window=None),
    dict(sliding_window=2048),  # no text is longer
  ):  # fmt: skip
    values = hf_values(model_type="qwen2", use_sliding_window=True, **values)
    assert config_from_hf(values, "x").family == "qwen2"


def test_what_config_json_leaves_out():
  """The defaults of transformers' classes, and the older name of a rope type."""
  minimal = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
  llama = config_from_hf({"model_type": "llama", **minimal}, "x")
  assert (llama.head_dim, llama.num_kv_heads, llama.rope_theta, llama.rms_norm_eps) == (16, 4, 10000.0, 1e-6)
  assert not llama.tie_embeddings and not llama.qkv_bias and not llama.qk_norm and llama.eos_token_ids == ()
  assert config_from_hf({"model_type": "qwen3", **minimal}, "x").head_dim == 128
  qwen2 = config_from_hf({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False, **minimal}, "x")
  assert qwen2.qkv_bias and qwen2.vocab_size == 151936
  old = hf_values(rope_scaling={"type": "llama3", **dataclasses.asdict(LLAMA3)})
  assert config_from_hf(old, "x").rope_scaling == LLAMA3
  assert config_from_hf(hf_values(head_dim=None), "x").head_dim == 8  # 32 channels, 4 heads


def test_a_family_is_one_registration(monkeypatch):
  """A family that is registered is read and written; nothing else names it."""
  toy = Family(
    "toy", "ToyForCausalLM", defaults={"vocab_size": 97, "head_dim": 8}, own_keys={"toy": 1}, fixed={"qk_norm": True}
  )
  monkeypatch.setattr(base, "FAMILIES", dict(base.FAMILIES))
  with pytest.raises(ValueError, match=r"model\.family='toy' is not one of \w+"):
    tiny.config(family="toy")
  register(toy)
  config = tiny.config(family="toy", qk_norm=True, head_dim=8)
  values = config_to_hf(config, "float32")
  assert (values["architectures"], values["model_type"], values["toy"]) == (["ToyForCausalLM"], "toy", 1)
  assert config_from_hf({k: v for k, v in values.items() if k not in toy.defaults}, "x") == config


def test_end_tokens():
  assert config_from_hf(hf_values(eos_token_id=7), "x").eos_token_ids == (7,)
  assert config_from_hf(hf_values(eos_token_id=None), "x").eos_token_ids == ()
  assert config_from_hf(hf_values(eos_token_id=7), "x", {"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)
  assert config_from_hf(hf_values(eos_token_id=7), "x", {"temperature": 0.6}).eos_token_ids == (7,)


REFUSED = {
  "falcon": (dict(model_type="falcon"), ["model_type 'falcon'; supported are gemma3_text, gemma2"]),
  "mistral 0.1": (dict(model_type="mistral", sliding_window=1024), ["sliding window attention (sliding_window=1024)"]),
  "gemma 3 of images": (dict(model_type="gemma3"), ["model_type 'gemma3'"]),
  "phi-3 of 128K": (dict(model_type="phi3", rope_scaling={"type": "longrope"}), ["RoPE scaling of type 'longrope'"]),
  "nothing": (dict(model_type=None), ["model_type None"]),
  "sliding": (dict(sliding_window=1024), ["sliding window attention (sliding_window=1024)"]),
  "sliding qwen": (
    dict(model_type="qwen2", use_sliding_window=True, sliding_window=1024, max_window_layers=1),
    ["sliding window attention"],
  ),
  "sliding layers": (dict(layer_types=["full_attention", "sliding_attention"]), ["sliding window attention"]),
  "other layers": (
    dict(layer_types=["linear_attention", "full_attention"]),
    ["not supported: layers of type 'linear_attention' (layer_types)"],
  ),
  "other layers beside those that slide": (
    dict(model_type="gemma2", layer_types=["chunked_attention", "sliding_attention"]),
    ["layers of type 'chunked_attention' (layer_types)"],
  ),
  "experts": (dict(model_type="qwen2_moe", num_experts=128), ["mixture of experts (num_experts)", "'qwen2_moe'"]),
  "phimoe": (dict(model_type="phimoe", num_local_experts=8), ["mixture of experts"]),
  "mixtral that slides": (dict(model_type="mixtral", sliding_window=1024), ["sliding window attention"]),
  "mla": (dict(model_type="deepseek_v3", kv_lora_rank=512), ["multi-head latent attention, MLA (kv_lora_rank)"]),
  "dynamic": (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), ["RoPE scaling of type 'dynamic'"]),
  "partial": (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
  "bias": (dict(attention_bias=True, mlp_bias=True), ["attention_bias=true", "mlp_bias=true"]),
  "bias of qwen3": (dict(model_type="qwen3", attention_bias=True), ["attention_bias=true"]),
  "gelu": (dict(hidden_act="gelu"), ["hidden_act='gelu'"]),
  "both ways": (dict(is_causal=False), ["is_causal=false"]),
  "quantized": (dict(quantization_config={"quant_method": "gptq"}), ["quantized weights", "'gptq'"]),
  "all at once": (
    dict(model_type="phimoe", num_local_experts=8, sliding_window=1, hidden_act="relu", rope_scaling={"type": "ntk"}),
    ["mixture of experts", "model_type 'phimoe'", "sliding window", "'relu'", "'ntk'"],
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
  changes, reasons = REFUSED[name]
  with pytest.raises(ValueError, match=r"^the file: not supported: ") as error:
    config_from_hf(hf_values(**changes), "the file")
  assert all(reason in str(error.value) for reason in reasons), error.value


def test_malformed_configs():
  broken = dict(hidden_size="wide", num_hidden_layers=0, rms_norm_eps=None, num_key_value_heads=True, rope_theta="x")
  with pytest.raises(ValueError, match=r"^the file: ") as error:
    config_from_hf(hf_values(**broken), "the file")
  for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_theta"):
    assert field in str(error.value)
  with pytest.raises(ValueError, match="intermediate_size should be a positive number, found None"):
    config_from_hf({k: v for k, v in hf_values().items() if k != "intermediate_size"}, "x")
  with pytest.raises(ValueError, match=r"llama3 needs the number\(s\) \['low_freq_factor'"):
    config_from_hf(hf_values(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "x")
  with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
    config_from_hf(hf_values(num_key_value_heads=3), "x")


WRONG = [None, True, "8", "", -1, 0, 1.5, float("nan"), float("inf"), 1e308, 10**30, [], [1], {}, {"a": 1}]
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]


@pytest.mark.parametrize(
  ("key", "harmless"),
  [(name, []) for name in SIZES]
  + [
    ("num_key_value_heads", [None]), ("head_dim", [None]), ("max_position_embeddings", []),
    ("rms_norm_eps", [None]), ("rope_theta", [None, 1.5]), ("eos_token_id", [None, 0, [], [1]]),
    ("tie_word_embeddings", [None, True]), ("use_sliding_window", [None, True]), ("mlp_bias", [None]),
    ("layer_types", [None, []]), ("rope_scaling", [None, {}, {"a": 1}]), ("sliding_window", [None, 10**30]),
    ("partial_rotary_factor", [None, True]), ("hidden_act", []), ("model_type", []),
  ],
)  # fmt: skip
def test_values_of_wrong_types(key, harmless):
  """Each is refused in one line, or is what transformers takes for the default."""
  for value in WRONG:
    if key == "max_position_embeddings" and value is None:
      value = "2048"
    if any(value is h or (type(value) is type(h) and value == h) for h in harmless):
      config_from_hf(hf_values(**{key: value}), "x")
      continue
    with pytest.raises(ValueError, match=r"^x: ") as error:
      config_from_hf(hf_values(**{key: value}), "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(rope_theta=1e-300), "rope_theta=1e-300 must be between 1 and 1e15"),
    (dict(rms_norm_eps=2.0), r"rms_norm_eps=2\.0 must be at least 1e-30 and below 1"),
    (dict(eos_token_id=-5), r"\[-5\] are outside the vocabulary of 97"),
    (dict(eos_token_id=[1, 97]), r"\[97\] are outside the vocabulary of 97"),
    (dict(rope_scaling={"rope_type": "llama3", **dataclasses.asdict(LLAMA3), "factor": 0}), r"rope_scaling\.factor=0"),
    (
      dict(rope_scaling={"rope_type": "llama3", **dataclasses.asdict(LLAMA3), "high_freq_factor": 1.0}),
      "the first must be larger",
    ),
    (dict(layer_types=["full_attention"]), "layer_types names 1 layers of 2"),
  ],
)
def test_absurd_numbers(changes, message):
  with pytest.raises(ValueError, match=message):
    config_from_hf(hf_values(**changes), "x")
