"""Safetensors files: written as the library writes them, read to the bit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dms_jax.convert.safetensors_file import open_tensors, write_tensors
from dms_jax.convert.tensors import Output

ARRAYS = {
  "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a.weight": np.arange(5).astype(jnp.bfloat16),
  "ä.weight": np.full((1, 1, 2), -0.0, np.float32),
  "c.weight": np.array(3, np.float32),
  "none.weight": np.zeros((0, 4), jnp.bfloat16),
}


def outputs(arrays):
  return [Output(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


@pytest.mark.parametrize("kept", [np.float32, jnp.bfloat16, None], ids=["float32", "bfloat16", "both"])
def test_the_librarys_bytes(tmp_path, kept):
  arrays = {name: a for name, a in ARRAYS.items() if kept is None or a.dtype == kept}
  assert write_tensors(tmp_path / "ours.safetensors", outputs(arrays)) == sum(a.nbytes for a in arrays.values())
  save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
  assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_what_is_read(tmp_path):
  path = tmp_path / "model.safetensors"
  write_tensors(path, outputs(ARRAYS))
  tensors, expected = open_tensors(tmp_path), load_file(path)
  assert tensors.shapes == {name: a.shape for name, a in ARRAYS.items()} and tensors.dtype == "float32"
  for name, value in expected.items():
    read = tensors.read(name)
    assert read.dtype == value.dtype and read.shape == value.shape and read.tobytes() == value.tobytes()


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
  path = tmp_path / "model.safetensors"
  write_tensors(path, outputs(ARRAYS))
  tensors = open_tensors(tmp_path)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match=rf"{path}: shorter than when it was opened, at tensor a\.weight"):
    tensors.read("a.weight")
