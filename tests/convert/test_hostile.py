"""Files made to deceive a reader of weights: nothing of them runs, and each is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dms_jax import checkpoint, load_conversation
from dms_jax import testing as tiny
from dms_jax.convert import convert, export
from dms_jax.policies import triattention
from dms_jax.tokenizer import byte_tokenizer

CONFIG = tiny.config(num_layers=2, tie_embeddings=False)
INDEX = "model.safetensors.index.json"


class Bomb:
  """Its pickle makes a folder when it is loaded."""

  def __init__(self, path: Path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


@pytest.fixture
def hf(tmp_path) -> Path:
  return export(tmp_path / "hf", tiny.model(CONFIG))


def refused(source: Path, output: Path) -> str:
  """The message of a conversion that is refused and leaves nothing."""
  with pytest.raises(ValueError) as caught:
    convert(str(source), output)
  message = str(caught.value)
  assert str(source.parent) in message and source.name in message  # a file may be named beside its folder
  assert "\n" not in message and not output.exists() and len(message) < 1000
  return message


@pytest.mark.parametrize(
  "name", ["config.json", "model.safetensors", "generation_config.json", "dms_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_read(hf, tmp_path, name, make):
  """A pipe, which nobody may ever fill, or a folder."""
  byte_tokenizer().save(hf)
  (hf / name).unlink(missing_ok=True)
  make(hf / name)
  refused(hf, tmp_path / "out")


@pytest.mark.parametrize("source", ["a pipe", "/dev/zero", "", "a" * 5000])
def test_sources_that_are_none(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  os.mkfifo("a pipe")
  with pytest.raises(ValueError, match=r"a device|no such file") as caught:
    convert(source, tmp_path / "out")
  assert len(str(caught.value)) < 300 and [p.name for p in tmp_path.iterdir()] == ["a pipe"]


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model-00001-of-00001.safetensors"])
def test_pickles_in_a_folder_are_not_loaded(hf, tmp_path, name):
  (hf / "model.safetensors").unlink()
  (hf / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
  refused(hf, tmp_path / "out")
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.gguf", "m.safetensors", "m.npz"])
def test_pickles_as_a_source_are_not_loaded(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
  refused(tmp_path / name, tmp_path / "out")
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["rows", "calibration"])
def test_arrays_of_objects_are_not_loaded(tmp_path, name):
  array = np.array([Bomb(tmp_path / "ran")], object)
  model = tiny.model(CONFIG)
  if name == "calibration":
    file = tmp_path / "t.npz"
    np.savez(file, about=array, centres=array, norms=array, frequencies=array)
    read = lambda: triattention.load(file, CONFIG)
  else:
    import dms_jax

    out = dms_jax.generate(model, [[1, 2, 3]], max_new_tokens=2, eos=False)
    dms_jax.save_conversation(tmp_path / "cache", out)
    file = tmp_path / "cache" / "rows.npz"
    np.savez(file, **{"0.archived": array, "0.kv": array})
    read = lambda: load_conversation(tmp_path / "cache", model)
  with pytest.raises(ValueError, match=str(file)):
    read()
  file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
  with pytest.raises(ValueError, match=str(file)):
    read()
  assert not (tmp_path / "ran").exists()


# Headers of safetensors -----------------------------------------------------------------------------------------------


def header_of(file: Path) -> tuple[dict, bytes]:
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(file: Path, header: dict | str, data: bytes, size: int | None = None) -> None:
  text = (header if isinstance(header, str) else json.dumps(header)).encode()
  file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("size", [0, 1, 2**20, 10**8, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_absurd_header_lengths(hf, tmp_path, size):
  file = hf / "model.safetensors"
  write(file, *header_of(file), size=size)
  assert "not a readable safetensors file" in refused(hf, tmp_path / "out")


@pytest.mark.parametrize(
  ("name", "begin", "end"),
  [
    ("overlap", -64, 0), ("hole", 64, 64), ("beyond the file", 0, 2**40), ("negative", -(2**40), 0),
    ("backwards", 0, -(2**20)), ("huge", 2**63, 2**63), ("beyond 64 bits", 2**64, 2**64),
  ],
)  # fmt: skip
def test_offsets_that_lie(hf, tmp_path, name, begin, end):
  file = hf / "model.safetensors"
  header, data = header_of(file)
  entry = header["model.layers.1.self_attn.q_proj.weight"]
  entry["data_offsets"] = [entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end]
  write(file, header, data)
  assert "not a readable safetensors file" in refused(hf, tmp_path / "out"), name


def test_bytes_that_no_tensor_names(hf, tmp_path):
  file = hf / "model.safetensors"
  header, data = header_of(file)
  write(file, header, data + b"\0" * 64)
  refused(hf, tmp_path / "out")
  del header["model.norm.weight"]
  write(file, header, data)
  refused(hf, tmp_path / "out")


@pytest.mark.parametrize("key", ["model.norm.weight", "dtype", "__metadata__"])
def test_a_key_that_is_there_twice(hf, tmp_path, key):
  """Readers differ in which of two tensors they take; the library takes one without a word."""
  file = hf / "model.safetensors"
  header, data = header_of(file)
  text = json.dumps(header)
  again = {"dtype": '"F32"', "__metadata__": '{"format": "np"}'}.get(key) or json.dumps(header[key])
  write(file, text.replace(f'"{key}":', f'"{key}": {again}, "{key}":', 1), data)
  message = refused(hf, tmp_path / "out")
  assert ("'model.norm.weight' twice" if key == "model.norm.weight" else "duplicate field") in message


def test_names_that_would_break_a_line(hf, tmp_path):
  tensors = load_file(hf / "model.safetensors")
  save_file({**tensors, "a\nb\x1b[2J": np.zeros(1, np.float32)}, hf / "model.safetensors")
  assert r"the name 'a\nb\x1b[2J'" in refused(hf, tmp_path / "out")


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_tensor_without_a_field(hf, tmp_path, missing):
  file = hf / "model.safetensors"
  header, data = header_of(file)
  del header["model.norm.weight"][missing]
  write(file, header, data)
  assert "not a readable safetensors file" in refused(hf, tmp_path / "out")


@pytest.mark.parametrize("shape", [[2**62, 2**62], [-1], [2**64], [0], [[1]], "1", None, [1.5], [64, 1]])
def test_a_shape_that_lies(hf, tmp_path, shape):
  file = hf / "model.safetensors"
  header, data = header_of(file)
  header["model.norm.weight"]["shape"] = shape
  write(file, header, data)
  refused(hf, tmp_path / "out")


# Other files of a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "x" * 5000, "a\0b", "~/x"])
def test_an_index_names_files_beside_it_alone(tmp_path, name):
  hf = export(tmp_path / "hf", tiny.model(CONFIG), shard_bytes=40_000)
  (tmp_path / "x.safetensors").write_bytes(b"")
  index = json.loads((hf / INDEX).read_text())
  index["weight_map"]["model.norm.weight"] = name
  (hf / INDEX).write_text(json.dumps(index))
  refused(hf, tmp_path / "out")


@pytest.mark.parametrize("layers", [10**4, 10**6, 2**31 - 1, 2**31, 10**30, True, "2", 2.0, -1, 0, None, [2]])
def test_absurd_layer_counts(hf, tmp_path, layers):
  values = json.loads((hf / "config.json").read_text())
  (hf / "config.json").write_text(json.dumps({**values, "num_hidden_layers": layers}))
  refused(hf, tmp_path / "out")
  checkpoint.save(tmp_path / "ours", tiny.model(CONFIG))
  values = json.loads((tmp_path / "ours" / "config.json").read_text())
  values["model"]["num_layers"] = layers
  (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=str(tmp_path / "ours")):
    checkpoint.load(tmp_path / "ours")


DEEP = 100_000


@pytest.mark.parametrize(
  "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "dms_config.json"]
)
@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP])
def test_json_nested_100_000_deep(hf, tmp_path, name, text):
  from dms_jax.tokenizer import byte_tokenizer

  byte_tokenizer().save(hf)
  (hf / name).write_text(text)
  assert name in refused(hf, tmp_path / "out")


# Other things in a file's place ---------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize(
  ("content", "advice"),
  [
    (POINTER, "git lfs pull"), ("<!DOCTYPE html>\n<html>log in</html>\n" * 9, "web page"),
    ("\n <HTML>log in</HTML>", "web page"), ("null", None),
  ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "m.gguf"])
def test_what_a_clone_or_a_proxy_leaves_in_place_of_a_file(hf, tmp_path, name, content, advice):
  from dms_jax.tokenizer import byte_tokenizer

  byte_tokenizer().save(hf)
  (hf / name).write_text(content)
  message = refused(hf / name if name == "m.gguf" else hf, tmp_path / "out")
  assert name in message and (advice or "") in message
  assert ("git lfs" in message) == (content == POINTER) and ("web page" in message) == ("html" in content.lower())


# Weights that are not finite ------------------------------------------------------------------------------------------


def test_a_model_with_nan_in_a_row_that_no_text_reads_works(hf, tmp_path):
  """And one whose text reads it says so; token 0 also stands where a prompt is padded."""
  import dms_jax

  tensors = load_file(hf / "model.safetensors")
  plain = checkpoint.load(convert(str(hf), tmp_path / "plain"))
  tensors["model.embed_tokens.weight"][0] = np.nan
  save_file(tensors, hf / "model.safetensors")
  with pytest.warns(UserWarning, match=r"values of 1 tensor\(s\) are NaN or infinite.*model\.embed_tokens\.weight"):
    model = checkpoint.load(convert(str(hf), tmp_path / "nan"))
  prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
  arguments = dict(policy=dms_jax.Vanilla(), max_new_tokens=4, eos=False, prefill_chunk=8)
  expected = dms_jax.generate(plain, prompts, **arguments)
  assert not any(0 in row for row in expected.tokens)
  assert dms_jax.generate(model, prompts, **arguments).tokens == expected.tokens
  prompts[1][3] = 0
  with pytest.raises(ValueError, match=r"prompts\[1\]: the logits are not finite, after 0 new tokens; weights hold"):
    dms_jax.generate(model, prompts, **arguments)
  assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), model.params["layers"]))
