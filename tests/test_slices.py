"""Parameters by slices: what Orbax loads, chunks, memory of conversion and export, layers on disk."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint, slices
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.convert import convert, export
from dms_jax.families import PRESETS
from dms_jax.params import StoredParam, flatten, param_table, unflatten
from tests.programs import on_devices

# Wide enough that arrays outweigh what Python allocates: a layer is 10.5 MB, all parameters are 84 MB.
WIDE = tiny.config(num_layers=8, d_model=512, d_ff=1024, num_heads=8, num_kv_heads=8, head_dim=64)


def slices_of(model):
  """Every slice of the model's parameters, the last first."""
  flat, table = flatten(model.params), param_table(model.config, model.dms)
  for path, spec in reversed(table.items()):
    for layer in reversed(range(spec.shape[0])) if spec.layered else [None]:
      yield path, layer, np.asarray(flat[path] if layer is None else flat[path][layer])


def same(a, b):
  assert flatten(a).keys() == flatten(b).keys()
  for name, value in flatten(a).items():
    np.testing.assert_array_equal(value, flatten(b)[name], err_msg=name)
    assert value.dtype == flatten(b)[name].dtype


def read_only(folder):
  """The files of a folder with their contents."""
  return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slices_load_as_the_model(tmp_path, monkeypatch, dtype):
  """In any order, in chunks of any size, with parameters that are zero throughout."""
  model = tiny.model(gates=tiny.dms(), dtype=jnp.dtype(dtype))
  table = param_table(model.config, model.dms)
  cast = lambda name, value: value.astype(slices.dtype_of(table[name], np.dtype(dtype)))  # gates are float32
  model = model.replace(params=unflatten({name: cast(name, value) for name, value in flatten(model.params).items()}))
  model.params["layers"]["dms_proj"] *= 0
  monkeypatch.setattr(slices, "CHUNK_BYTES", 300)
  checkpoint.save_slices(tmp_path / "m", slices_of(model), model.config, model.dms, dtype, metadata={"seed": 0})
  checkpoint.save(tmp_path / "whole", model, metadata={"seed": 0})
  loaded = checkpoint.load(tmp_path / "m")
  same(loaded.params, model.params)
  assert loaded.dms == model.dms
  ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("m", "whole"))
  assert {**ours, "files": 0} == {**theirs, "files": 0}
  assert checkpoint.is_replaceable(tmp_path / "m") and not checkpoint.is_damaged(tmp_path / "m")


MESH = """
import sys
import jax, numpy as np
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.params import flatten, param_table
from dms_jax.sharding import make_mesh, param_shardings
mesh, model = make_mesh(2, 4), tiny.model(tiny.config(vocab_size=96))
loaded = flatten(checkpoint.load(sys.argv[1], mesh=mesh).params)
for name, sharding in flatten(param_shardings(mesh, param_table(model.config))).items():
  assert loaded[name].sharding == sharding, name
  np.testing.assert_array_equal(loaded[name], flatten(model.params)[name])
"""


