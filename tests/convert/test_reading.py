"""Reading other projects' directories: gates, shift and window, base, tokenizer; refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.convert import About, api, convert, export
from dms_jax.convert.layouts import fastdms, nvidia, transformers
from dms_jax.convert.writing import NEVER
from dms_jax.families.huggingface import config_from_hf, config_to_hf
from dms_jax.gates import gate_logits
from dms_jax.tokenizer import Tokenizer, byte_tokenizer
from experiments import convert_weights
from experiments.common import program
from tests.helpers import OTHER_FAMILIES

LLAMA = tiny.config()
HUB_MAP = {"AutoConfig": "configuration_qwen3_dms.Qwen3Config"}  # of nvidia/Qwen3-8B-DMS-8x
KEYS = dict(dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_window_size=512, dms_cr=8)


def hf_values(**changes) -> dict:
  return {**config_to_hf(LLAMA, "float32"), **changes}


def read_nvidia(**keys) -> DMSConfig | None:
  found = nvidia.read(hf_values(auto_map=HUB_MAP, **keys), "x")
  return None if found is None else found.dms


def noted(output: Path) -> dict:
  return checkpoint.read_config(output)[0]["metadata"]


def edit(file: Path, drop=(), **changes) -> None:
  values = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))


# Gates: shift, window, scale and offset -------------------------------------------------------------------------------


def test_gates_of_nvidia_checkpoints():
  """The hub's four keys with auto_map, and a student's: shift 1."""
  assert read_nvidia(**KEYS) == DMSConfig("neuron", 512, 100.0, 5.0, 1, "head")
  student = dict(KEYS, dms_separate_alpha=True, dms_alpha_per="layer", dms_window_size=256, dms_alpha_scale=50)
  assert read_nvidia(**student) == DMSConfig("adapter", 256, 50.0, 5.0, 1, "layer")
  assert read_nvidia() is None
  with pytest.raises(ValueError, match="x: dms_window_size should be a number, found 'big'"):
    read_nvidia(**dict(KEYS, dms_window_size="big"))
  with pytest.raises(ValueError, match=r"dms\.granularity"):
    read_nvidia(**dict(KEYS, dms_alpha_per="token"))
  for name in ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_shift", "dms_cr"):
    for value in (float("nan"), float("inf"), True, "5", [5], 10**40):
      with pytest.raises(ValueError, match=f"x: {name} should be a number"):
        read_nvidia(**dict(KEYS, **{name: value}))
  with pytest.raises(ValueError, match="x: dms_disable_eviction should be true or false, found 'no'"):
    read_nvidia(**KEYS, dms_disable_eviction="no")


def test_a_file_that_does_not_say_whose_decision_it_is():
  """NVIDIA's three keys alone are also FastDMS's, which means another token: the file must say it."""
  with pytest.raises(ValueError, match=r'x: nothing says which token .* add "dms_shift": 1 to config\.json'):
    nvidia.read(hf_values(**KEYS), "x")
  for shift in (0, 1):
    found = nvidia.read(hf_values(**KEYS, dms_shift=shift), "x")
    assert found is not None and found.dms.shift == shift and found.assumed == ()
  for own in (dict(auto_map=HUB_MAP), dict(dms_separate_alpha=False), dict(dms_alpha_per="head"), dict(dms_tau=0.1)):
    found = nvidia.read(hf_values(**KEYS, **own), "x")
    assert found is not None and found.dms.shift == 1
    assert found.assumed == ("shift 1: NVIDIA's code decides about the token before",)


def test_what_no_file_states_is_listed(tmp_path):
  """Defaults are those of the layout's own code, and the report names each."""
  found = nvidia.read(hf_values(dms_separate_alpha=True), "x")
  assert found is not None and found.dms == DMSConfig("adapter", 512, 100.0, 5.0, 1, "head") and found.cr is None
  assert [line.split(":")[0] for line in found.assumed] == ["window 512", "shift 1", "scale 100", "offset 5"]
  assert "no dms_window_size, the default there" in found.assumed[0]
  found = fastdms.read({"alpha_scale": 50, "target_cr": 8}, "x")
  assert found.dms == DMSConfig("neuron", 256, 50.0, 5.0, 0, "head") and found.cr == 8
  assert [line.split(":")[0] for line in found.assumed] == ["window 256", "shift 0", "offset 5"]
  assert fastdms.read({"window_size": 7, "alpha_scale": 1, "alpha_offset": 2, "shift": 0}, "x").assumed == ()


