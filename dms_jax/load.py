"""Loading a checkpoint."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def load(path: str | Path, retrofit: str | Path | None = None, dtype: Any = None, merge: bool = True, mesh: Any = None):
  """Loads a checkpoint, ready to generate: (model, tokenizer).

  The model carries the tokenizer, so `generate` takes strings; without one in the folder it takes token ids alone. The
  layers are in the form that decodes fastest on this machine (`execution.fastest_form`).

  Args:
    path: folder written by `experiments.convert_weights` or `experiments.train_reasoner`.
    retrofit: folder of eviction gates and low-rank updates to add, or the name of one that is shipped, such as
      "smollm2-135m-cr4"; without it the model may have no gates.
    dtype: dtype of the weights and the KV cache; default as stored.
    merge: fold low-rank updates into the weights, so that the model decodes faster; those that depend on each row's CR
      (`LoRAConfig.by_cr`) stay apart, and `Model.at` merges them for one CR.
    mesh: the devices that compute together (`dms_jax.make_mesh`), of one process or all of several (`dms_jax.spmd`);
      each holds its shard of the weights alone, though every host checks all files' checksums. Over several processes
      each must call.

  Returns:
    `Model`, and `Tokenizer` or None.

  Raises:
    ValueError: a folder is missing or damaged, the retrofit belongs to another model, or the mesh has other axes or
      cannot split it.
  """
  from dms_jax import checkpoint  # Orbax and tokenizers take a second to import
  from dms_jax.execution import fastest_form
  from dms_jax.sharding import decoding
  from dms_jax.spmd import check_axes, place
  from dms_jax.tokenizer import TOKENIZER_FILE, Tokenizer

  if mesh is not None:
    check_axes(mesh)
  has_tokenizer = (Path(path) / TOKENIZER_FILE).exists()
  with ThreadPoolExecutor(1) as beside:  # the weights' checksums and files are read without Python's lock
    reading = beside.submit(Tokenizer.load, path) if has_tokenizer else None
    model = checkpoint.load(path, retrofit=retrofit, merge=merge, dtype=dtype, mesh=mesh, rules=decoding)
    tokenizer = None if reading is None else reading.result()
  return fastest_form(place(model.replace(tokenizer=tokenizer), mesh)), tokenizer
