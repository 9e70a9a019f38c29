"""Generation on the devices of two processes against one, cases of generation/test_processes.py.

    python -m tests.process_cases CASE FOLDER --mesh.coordinator=HOST:PORT --mesh.processes=2 --mesh.process=0

Each process of a case has the same number of simulated devices, runs the same program, and compares what it holds.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import dms_jax
from dms_jax import checkpoint, spmd
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.execution import fastest_form
from dms_jax.generation.batching import Generator
from dms_jax.processes import leads
from dms_jax.retrofit import distributed
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.sharding import Split, make_mesh
from tests.helpers import check_falling_thresholds

CONFIG = tiny.config(num_heads=4, num_kv_heads=2, vocab_size=96)
SETTINGS = dict(max_new_tokens=12, eos=False, prefill_chunk=8, decode_block=8)
PROMPTS = [np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 19, 8, 5)]


def save(folder: Path, layers: int = CONFIG.num_layers) -> None:
  """The model of the cases, which one process writes."""
  config = dataclasses.replace(CONFIG, num_layers=layers)
  checkpoint.save(folder / "model", tiny.model(config, tiny.dms(window=5), LoRAConfig(rank=2, scale=0.1)))


def crossing_mesh() -> Mesh:
  """2 x 2 devices, of which "data" splits those of a process, and "tensor" the processes."""
  devices = np.array(jax.devices()).reshape(2, -1).T.ravel()
  mesh = make_mesh(2, 2, devices[:4].tolist())
  assert {device.process_index for device in mesh.devices[0]} == {0, 1}
  return mesh


def assert_same(many, one) -> None:
  """Tokens, tokens held and keys read are equal; log-probabilities by rounding: sums run in another order."""
  assert many.tokens == one.tokens
  for mine, theirs in zip(many.logprobs, one.logprobs, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=3e-5)
  for name in ("seen", "live", "decode_reads", "prompt_reads", "peak", "bytes_live"):
    np.testing.assert_array_equal(getattr(many.metrics, name), getattr(one.metrics, name), err_msg=name)


def rows(folder: Path) -> None:
  """Each process decodes its row; the tokens and counts of both come to both."""
  many, one = (dms_jax.load(folder / "model", mesh=mesh)[0] for mesh in (make_mesh(2, 1), None))  # each by both
  got = dms_jax.generate(many, PROMPTS[:2], **SETTINGS)
  other = next(device for device in jax.devices() if device.process_index != jax.process_index())
  with pytest.raises(ValueError, match="a mesh of 1 of the 2 devices of several processes"):
    spmd.place(one, make_mesh(1, 1, [other]))
  if leads():
    assert_same(got, dms_jax.generate(one, PROMPTS[:2], **SETTINGS))


def generates(folder: Path) -> None:
  """Pages and slots, rows and heads that cross the processes; a turn more, from memory and from disk."""
  one, _ = dms_jax.load(folder / "model")
  for kind, mesh in (
    ("paged", crossing_mesh()), ("contiguous", make_mesh(4, 1)), ("masked", make_mesh(2, 2)),
    ("paged-by-rows", make_mesh(1, 4)),
  ):  # fmt: skip
    folder_of, kind = folder / kind, kind.split("-")[0]
    settings = {**SETTINGS, **(dict(temperature=0.8, key=jax.random.key(3)) if kind == "paged" else {})}
    many, _ = dms_jax.load(folder / "model", mesh=mesh)
    heads = many.params["layers"][0]["q_proj"].addressable_shards[0].data.shape[0]
    assert heads == CONFIG.num_heads // Split.of(CONFIG, mesh).head_parts
    got, want = (dms_jax.generate(model, PROMPTS, cache=kind, history=True, **settings) for model in (many, one))
    assert_same(got, want)
    np.testing.assert_array_equal(got.metrics.history, want.metrics.history)
    dms_jax.save_conversation(folder_of, got)
    turn, want = [[3, 4]] * len(PROMPTS), dms_jax.generate(one, [[3, 4]] * len(PROMPTS), continue_from=want, **settings)
    for model, past in (
      (many, got), (one, got), (many, dms_jax.load_conversation(folder_of, many)),
      (one, dms_jax.load_conversation(folder_of, one)),
    ):  # fmt: skip
      assert_same(dms_jax.generate(model, turn, continue_from=past, **settings), want)


def requests(folder: Path) -> None:
  """A `Generator` whose pools grow by way of the hosts and whose rows are preempted; a row goes on alone."""
  model = fastest_form(tiny.model(CONFIG, tiny.dms(window=3)))
  sizes = dict(page_size=4, prefill_chunk=8, decode_block=4, max_length=96, eos=False, temperature=0.8)
  rng, asked = np.random.default_rng(0), []
  for seed in range(6):
    length, new, chains = (int(rng.integers(*limits)) for limits in ((1, 40), (1, 40), (1, 3)))
    asked.append((rng.integers(0, CONFIG.vocab_size, length).tolist(), new, chains, jax.random.key(seed)))

  def answer(model, width, **budget):
    generator = Generator(model, width=width, **sizes, **budget)
    tickets = []
    for ids, new, chains, key in asked:
      tickets.append(generator.submit(ids, max_new_tokens=new, chains=chains, key=key, keep=True))
      for _ in range(2):
        generator.step()
    for _ in generator.run():
      pass
    assert not generator.cache.live().any()
    return generator, [generator.results[ticket] for ticket in tickets]

  _, want = answer(model, 3, pages=400)
  placed = spmd.place(model, crossing_mesh())
  memory = Generator(placed, width=4, **sizes).memory
  longest = max(memory.pages_of(stored.cache) for one in want for stored in one.stored)
  budget = memory.own.fixed_bytes + (longest + 2 * memory.pool_heads) * memory.own.page_bytes
  generator, results = answer(placed, 4, budget=budget, pages=memory.own.pages)
  assert generator.preemptions and generator.cache.device_bytes <= budget
  for got, one in zip(results, want, strict=True):
    assert got.tokens == one.tokens and got.finish_reason == one.finish_reason
    for mine, theirs in zip(got.logprobs, one.logprobs, strict=True):
      np.testing.assert_allclose(mine, theirs, atol=3e-5)
    assert [used.until() for used in got.usage] == [used.until() for used in one.usage]
    for mine, theirs in zip(got.stored, one.stored, strict=True):
      np.testing.assert_array_equal(mine.cache.archived, theirs.cache.archived)
      np.testing.assert_allclose(mine.cache.kv, theirs.cache.kv, atol=1e-5)
  past, more = results[0].stored[0], []
  for each in (generator, Generator(model, width=2, **sizes)):
    ticket = each.submit([3, 4], max_new_tokens=6, key=jax.random.key(9), continue_from=past)
    for _ in each.run():
      pass
    more.append(each.results[ticket].tokens)
  assert more[0] == more[1]


def rows_under_pressure(folder: Path) -> None:
  """Rows whose heads lie in both processes give up tokens, in both the same."""
  model, sizes = fastest_form(tiny.model(CONFIG, tiny.dms(window=3, scale=3.0, offset=1.0))), dict(width=4, page_size=4)
  placed = spmd.place(model, crossing_mesh())
  sizes |= dict(prefill_chunk=8, decode_block=4, max_length=96, eos=False, on_pressure="compress")
  memory = Generator(placed, **sizes).memory
  budget = memory.own.fixed_bytes + (memory.pool_rows + 14) * memory.pool_heads * memory.own.page_bytes
  generator = Generator(placed, budget=budget, **sizes)
  prompts = [np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (30, 22, 26, 28)]
  tickets = [generator.submit(ids, max_new_tokens=40) for ids in prompts]
  for _ in generator.run():
    pass
  results = [generator.results[ticket] for ticket in tickets]
  check_falling_thresholds(model, float(generator.policy.limit), prompts, results)


QUICK, SLOW = (rows,), (generates, requests, rows_under_pressure)
CASES = {case.__name__: case for case in (*QUICK, *SLOW)}

if __name__ == "__main__":
  name, folder, *flags = sys.argv[1:]
  host, count, process = (flag.partition("=")[2] for flag in flags)
  distributed.initialize(MeshConfig(coordinator=host, processes=int(count), process=int(process)))
  assert jax.process_count() == 2 and jax.device_count() == 2 * jax.local_device_count()
  CASES[name](Path(folder))
  print("equal")