def test_gates_of_fastdms_checkpoints(tmp_path):
  """dms_metadata.json precedes the keys of config.json; either spelling, at the top or under "config"."""
  assert transformers.gates(tmp_path, hf_values()) is None
  for metadata in (
    {"window_size": 128, "alpha_offset": 4.25},
    {"window_size": 128, "dms_window_size": 3, "dms_alpha_offset": 4.25},
    {"config": {"dms_window_size": 128, "dms_initial_alpha_offset": 4.25}},
  ):
    (tmp_path / fastdms.METADATA).write_text(json.dumps(metadata))
    found = transformers.gates(tmp_path, hf_values(**KEYS))
    assert found is not None and found.dms == DMSConfig("neuron", 128, 100.0, 4.25, 0, "head")
    assert (found.layout, found.file) == ("fastdms", "dms_metadata.json")
  with pytest.raises(ValueError, match="sidecar"):
    fastdms.read({"schema_version": 2, "sidecar": {}}, "x")
  with pytest.raises(ValueError, match="config should be an object, found 3"):
    fastdms.read({"config": 3}, "x")
  with pytest.raises(ValueError, match=r"x: shift=0\.5 is not a whole number"):
    fastdms.read({"shift": 0.5}, "x")


def test_eviction_switched_off():
  """dms_disable_eviction: the channel of the gate stays out of attention, and no token is evicted."""
  keys = dict(KEYS, dms_window_size=4)
  gates = read_nvidia(**keys, dms_disable_eviction=True)
  assert gates == DMSConfig("neuron", 4, 100.0, NEVER, 1, "head")
  on = read_nvidia(**keys, dms_disable_eviction=False)
  q = jnp.full((1, 3, 4, 8), 3.0)
  assert (gate_logits(LLAMA, on, {}, q[..., 0, :], q) > 0).all()
  assert (gate_logits(LLAMA, gates, {}, q[..., 0, :], q) < 0).all()


def test_the_output_of_fastdms_training(tmp_path):
  """OUT/final beside OUT/training_log.json, whose config holds the gates' settings; other logs of this name do not."""
  (tmp_path / "final").mkdir()
  log = tmp_path / "training_log.json"
  settings = {"model": "some/base", "window_size": 64, "alpha_scale": 50.0, "alpha_offset": 4.0, "target_cr": 8}
  log.write_text(json.dumps({"config": settings}))
  found = transformers.gates(tmp_path / "final", hf_values())
  assert found is not None and found.dms == DMSConfig("neuron", 64, 50.0, 4.0, 0, "head")
  assert (found.file, found.cr, found.base) == ("training_log.json", 8, "some/base")
  for content in ("[1]", "{", '{"config": {"lr": 1}}', '{"config": 3}'):
    log.write_text(content)
    assert transformers.gates(tmp_path / "final", hf_values()) is None


def test_what_was_read_is_noted(tmp_path):
  model = tiny.model(tiny.config(tie_embeddings=False), tiny.dms(gate="neuron", shift=0))
  path = export(tmp_path / "hf", model, layout="fastdms", about=About(cr=4.5, base="some/base"))
  assert noted(convert(str(path), tmp_path / "ours"))["gates"] == dict(
    layout="fastdms", file="dms_metadata.json", gate="neuron", window=5, scale=100.0, offset=5.0, shift=0,
    granularity="head", cr=4.5, base="some/base", assumed=[],
  )  # fmt: skip
  (path / "dms_metadata.json").unlink()  # config.json says the same, the shift too
  assert checkpoint.load(convert(str(path), tmp_path / "again")).dms == model.dms


