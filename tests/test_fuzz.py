"""Damaged files of every kind are refused in one line that names the file, and at once.

`DMS_FUZZ=100000 DMS_FUZZ_SEED=7 python -m pytest tests/test_fuzz.py` runs more inputs, and others.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGUFWriter

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.convert import export, gguf
from dms_jax.convert.layouts import transformers
from dms_jax.convert.tensors import to_slices
from dms_jax.params import flatten, param_table
from dms_jax.tokenizer import byte_tokenizer

COUNT, SEED = int(os.environ.get("DMS_FUZZ", 2000)), int(os.environ.get("DMS_FUZZ_SEED", 0))
SECONDS, MEGABYTES = 5, 512  # of one input; more than any of these files by a factor of ten thousand
CONFIG = tiny.config(vocab_size=257, num_layers=1, d_model=16, d_ff=16, head_dim=8, num_heads=2, num_kv_heads=1)

# Mutations ------------------------------------------------------------------------------------------------------------

VALUES = [
  None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64, 10**40, 0.0, 0.5, -0.0, 1e-300, 1e300,
  float("nan"), float("inf"), "", "x", "0", "llama", "\ud800", "../x", "\0", [], [0], [None], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip


def garbled(data: bytes, rng: np.random.Generator) -> bytes:
  """`data` with bytes changed, cut, doubled or replaced by numbers that counters dislike."""
  out = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    place, kind = int(rng.integers(0, max(len(out), 1))), rng.integers(0, 6)
    # Headers lie at the start: half of the changes are there.
    place = place if rng.integers(2) else min(place, int(rng.integers(0, 400)))
    if kind == 0 and out:
      out[place] = rng.integers(256)
    elif kind == 1 and out:
      out[place] ^= 1 << rng.integers(8)
    elif kind == 2:
      del out[place:]
    elif kind == 3:
      del out[place : place + int(rng.integers(1, 16))]
    elif kind == 4:
      out[place:place] = out[place : place + int(rng.integers(1, 64))]
    else:
      size = int(rng.choice([1, 2, 4, 8]))
      number = int(rng.choice([0, 1, 2**7, 2**15, 2**31, 2**32 - 1, 2**40, 2**63 - 1])) & (2 ** (8 * size) - 1)
      out[place : place + size] = number.to_bytes(size, "little")
  return bytes(out)


def replaced(value, rng: np.random.Generator):
  """A JSON value with one value in it replaced, dropped, or repeated under another name."""
  if not isinstance(value, dict | list) or not value or rng.integers(6) == 0:
    return VALUES[rng.integers(len(VALUES))]
  if isinstance(value, list):
    index = int(rng.integers(len(value)))
    return [*value[:index], replaced(value[index], rng), *value[index + 1 :]]
  keys = list(value)
  key = keys[rng.integers(len(keys))]
  action = rng.integers(8)
  if action == 0:
    return {k: v for k, v in value.items() if k != key}
  if action == 1:
    return {**value, f"{key}_": value[key], "dms_window_size": VALUES[rng.integers(len(VALUES))]}
  return {**value, key: replaced(value[key], rng)}


def garbled_json(data: bytes, rng: np.random.Generator) -> bytes:
  kind = rng.integers(12)
  if kind == 0:
    return garbled(data, rng)
  if kind == 1:
    return rng.choice([b"[", b'{"a":']) * int(rng.choice([10, 1000, 100_000]))
  values = json.loads(data)
  for _ in range(rng.integers(1, 3)):
    values = replaced(values, rng)
  return json.dumps(values).encode()


# Readers --------------------------------------------------------------------------------------------------------------


def read_huggingface(path: Path) -> None:
  config, dms, tensors, _ = transformers.read(path)
  ignore = lambda name: transformers.is_ignored(config, name)
  list(to_slices(param_table(config, dms), tensors, np.float32, ignore=ignore))


def read_gguf(path: Path) -> None:
  config, tensors, _ = gguf.read(path / "m.gguf")
  list(to_slices(param_table(config), tensors, np.float32))


def write_gguf(path: Path) -> None:
  writer, tokens = GGUFWriter(str(path), "llama"), [*byte_tokenizer().backend.get_vocab()]
  for name, value in dict(
    block_count=1, context_length=64, embedding_length=16, feed_forward_length=16,
    **{"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8},
  ).items():  # fmt: skip
    writer.add_uint32(f"llama.{name}", value)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_string("tokenizer.ggml.model", "gpt2")
  writer.add_string("tokenizer.ggml.pre", "smollm")
  writer.add_uint32("tokenizer.ggml.eos_token_id", 256)
  writer.add_token_merges(["a b"])
  writer.add_token_list([*tokens, "ab"])
  writer.add_token_types([1] * 258)
  config = tiny.config(**{**vars(CONFIG), "vocab_size": 258})
  for name, value in flatten(tiny.model(config).params).items():
    matrix = np.asarray(value).reshape(param_table(config)[name].hf_shape)
    label = gguf._NAMES[name]
    writer.add_tensor(f"blk.0.{label}" if name.startswith("layers/") else label, matrix.astype(np.float16))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[int, Path, str, Callable, Callable]]:
  """{reader: (share of the inputs, a whole folder, the file to change, how, the reader)}."""
  root = tmp_path_factory.mktemp("whole")
  model = tiny.model(CONFIG)
  export(root / "hf", model)
  export(root / "shards", model, shard_bytes=4000)
  export(root / "gates", tiny.model(CONFIG, tiny.dms()))
  export(root / "fastdms", model)
  metadata = {"window_size": 8, "alpha_scale": 100.0, "alpha_offset": 5.0, "config": {"target_cr": 8}}
  (root / "fastdms" / "dms_metadata.json").write_text(json.dumps(metadata))
  (root / "gguf").mkdir()
  write_gguf(root / "gguf" / "m.gguf")
  checkpoint.save(root / "ours", tiny.model(CONFIG, tiny.dms()))
  out = dms_jax.generate(model, [[1, 2, 3]] * 2, policy=dms_jax.Vanilla(window=2), max_new_tokens=5, eos=False)
  dms_jax.save_conversation(root / "cache", out)
  values = json.loads((root / "hf" / "config.json").read_text())
  values |= {"layer_types": ["full_attention"], "dms_window_size": 8, "dms_shift": 1, "sliding_window": None}
  values |= {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
  (root / "hf" / "config.json").write_text(json.dumps(values))
  conversation = lambda path: dms_jax.load_conversation(path, model)
  return {
    "safetensors": (15, root / "hf", "model.safetensors", garbled, read_huggingface),
    "config": (25, root / "hf", "config.json", garbled_json, read_huggingface),
    "generation config": (3, root / "hf", "generation_config.json", garbled_json, read_huggingface),
    "index": (6, root / "shards", "model.safetensors.index.json", garbled_json, read_huggingface),
    "gates": (5, root / "gates", "dms_config.json", garbled_json, read_huggingface),
    "gate tensors": (3, root / "gates", "dms_gates.safetensors", garbled, read_huggingface),
    "fastdms": (5, root / "fastdms", "dms_metadata.json", garbled_json, read_huggingface),
    "gguf": (25, root / "gguf", "m.gguf", garbled, read_gguf),
    "own config": (8, root / "ours", "config.json", garbled_json, checkpoint.read_config),
    "own": (1, root / "ours", "config.json", garbled_json, checkpoint.load),
    "orbax": (1, root / "ours", "params", garbled, checkpoint.load),
    "header": (2, root / "cache", "cache.json", garbled_json, conversation),
    "rows": (1, root / "cache", "rows.npz", garbled, conversation),
  }


def damage(folder: Path, name: str, change: Callable, rng: np.random.Generator) -> tuple[Path, bytes]:
  """Changes one file of the folder; returns it and its whole content. Checksums of Orbax's files are made to fit."""
  file = folder / name
  if file.is_dir():
    files = sorted(p for p in file.rglob("*") if p.is_file() and p.stat().st_size)
    file = files[rng.integers(len(files))]
  whole = file.read_bytes()
  file.write_bytes(change(whole, rng))
  if name == "params":
    values = json.loads((folder / "config.json").read_text())
    values["files"] = {n: list(entry) for n, entry in checkpoint._fingerprints(folder / name).items()}
    (folder / "config.json").write_text(json.dumps(values))
  return file, whole


