"""Layouts of exports: round trips to the byte, names, shapes and keys of other projects, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.convert import About, convert, export
from dms_jax.convert.layouts import LAYOUTS
from dms_jax.convert.safetensors_file import WEIGHTS
from dms_jax.convert.writing import NEVER, SHARD_BYTES
from dms_jax.model import Model
from dms_jax.params import flatten, param_table
from dms_jax.tokenizer import byte_tokenizer
from experiments import export_torch
from tests.helpers import GATES, GOLDENS

ROOT = Path(__file__).parents[2]
FAMILIES = {
  "llama": tiny.config(tie_embeddings=False, eos_token_ids=(2,)),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, rms_norm_eps=1e-6),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32),
}
QWEN3 = FAMILIES["qwen3"]
LORA = LoRAConfig(2, 0.5, ("q_proj", "o_proj", "down_proj"))
ADAPTER, NEURON = tiny.dms(), tiny.dms(gate="neuron")
ABOUT = About(cr=4, base="some/base")


def stored(folder: Path) -> dict[str, Any]:
  """The content of a folder's files: tensors with their dtypes, JSON, text."""
  read = {".safetensors": load_file, ".json": lambda file: json.loads(file.read_text())}
  return {file.name: read.get(file.suffix, Path.read_text)(file) for file in folder.iterdir()}


def assert_same(first: Path, second: Path) -> None:
  """The same files, to the byte."""
  names = lambda folder: sorted(file.name for file in folder.iterdir())
  assert names(first) == names(second)
  for name in names(first):
    assert (first / name).read_bytes() == (second / name).read_bytes(), name