# Tokenizer and base ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_from_elsewhere(tmp_path):
  """--tokenizer, for a source without one; which model's is noted for the message."""
  config = tiny.config(vocab_size=257)
  path = export(tmp_path / "hf", tiny.model(config))
  (tmp_path / "base").mkdir()
  byte_tokenizer().save(tmp_path / "base")
  output = convert(str(path), tmp_path / "ours")
  assert not (output / "tokenizer.json").exists() and noted(output)["base_model"] is None
  tokenizer = str(tmp_path / "base")
  assert not api.is_finished(str(path), output, tokenizer=tokenizer)
  with pytest.raises(ValueError, match="this source with other flags; pass --overwrite"):
    convert(str(path), output, tokenizer=tokenizer)
  convert(str(path), output, tokenizer=tokenizer, overwrite=True)
  assert Tokenizer.load(output).encode("A") == [65]
  assert api.is_finished(str(path), output, tokenizer=tokenizer) and api.is_finished(str(path), output)
  with pytest.raises(ValueError, match="--tokenizer=nowhere: no such file or directory"):
    convert(str(path), tmp_path / "other", tokenizer="nowhere")
  with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
    convert(str(path), tmp_path / "other", tokenizer=str(path))


@pytest.mark.parametrize(
  ("card", "config", "expected"),
  [
    ("---\nbase_model: Qwen/Qwen3-8B\n---\n", {}, "Qwen/Qwen3-8B"),
    ("---\nbase_model:\n- meta-llama/Llama-3.2-1B\n---\n", {"_name_or_path": "x"}, "meta-llama/Llama-3.2-1B"),
    ("no front matter", {"_name_or_path": "Qwen/Qwen3-8B"}, "Qwen/Qwen3-8B"),
    ("no front matter", {}, None),
  ],
)
def test_the_base_that_files_name(tmp_path, card, config, expected):
  path = export(tmp_path / "hf", tiny.model(LLAMA))
  (path / "README.md").write_text(card)
  edit(path / "config.json", **config)
  assert noted(convert(str(path), tmp_path / "ours"))["base_model"] == expected


def test_the_program_says_what_it_assumes_and_whose_tokenizer_is_missing(tmp_path, monkeypatch, capsys):
  """The hub's checkpoint has no tokenizer files, and its config.json does not state the shift."""
  qwen3 = tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False)
  model = tiny.model(qwen3, tiny.dms(gate="neuron", window=16))
  path = export(tmp_path / "hf", model, layout="nvidia_neuron", about=About(cr=8, base="Qwen/Qwen3-8B"))
  config = convert_weights.Config(str(path), str(tmp_path / "ours"))
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  convert_weights.main()
  said = capsys.readouterr().err
  assert "gates: gate neuron, window 16, shift 1, scale 100.0, offset 5.0" in said
  assert "assumed: shift 1: NVIDIA's code decides about the token before" in said
  assert "with the tokenizer of Qwen/Qwen3-8B: --tokenizer=Qwen/Qwen3-8B --overwrite" in said


# Pickles --------------------------------------------------------------------------------------------------------------


