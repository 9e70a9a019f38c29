"""Generation on the devices of two processes against one device, in processes of generation/test_processes.py.

    python -m tests.process_cases CASE PORT PROCESS FOLDER

Each process of a case has the same number of simulated devices, runs the same program, and compares what it holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

import dms_jax
from dms_jax import checkpoint, spmd
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.execution import fastest_form
from dms_jax.generation.batching import Generator
from dms_jax.model import Model
from dms_jax.retrofit import distributed
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.sharding import make_mesh

CONFIG = tiny.config(num_heads=4, num_kv_heads=2, vocab_size=96)
SETTINGS = dict(max_new_tokens=12, eos=False, prefill_chunk=8, decode_block=8)
PROMPTS = [np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 19, 8, 5)]


def one_device() -> Model:
  return fastest_form(tiny.model(CONFIG, tiny.dms(window=5)))


def assert_same(many, one) -> None:
  """Tokens, tokens held and keys read are equal; log-probabilities by rounding: sums run in another order."""
  assert many.tokens == one.tokens
  for mine, theirs in zip(many.logprobs, one.logprobs, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=3e-5)
  for name in ("seen", "live", "decode_reads", "prompt_reads", "peak", "bytes_live"):
    np.testing.assert_array_equal(getattr(many.metrics, name), getattr(one.metrics, name), err_msg=name)


def generates(folder: Path) -> None:
  """Pages and slots, rows and heads that cross the processes; another turn of what a mesh has written."""
  one = one_device()
  for kind, data, tensor, sampled in (("paged", 2, 2, True), ("contiguous", 4, 1, False), ("contiguous", 2, 2, False)):
    settings = {**SETTINGS, **(dict(temperature=0.8, key=jax.random.key(3)) if sampled else {})}
    many = spmd.place(one, make_mesh(data, tensor))
    got, want = (dms_jax.generate(model, PROMPTS, cache=kind, **settings) for model in (many, one))
    assert_same(got, want)
    turn = [[3, 4]] * len(PROMPTS)
    again = [dms_jax.generate(m, turn, continue_from=past, **settings) for m, past in ((many, got), (one, want))]
    assert_same(*again)


CASES = {case.__name__: case for case in (generates,)}

if __name__ == "__main__":
  name, port, process, folder = sys.argv[1:]
  distributed.initialize(MeshConfig(coordinator=f"localhost:{port}", processes=2, process=int(process)))
  assert jax.process_count() == 2 and jax.device_count() == 2 * jax.local_device_count()
  CASES[name](Path(folder))
  print("equal")