def gated(
  config: ModelConfig, gates: DMSConfig | None, lora: LoRAConfig | None = None, dtype: str = "float32"
) -> Model:
  """A model whose weights have a dtype, and whose gates are float32 and have more digits than bfloat16."""
  model = tiny.model(config, gates, lora)
  gate = {name for name, spec in param_table(config, gates, lora).items() if spec.group == "gate"}
  layers = {n: v if f"layers/{n}" in gate else v.astype(dtype) for n, v in model.params["layers"].items()}
  top = {n: v.astype(dtype) for n, v in model.params.items() if n != "layers"}
  return model.replace(params={**top, "layers": layers})


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10_000, SHARD_BYTES], ids=["shards", "single"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_both_ways(tmp_path, family, dtype, shard_bytes):
  """Model -> safetensors -> checkpoint -> safetensors: tensors, index and configs the same to the byte."""
  model = gated(FAMILIES[family], None, dtype=dtype)
  first = export(tmp_path / "first", model, shard_bytes=shard_bytes)
  assert len(list(first.glob("model-*.safetensors"))) > 3 or (shard_bytes == SHARD_BYTES and (first / WEIGHTS).exists())
  loaded = checkpoint.load(convert(str(first), tmp_path / "ours"))
  assert loaded.config == model.config and loaded.dtype == dtype
  for name, value in flatten(loaded.params).items():
    np.testing.assert_array_equal(value, flatten(model.params)[name])
  assert_same(first, export(tmp_path / "second", loaded, shard_bytes=shard_bytes))


CASES = {
  "transformers": ("transformers", FAMILIES["llama"], ADAPTER),
  "transformers-layer": ("transformers", FAMILIES["qwen2"], tiny.dms(granularity="layer", shift=0)),
  "transformers-neuron": ("transformers", FAMILIES["qwen2"], NEURON),
  "transformers-mlp": ("transformers", FAMILIES["qwen2"], DMSConfig(objective="kvzap", hidden=8)),
  "transformers-elastic": ("transformers", FAMILIES["llama"], tiny.dms(elastic=(2.0, 8.0))),
  "model_optimizer": ("model_optimizer", QWEN3, ADAPTER),
  "model_optimizer-layer": ("model_optimizer", QWEN3, tiny.dms(granularity="layer", window=512, offset=4.5)),
  "model_optimizer-off": ("model_optimizer", QWEN3, tiny.dms(offset=NEVER)),
  "nvidia_neuron": ("nvidia_neuron", QWEN3, tiny.dms(gate="neuron", window=512, scale=50.0)),
  "nvidia_neuron-window": ("nvidia_neuron", QWEN3, NEURON),
  "fastdms": ("fastdms", FAMILIES["llama"], tiny.dms(gate="neuron", shift=0)),
  "fastdms-qwen3": ("fastdms", QWEN3, tiny.dms(gate="neuron", shift=0, window=0)),
  "dms_torch": ("dms_torch", FAMILIES["llama"], ADAPTER),
  "dms_torch-layer": ("dms_torch", QWEN3, tiny.dms(granularity="layer", shift=0, window=0)),
  "dms_torch-neuron": ("dms_torch", FAMILIES["qwen2"], NEURON),
  "dms_torch-elastic": ("dms_torch", FAMILIES["llama"], tiny.dms(elastic=(2.0, 8.0))),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_each_layout_both_ways(tmp_path, name, dtype):
  """Layout -> checkpoint -> layout: every file the same to the byte, float32 gates beside bfloat16 weights too."""
  layout, config, gates = CASES[name]
  model = gated(config, gates, LORA, dtype)
  first = export(tmp_path / "first", model, layout=layout, about=ABOUT, shard_bytes=20_000)
  output = convert(str(first), tmp_path / "ours")
  loaded = checkpoint.load(output)
  assert (loaded.config, loaded.dms, loaded.lora, loaded.dtype) == (config, gates, None, dtype)
  for path, value in flatten(model.merged().params).items():
    rounded = dtype if layout == "model_optimizer" else value.dtype  # its one dtype rounds gates, too
    np.testing.assert_array_equal(flatten(loaded.params)[path], value.astype(rounded).astype(value.dtype))
  assert_same(first, export(tmp_path / "second", loaded, layout=layout, about=ABOUT, shard_bytes=20_000))
  found = checkpoint.read_config(output)[0]["metadata"]["gates"]
  assert (found["layout"], found["shift"], found["window"]) == (layout, gates.shift, gates.window)
  assert found.get("cr") == (None if layout in ("transformers", "dms_torch") else 4)
  assert checkpoint.read_config(output)[0]["metadata"]["base_model"] == "some/base"


@pytest.mark.parametrize("gates", [None, [1], "x", {"cr": "8", "base": 5}, {"cr": 0.5, "base": "a\nb/c"}])
@pytest.mark.parametrize("retrofit", [None, 3, {"schedule": 5}, {"final_cr": None}, {"schedule": {"final_cr": 4}}])
def test_what_a_checkpoint_notes_may_be_anything(gates, retrofit):
  metadata = {"gates": gates, "retrofit": retrofit, "base_model": 7, "source": ["x"]}
  wanted = 4 if isinstance(retrofit, dict) and isinstance(retrofit.get("schedule"), dict) else None
  assert export_torch.trained_ratio(metadata) == wanted and export_torch.base_name(metadata) is None


@pytest.mark.parametrize("gates", [None, ADAPTER, NEURON, tiny.dms(elastic=(2.0, 8.0))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_both_ways(tmp_path, gates, dtype):
  """PEFT's folder -> retrofit -> the same folder, and the retrofit on its base is the model that was exported."""
  model = gated(FAMILIES["llama"], gates, LORA, dtype)
  checkpoint.save(tmp_path / "base", model, groups=("base",))
  first = export(tmp_path / "first", model, layout="peft", about=ABOUT)
  retrofit = convert(str(first), tmp_path / "retrofit", base=str(tmp_path / "base"))
  loaded = checkpoint.load(tmp_path / "base", retrofit=retrofit, merge=False)
  assert (loaded.dms, loaded.lora) == (gates, LORA)
  for path, value in flatten(model.params).items():
    np.testing.assert_array_equal(flatten(loaded.params)[path], value)
    assert flatten(loaded.params)[path].dtype == value.dtype
  assert_same(first, export(tmp_path / "second", loaded, layout="peft", about=ABOUT))


@pytest.mark.parametrize(("rank", "scale"), [(3, 0.1), (7, 1 / 3), (16, 2.0), (5, 1.7)])
def test_a_scale_that_is_no_fraction_of_the_rank(tmp_path, rank, scale):
  """PEFT stores scale * r. Two roundings leave the scale within one unit in the last place."""
  model = tiny.model(FAMILIES["llama"], None, LoRAConfig(rank, scale, ("q_proj",)))
  path = export(tmp_path / "peft", model, layout="peft")
  values = json.loads((path / "adapter_config.json").read_text())
  np.testing.assert_allclose(values["lora_alpha"] / values["r"], scale, rtol=3e-16)
  base = export(tmp_path / "base", tiny.model(FAMILIES["llama"]))
  lora = checkpoint.read_config(convert(str(path), tmp_path / "ours", base=str(base)))[3]
  np.testing.assert_allclose(lora.scale, scale, rtol=3e-16)


# Names, shapes and keys -----------------------------------------------------------------------------------------------

DEFAULTS = dict(  # of Model-Optimizer's config class
  dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_window_size=512, dms_paged_attention_block_size=256,
  dms_cr=8, dms_disable_eviction=False, dms_separate_alpha=False, dms_alpha_per="head", dms_tau=0.1,
  dms_manual_inference_mode=False, dms_chunked_prefill=None, dms_preallocate_for_tokens=4096,
)  # fmt: skip


def check_class(values: dict) -> dict:
  """What Model-Optimizer's config class makes of config.json: its defaults, and its assertions."""
  keys = {**DEFAULTS, **{name: value for name, value in values.items() if name.startswith("dms_")}}
  assert set(keys) == set(DEFAULTS)
  assert keys["dms_window_size"] > keys["dms_paged_attention_block_size"] > 0
  assert keys["dms_alpha_per"] in ("head", "layer")
  return keys


def student_shapes(c: ModelConfig, separate: bool) -> dict[str, tuple[int, ...]]:
  """Every tensor of a Qwen3 of this shape, untied, and of the adapter."""
  d, h, n, k = c.d_model, c.head_dim, c.num_heads, c.num_kv_heads
  shapes = {
    "model.embed_tokens.weight": (c.vocab_size, d),
    "model.norm.weight": (d,),
    "lm_head.weight": (c.vocab_size, d),
  }
  for i in range(c.num_layers):
    parts = {
      "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (n * h, d),
      "self_attn.k_proj": (k * h, d), "self_attn.v_proj": (k * h, d), "self_attn.o_proj": (d, n * h),
      "self_attn.q_norm": (h,), "self_attn.k_norm": (h,), "mlp.gate_proj": (c.d_ff, d), "mlp.up_proj": (c.d_ff, d),
      "mlp.down_proj": (d, c.d_ff),
    }  # fmt: skip
    if separate:
      parts |= {"self_attn.dms_proj_alpha": (k, d), "self_attn.dms_proj_alpha_norm": (d,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
  return shapes


@pytest.mark.parametrize(("window", "block"), [(2, 1), (3, 2), (5, 4), (16, 8), (256, 128), (257, 256), (512, 256)])
def test_the_layout_of_model_optimizer(tmp_path, window, block):
  model = tiny.model(QWEN3, tiny.dms(window=window, granularity="layer"))
  path = export(tmp_path / "student", model, byte_tokenizer(), layout="model_optimizer", dtype="bfloat16", about=ABOUT)
  tensors = load_file(path / "model.safetensors")
  assert {name: value.shape for name, value in tensors.items()} == student_shapes(QWEN3, separate=True)
  assert {value.dtype for value in tensors.values()} == {jnp.dtype("bfloat16")}
  values = json.loads((path / "config.json").read_text())
  assert "architectures" not in values and values["model_type"] == "qwen3" and values["torch_dtype"] == "bfloat16"
  modules = ("Model", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
  assert values["auto_map"] == {"AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS"} | {
    f"AutoModel{name.removeprefix('Model')}": f"modeling_qwen3_dms.Qwen3{name}DMS" for name in modules
  }
  own = {name for name in values if name.startswith("dms_")}
  assert own == set(DEFAULTS)
  changed = dict(
    dms_window_size=window, dms_paged_attention_block_size=block, dms_cr=4, dms_separate_alpha=True,
    dms_alpha_per="layer",
  )  # fmt: skip
  assert check_class(values) == {**DEFAULTS, **changed}
  assert {file.name for file in path.iterdir()} == {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
  }  # fmt: skip


def test_the_layout_of_the_hub_model(tmp_path):
  """Four keys and auto_map; a window that Model-Optimizer's page does not fit also states a smaller page."""
  for window, extra in ((512, {}), (16, {"dms_paged_attention_block_size": 8})):
    gates = tiny.dms(gate="neuron", window=window)
    path = export(tmp_path / f"w{window}", tiny.model(QWEN3, gates), layout="nvidia_neuron", about=About(cr=8))
    tensors = load_file(path / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == student_shapes(QWEN3, separate=False)
    values = json.loads((path / "config.json").read_text())
    assert values["auto_map"] == {
      "AutoConfig": "configuration_qwen3_dms.Qwen3Config",
      "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLM",
    }
    keys = dict(dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_window_size=window, dms_cr=8)
    assert {n: v for n, v in values.items() if n.startswith("dms_")} == {**keys, **extra}
    assert values["use_cache"] is True and not values.get("use_sliding_window") and check_class(values)


def test_the_layout_of_fastdms(tmp_path):
  """dms_metadata.json as its loader reads it, with the shift; the same keys in config.json."""
  model = tiny.model(FAMILIES["llama"], tiny.dms(gate="neuron", shift=0, window=256))
  path = export(tmp_path / "fastdms", model, layout="fastdms", about=About(cr=8, base="meta-llama/Llama-3.2-1B"))
  assert json.loads((path / "dms_metadata.json").read_text()) == dict(
    window_size=256, alpha_scale=100.0, alpha_offset=5.0, target_cr=8, base_model="meta-llama/Llama-3.2-1B", shift=0
  )
  values = json.loads((path / "config.json").read_text())
  assert values["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in values
  assert {n: v for n, v in values.items() if n.startswith("dms_")} == dict(
    dms_window_size=256, dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_cr=8, dms_shift=0
  )
  assert not any("dms" in name for name in load_file(path / "model.safetensors"))
  del values["dms_cr"]
  again = export(tmp_path / "unknown", model, layout="fastdms")  # an unknown ratio is not made up
  assert json.loads((again / "config.json").read_text()) == values


def test_the_layout_of_peft(tmp_path):
  model = tiny.model(FAMILIES["llama"], ADAPTER, LORA)
  path = export(tmp_path / "peft", model, layout="peft", about=ABOUT)
  c = model.config
  sides = {  # inputs and outputs
    "self_attn.q_proj": (c.d_model, c.num_heads * c.head_dim),
    "self_attn.o_proj": (c.num_heads * c.head_dim, c.d_model),
    "mlp.down_proj": (c.d_ff, c.d_model),
  }  # fmt: skip
  expected = {}
  for i in range(c.num_layers):
    for name, (inputs, outputs) in sides.items():
      module = f"base_model.model.model.layers.{i}.{name}"
      expected |= {f"{module}.lora_A.weight": (2, inputs), f"{module}.lora_B.weight": (outputs, 2)}
  tensors = load_file(path / "adapter_model.safetensors")
  assert {name: value.shape for name, value in tensors.items()} == expected  # and no gate among them
  values = json.loads((path / "adapter_config.json").read_text())
  assert (values["r"], values["lora_alpha"], values["target_modules"]) == (2, 1, ["q_proj", "o_proj", "down_proj"])
  assert (values["peft_type"], values["task_type"], values["bias"]) == ("LORA", "CAUSAL_LM", "none")
  assert values["base_model_name_or_path"] == "some/base" and values["inference_mode"] is True
  assert {"dms_config.json", "dms_gates.safetensors"} <= {file.name for file in path.iterdir()}
  assert "runs the updated model with its full cache" in (path / "README.md").read_text()


@pytest.mark.parametrize("kind", GATES)
def test_goldens_of_nvidia_unchanged(tmp_path, kind):
  """Checkpoints that NVIDIA's code wrote -> our checkpoint -> the same tensors to the bit, and the same keys."""
  (tmp_path / "theirs").mkdir()
  shutil.copy(GOLDENS / f"{kind}.safetensors", tmp_path / "theirs" / "model.safetensors")
  shutil.copy(GOLDENS / f"{kind}.config.json", tmp_path / "theirs" / "config.json")
  output = convert(str(tmp_path / "theirs"), tmp_path / "ours")
  layout = {"separate_head": "model_optimizer", "neuron_head": "nvidia_neuron"}[kind]
  found = checkpoint.read_config(output)[0]["metadata"]["gates"]
  assert (found["layout"], found["cr"]) == (layout, 8)
  path = export(tmp_path / "again", checkpoint.load(output), layout=layout, about=About(cr=found["cr"]))
  theirs, ours = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(path / "model.safetensors")
  assert set(theirs) == set(ours)
  for name, value in theirs.items():
    assert value.dtype == ours[name].dtype and value.tobytes() == ours[name].tobytes(), name
  before, after = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "theirs", path))
  keys = lambda values: {n: v for n, v in values.items() if n.startswith("dms_")}
  # How many tokens it allocates for at first is a setting of speed, for which we write its default.
  expected = {**keys(before), "dms_preallocate_for_tokens": 4096}
  assert check_class(after) == expected
  if layout == "model_optimizer":
    assert keys(after) == expected
  again = checkpoint.read_config(convert(str(path), tmp_path / "ours again"))
  assert again[1:] == checkpoint.read_config(output)[1:]


# Refusals -------------------------------------------------------------------------------------------------------------

LATE = "no change of weights makes them equal"
REFUSED = {
  "no gates": ("model_optimizer", QWEN3, None, r"no gates \(--layout=transformers holds a model without\)"),
  "family": ("model_optimizer", FAMILIES["llama"], ADAPTER, r"family 'llama' \(its code has qwen3\)"),
  "family of the hub": ("nvidia_neuron", FAMILIES["qwen2"], NEURON, r"family 'qwen2' \(its code has qwen3\)"),
  "family of fastdms": ("fastdms", FAMILIES["qwen2"], tiny.dms(gate="neuron", shift=0), "its code has llama and qwen3"),
  "neuron": ("model_optimizer", QWEN3, NEURON, r"gate 'neuron' \(it holds 'adapter'\)"),
  "adapter": ("nvidia_neuron", QWEN3, ADAPTER, r"gate 'adapter' \(it holds 'neuron'\)"),
  "adapter of fastdms": ("fastdms", QWEN3, tiny.dms(shift=0), r"gate 'adapter' \(it holds 'neuron'\)"),
  "mlp": ("model_optimizer", QWEN3, DMSConfig("mlp", shift=1), r"gate 'mlp' \(it holds 'adapter'\)"),
  "shift 0": ("model_optimizer", QWEN3, tiny.dms(shift=0), f"about the token before, shift 1; .*{LATE}"),
  "shift 0 neuron": ("nvidia_neuron", QWEN3, tiny.dms(gate="neuron", shift=0), LATE),
  "shift 1": ("fastdms", FAMILIES["llama"], NEURON, f"about the token itself, shift 0; .*{LATE}"),
  "granularity": ("nvidia_neuron", QWEN3, tiny.dms(gate="neuron", granularity="layer"), "granularity 'layer'"),
  "immediate": ("model_optimizer", QWEN3, tiny.dms(eviction="immediate"), "eviction 'immediate'"),
  "window": ("model_optimizer", QWEN3, tiny.dms(window=1), r"window 1 \(its code takes 2 or more\)"),
  "window of the hub": ("nvidia_neuron", QWEN3, tiny.dms(gate="neuron", window=0), r"window 0 \(its code takes 2"),
  "objective": ("model_optimizer", QWEN3, DMSConfig(objective="trimkv"), r"gates of retrofit\.objective=trimkv"),
  "elastic": ("model_optimizer", QWEN3, tiny.dms(elastic=(2.0, 8.0)), "choose one with --cr, from 2 to 8"),
  "off": ("nvidia_neuron", QWEN3, tiny.dms(gate="neuron", offset=NEVER), "eviction switched off"),
  "off in fastdms": ("fastdms", QWEN3, tiny.dms(gate="neuron", shift=0, offset=NEVER), "eviction switched off"),
  "no updates": ("peft", QWEN3, ADAPTER, "no low-rank updates apart from its weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
  layout, config, gates, message = REFUSED[name]
  with pytest.raises(ValueError, match=f"^--layout={layout} cannot hold this model: .*{message}") as error:
    export(tmp_path / "out", tiny.model(config, gates), layout=layout)
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_every_reason_is_named(tmp_path):
  gates = tiny.dms(gate="neuron", shift=0, window=0, granularity="layer")
  with pytest.raises(ValueError, match=r"family .*; gate .*; shift .*; window ") as error:
    export(tmp_path / "out", tiny.model(FAMILIES["llama"], gates), layout="model_optimizer")
  assert [word in str(error.value) for word in ("'llama'", "'neuron'", "shift 0", "window 0")] == [True] * 4
  with pytest.raises(ValueError, match=f"--layout=gguf: must be one of {', '.join(LAYOUTS)}"):
    export(tmp_path / "out", tiny.model(), layout="gguf")


def test_gates_for_a_range_of_ratios_are_fixed_at_one(tmp_path):
  """The threshold of the ratio joins the offset: at the pivot it is 0."""
  gates = tiny.dms(elastic=(2.0, 8.0))
  model = tiny.model(QWEN3, gates)
  for cr in (2.0, 4.0, 8.0):
    path = export(tmp_path / f"cr{cr:g}", model, layout="model_optimizer", about=About(cr=cr))
    dms = checkpoint.load(convert(str(path), tmp_path / f"ours{cr:g}")).dms
    expected = gates.offset - 4.0 * np.log((cr - 1) / 3)  # slope 4, pivot 4
    np.testing.assert_allclose(dms.offset, expected, rtol=1e-6)
    assert dataclasses.replace(dms, offset=5.0) == tiny.dms()
    assert json.loads((path / "config.json").read_text())["dms_cr"] == cr
  with pytest.raises(ValueError, match="--cr=9: these gates are for ratios from 2 to 8"):
    export(tmp_path / "out", model, layout="model_optimizer", about=About(cr=9))


def test_updates_by_cr_are_fixed_at_one(tmp_path):
  """No layout scales updates by the row: each needs a ratio, and holds the model at it."""
  model = tiny.model(QWEN3, tiny.dms(elastic=(2.0, 8.0)), dataclasses.replace(LORA, by_cr=True))
  path = export(tmp_path / "out", model, layout="transformers", about=About(cr=4))
  loaded = checkpoint.load(convert(str(path), tmp_path / "ours"))
  for name, value in flatten(model.at(4).params).items():
    np.testing.assert_array_equal(flatten(loaded.params)[name], value)
  for layout in LAYOUTS:
    with pytest.raises(ValueError, match=r"updates by each row's CR \(choose one with --cr, from 2 to 8\)"):
      export(tmp_path / "refused", model, layout=layout)


def test_another_layout_takes_the_place_of_an_export(tmp_path):
  """--overwrite replaces the folder of any layout, and nothing else."""
  model = tiny.model(QWEN3, ADAPTER, LORA)
  for layout in ("transformers", "model_optimizer", "peft", "transformers"):
    path = export(tmp_path / "out", model, byte_tokenizer(), layout=layout, overwrite=True)
    assert f"in the layout `{layout}`" in (path / "README.md").read_text()
  (path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="not something this program wrote"):
    export(path, model, layout="peft", overwrite=True)


# Programs -------------------------------------------------------------------------------------------------------------


def run_program(name: str, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
  )


@pytest.mark.slow
def test_programs(tmp_path):
  """A checkpoint and its retrofit -> PEFT's folder -> the retrofit; a layout that does not fit is one line of error."""
  config = dataclasses.replace(FAMILIES["llama"], vocab_size=257)
  model = tiny.model(config, ADAPTER, LORA)
  checkpoint.save(tmp_path / "base", model, byte_tokenizer(), groups=("base",), metadata={"source": "some/base"})
  noted = {"retrofit": {"schedule": {"final_cr": 4.4}}}
  checkpoint.save(tmp_path / "retrofit", model, groups=("gate", "lora"), metadata=noted)
  folders = {"checkpoint": "base", "retrofit": "retrofit", "output": "out"}
  export_flags = [f"--{flag}={tmp_path / name}" for flag, name in folders.items()]
  done = run_program("export_torch", *export_flags, "--layout=fastdms")
  assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
  assert "--layout=fastdms cannot hold this model: gate 'adapter'" in done.stderr.splitlines()[-1]
  done = run_program("export_torch", *export_flags, "--layout=peft")
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  assert (line["layout"], line["cr"], line["base"]) == ("peft", 4.4, "some/base")
  ours = f"--output={tmp_path / 'again'}"
  done = run_program("convert_weights", f"--source={tmp_path / 'out'}", f"--base={tmp_path / 'base'}", ours)
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  assert (line["groups"], line["gates"], line["layout"]) == (["gate", "lora"], "adapter", "peft")
  assert "gates: gate adapter, window 5, shift 1" in done.stderr
  loaded = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "again", merge=False)
  for path, value in flatten(model.params).items():
    np.testing.assert_array_equal(flatten(loaded.params)[path], value)