def write_pickle(path: Path, names: bytes) -> None:
  """The parts of a torch.save archive that are looked at."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}" + names)


def test_pickles_are_refused_with_the_way_to_safetensors(tmp_path):
  write_pickle(tmp_path / "pytorch_model.bin", b"model.norm.weight")
  with pytest.raises(ValueError, match=r"only pytorch_model\.bin: pickles can run code.*save_pretrained\('NEW'\)"):
    convert(str(tmp_path), tmp_path / "ours")
  with pytest.raises(ValueError, match=r"pickles can run code.*save_pretrained"):
    convert(str(tmp_path / "pytorch_model.bin"), tmp_path / "ours")
  (tmp_path / "pytorch_model.bin").write_bytes(b"not an archive")
  with pytest.raises(ValueError, match="pickles can run code"):
    convert(str(tmp_path), tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_a_checkpoint_of_model_optimizers_training(tmp_path):
  """checkpoint-N/pytorch_model.bin holds student and teacher; the message names the program that takes them apart."""
  folder = tmp_path / "checkpoint-238"
  folder.mkdir()
  write_pickle(folder / "pytorch_model.bin", b"student_model.model.norm.weight")
  expected = (
    rf"python -m models\.qwen3\.extract --config {tmp_path}/config\.yaml --checkpoint {folder} --output STUDENT"
  )
  with pytest.raises(ValueError, match=expected):
    convert(str(folder), tmp_path / "ours")


# Adapters of PEFT -----------------------------------------------------------------------------------------------------


def test_experts_in_mxfp4(tmp_path):
  """As gpt-oss is published: 4 bits a number, the first in the low ones, and a power of two for 32 numbers of a row."""
  config = dataclasses.replace(OTHER_FAMILIES["gpt_oss"], d_ff=32)
  path, rng = export(tmp_path / "hf", tiny.model(config)), np.random.default_rng(0)
  edit(path / "config.json", quantization_config={"quant_method": "mxfp4"})
  tensors, expected = load_file(path / "model.safetensors"), {}
  for layer, name in itertools.product(range(2), ("gate_up_proj", "down_proj")):
    name = f"model.layers.{layer}.mlp.experts.{name}"
    experts, inputs, outputs = tensors.pop(name).shape
    codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32), dtype=np.uint8)
    scales = rng.integers(100, 130, codes.shape[:3], dtype=np.uint8)
    tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = codes[..., ::2] | codes[..., 1::2] << 4, scales
    sign, power, half = np.where(codes & 8, -1.0, 1.0), (codes >> 1) & 3, codes & 1  # 1 sign, 2 exponent, 1 mantissa
    numbers = sign * np.where(power == 0, half / 2, (1 + half / 2) * 2.0 ** (power.astype(int) - 1))
    wide = numbers * 2.0 ** (scales.astype(int) - 127)[..., None]
    expected[name] = wide.reshape(experts, outputs, inputs).swapaxes(1, 2)
  save_file(tensors, path / "model.safetensors")
  layers = checkpoint.load(convert(str(path), tmp_path / "ours")).params["layers"]
  for layer in range(2):
    gate_up, down = (expected[f"model.layers.{layer}.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    ours = (layers[f"{name}_proj"][layer].swapaxes(1, 2) for name in ("gate", "up", "down"))
    for one, theirs in zip(ours, (gate_up[..., ::2], gate_up[..., 1::2], down), strict=True):
      np.testing.assert_array_equal(one, theirs.astype(np.float32))

  name = "model.layers.0.mlp.experts.down_proj_scales"
  save_file({**tensors, name: tensors[name][:, :1]}, path / "model.safetensors")
  with pytest.raises(ValueError, match=r"down_proj_blocks \(4, 32, 1, 16\) and .*_scales \(4, 1, 1\) do not fit"):
    convert(str(path), tmp_path / "other")
  with pytest.raises(ValueError, match=r"quantized weights \(quantization_config, method 'mxfp4'\)"):
    config_from_hf(hf_values(quantization_config={"quant_method": "mxfp4"}), "x")


@pytest.fixture
def adapter(tmp_path) -> tuple[Path, Path]:
  """An adapter with gates, and its base's checkpoint."""
  model = tiny.model(LLAMA, tiny.dms(), LoRAConfig(2, 0.5, ("q_proj", "down_proj")))
  checkpoint.save(tmp_path / "base", tiny.model(LLAMA))
  return export(tmp_path / "adapter", model, layout="peft"), tmp_path / "base"