def test_a_mesh_loads_slices(tmp_path, monkeypatch):
  """Every one of eight devices gets its own shard, whatever the chunks."""
  model = tiny.model(tiny.config(vocab_size=96))
  monkeypatch.setattr(slices, "CHUNK_BYTES", 1000)
  checkpoint.save_slices(tmp_path / "m", slices_of(model), model.config, None, "float32")
  command = [sys.executable, "-c", MESH, str(tmp_path / "m")]
  done = subprocess.run(command, env=on_devices(8), capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_chunks(preset):
  """A chunk is at most a layer and `CHUNK_BYTES`; it ends where the shards of 8 devices do, where 8 divides an axis."""
  for path, spec in param_table(PRESETS[preset]).items():
    chunk = slices.chunk_shape(spec, np.dtype(jnp.bfloat16))
    assert 2 * math.prod(chunk) <= slices.CHUNK_BYTES and (not spec.layered or chunk[0] == 1)
    for size, part, axis in zip(spec.shape, chunk, spec.axes, strict=True):
      if axis in ("vocab", "ff") and size % 8 == 0:
        assert (size // 8) % part == 0 or part % (size // 8) == 0, (path, chunk)


def test_what_a_slice_fails_with_leaves_nothing(tmp_path):
  def failing():
    yield from list(slices_of(tiny.model()))[:7]
    raise ValueError("x: tensor 7 is damaged")

  with pytest.raises(ValueError, match="tensor 7 is damaged"):
    checkpoint.save_slices(tmp_path / "m", failing(), tiny.config(), None, "float32")
  assert not list(tmp_path.iterdir())


def peak_bytes(action) -> int:
  """The most bytes that Python and numpy hold at once during `action()`, beyond those held before it."""
  tracemalloc.start()
  try:
    action()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_memory(tmp_path, monkeypatch):
  """Conversion and export hold at most 1.3 times the largest shard and a layer, of a model several times as large."""
  monkeypatch.setattr(slices, "IN_FLIGHT_BYTES", 0)
  model = tiny.model(WIDE)
  export(tmp_path / "hf", model, shard_bytes=2**23)
  shards = [file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")]
  layer = sum(value.nbytes for value in model.params["layers"].values()) // WIDE.num_layers
  bar = 1.3 * max(shards) + layer
  assert 3 * bar < sum(shards) and len(shards) > 6
  warm = tiny.model()
  export(tmp_path / "small", warm)
  convert(str(tmp_path / "small"), tmp_path / "warm")  # imports
  assert peak_bytes(lambda: convert(str(tmp_path / "hf"), tmp_path / "ours")) < bar
  same(checkpoint.load(tmp_path / "ours").params, model.params)

  def back():
    export(tmp_path / "back", checkpoint.load(tmp_path / "ours", merge=False, stored=True), shard_bytes=2**23)

  assert peak_bytes(back) < bar
  assert read_only(tmp_path / "back") == read_only(tmp_path / "hf")


def test_layers_from_disk(tmp_path):
  """A stored model exports the same files as a loaded one: written by Orbax or by slices, updates apart or merged."""
  lora = LoRAConfig(rank=2, scale=1.5)
  model = tiny.model(gates=tiny.dms(), lora=lora)
  base = model.replace(params=tiny.model().params, dms=None, lora=None)
  checkpoint.save(tmp_path / "orbax", base)
  checkpoint.save_slices(tmp_path / "slices", slices_of(base), base.config, None, "float32")
  checkpoint.save(tmp_path / "retrofit", model, groups=("gate", "lora"))
  loaded = checkpoint.load(tmp_path / "orbax", retrofit=tmp_path / "retrofit", merge=False)
  for name in ("orbax", "slices"):
    for layout, dtype in (("transformers", "bfloat16"), ("peft", None)):
      stored = checkpoint.load(tmp_path / name, retrofit=tmp_path / "retrofit", merge=False, stored=True)
      assert isinstance(stored.params["layers"]["q_proj"], StoredParam)
      for out, source in (("a", stored), ("b", loaded)):
        export(tmp_path / out, source, layout=layout, dtype=dtype, overwrite=True)
      assert read_only(tmp_path / "a") == read_only(tmp_path / "b")


def test_a_stored_parameter_is_an_array_when_asked(tmp_path):
  model = tiny.model()
  checkpoint.save(tmp_path / "m", model)
  stored = checkpoint.load(tmp_path / "m", stored=True, dtype="bfloat16").params["layers"]["up_proj"]
  whole = np.asarray(model.params["layers"]["up_proj"].astype(jnp.bfloat16))
  assert stored.shape == whole.shape and stored.dtype == whole.dtype
  np.testing.assert_array_equal(np.asarray(stored), whole)
  np.testing.assert_array_equal(stored[1], whole[1])


def test_folders_named_from_another(tmp_path, monkeypatch):
  """`../NAME`: converted, and exported layer by layer."""
  model = tiny.model()
  export(tmp_path / "hf", model)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  loaded = checkpoint.load(convert("../hf", "../ours"), stored=True)
  export("../again", loaded)
  assert read_only(tmp_path / "hf") == read_only(tmp_path / "again")