NAMES = (
  "safetensors", "config", "generation config", "index", "gates", "gate tensors", "fastdms", "gguf", "own config",
  "own", "orbax", "header", "rows",
)  # fmt: skip


# Where Orbax fails, it leaves coroutines that nobody awaits.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_in_one_line(sources, tmp_path, name):
  share, whole, target, change, read = sources[name]
  folder = tmp_path / "damaged"
  shutil.copytree(whole, folder)
  with jax.numpy_dtype_promotion("standard"):
    read(folder)  # the whole one is read, and what it compiles is no part of the times below
    refused, before, problems = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for number in range(max(COUNT * share // 100, 1)):
      file, content = damage(folder, target, change, np.random.default_rng([SEED, number]))
      start = time.monotonic()
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("ignore", UserWarning)  # of a head that differs from the embedding
          read(folder)
      except ValueError as error:
        refused += 1
        if str(folder) not in str(error) or "\n" in str(error) or len(str(error)) > 6000:
          problems.append(f"input {number}: {str(error)[:300]!r} is not one line that names the file")
      except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
          raise
        problems.append(f"input {number}: {''.join(traceback.format_exception(error)[-4:])}")
      if (seconds := time.monotonic() - start) > SECONDS:
        problems.append(f"input {number}: {seconds:.1f} s")
      file.write_bytes(content)
      if target == "params":
        shutil.copy(whole / "config.json", folder / "config.json")
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
  assert not problems, f"{len(problems)} of {number + 1}: " + "\n".join(problems[:6])
  assert refused > number // 4
  assert grown < MEGABYTES, f"{grown:.0f} MB more"