def test_an_adapter_needs_its_base(adapter, tmp_path):
  path, base = adapter
  with pytest.raises(ValueError, match=r"an adapter of PEFT, without its base; pass --base=FOLDER"):
    convert(str(path), tmp_path / "ours")
  edit(path / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-8B")
  with pytest.raises(ValueError, match=r"pass --base=Qwen/Qwen3-8B, a folder or a hub id"):
    convert(str(path), tmp_path / "ours")
  for name, said in (("x\ny", r"x\\ny"), ("a" * 5000, r"a{30,99}\.\."), ("\0", r"\\x00"), (5, "FOLDER")):
    edit(path / "adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(ValueError, match=rf"pass --base={said}, a folder or a hub id$"):
      convert(str(path), tmp_path / "ours")
  with pytest.raises(ValueError, match="--base=nowhere: no such file or directory"):
    convert(str(path), tmp_path / "ours", base="nowhere")
  with pytest.raises(ValueError, match="a retrofit; pass the model that it was made for"):
    convert(str(path), tmp_path / "other", base=str(convert(str(path), tmp_path / "ours", base=str(base))))
  other = export(tmp_path / "hf", tiny.model(tiny.config(d_model=64)))
  with pytest.raises(ValueError, match=r"4 tensor\(s\) do not fit .*q_proj\.lora_A\.weight has shape \(2, 32\)"):
    convert(str(path), tmp_path / "other", base=str(other))
  with pytest.raises(ValueError, match=r"--base=x: .* is a whole model"):
    convert(str(other), tmp_path / "other", base="x")
  with pytest.raises(ValueError, match=r"--tokenizer=x: .* is an adapter; its base holds the tokenizer"):
    convert(str(path), tmp_path / "other", base=str(base), tokenizer="x")
  edit(path / "adapter_config.json", base_model_name_or_path=str(base))  # a local folder needs no flag
  assert checkpoint.load(base, retrofit=convert(str(path), tmp_path / "named")).dms == tiny.dms()


def test_a_lora_of_another_kind(adapter, tmp_path):
  """Without dms_config.json: a retrofit of low-rank updates, without gates."""
  path, base = adapter
  for name in ("dms_config.json", "dms_gates.safetensors"):
    (path / name).unlink()
  output = convert(str(path), tmp_path / "ours", base=str(base))
  values, _, dms, lora = checkpoint.read_config(output)
  assert values["groups"] == ["lora"] and dms is None and lora == LoRAConfig(2, 0.5, ("q_proj", "down_proj"))
  edit(path / "adapter_config.json", use_rslora=True, lora_alpha=3, target_modules="all-linear")
  lora = checkpoint.read_config(convert(str(path), tmp_path / "rs", base=str(base)))[3]
  assert lora == LoRAConfig(2, 3 / np.sqrt(2), ("q_proj", "down_proj"))


ADAPTERS = {
  "kind": (dict(peft_type="IA3"), "peft_type 'IA3'; supported is 'LORA'"),
  "bias": (dict(bias="all"), "bias 'all'"),
  "dora": (dict(use_dora=True), "use_dora=True"),
  "ranks": (dict(rank_pattern={"q_proj": 4}), "rank_pattern=a dict of 1"),
  "modules": (dict(modules_to_save=["lm_head"]), "modules_to_save=a list of 1"),
  "layers": (dict(layers_to_transform=[0]), "layers_to_transform=a list of 1"),
  "pissa": (dict(init_lora_weights="pissa_niter_16"), "which changes the base's weights, too"),
  "rank": (dict(r="8"), "r should be a positive number, found '8'"),
  "absurd alpha": (dict(lora_alpha=1e200), "lora.scale=5e+199 must be between"),
  "alpha": (dict(lora_alpha=None), "lora_alpha should be a number, found None"),
  "absurd rank": (dict(r=10**12), "the config means (1000000000000, 32)"),
  "rank of the tensors": (dict(r=3), r"lora_A.weight has shape (2, 32), the config means (3, 32)"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_refused(adapter, tmp_path, name):
  path, base = adapter
  changes, message = ADAPTERS[name]
  edit(path / "adapter_config.json", **changes)
  with pytest.raises(ValueError) as error:
    convert(str(path), tmp_path / "ours", base=str(base))
  assert message in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "ours").exists()


def test_damaged_adapters(adapter, tmp_path):
  path, base = adapter
  refused = lambda match: pytest.raises(ValueError, match=match)
  tensors = load_file(path / "adapter_model.safetensors")
  save_file(
    {**tensors, "base_model.model.lm_head.lora_A.weight": np.ones(3, np.float32)}, path / "adapter_model.safetensors"
  )
  with refused(r"unexpected base_model\.model\.lm_head\.lora_A\.weight"):
    convert(str(path), tmp_path / "ours", base=str(base))
  save_file({"a": np.ones(3, np.float32)}, path / "adapter_model.safetensors")
  with refused(r"no tensor of a LoRA of a causal model"):
    convert(str(path), tmp_path / "ours", base=str(base))
  save_file(tensors, path / "adapter_model.safetensors")
  (path / "dms_gates.safetensors").unlink()
  with refused(r"dms_gates\.safetensors is missing"):
    convert(str(path), tmp_path / "ours", base=str(base))
  (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
  with refused(r"only adapter_model\.bin: pickles can run code"):
    convert(str(path), tmp_path / "ours", base=str(base))
  (path / "adapter_model.bin").unlink()
  with refused(r"adapter_config\.json without adapter_model\.safetensors"):
    convert(str(path), tmp_path / "ours", base=str(base))
