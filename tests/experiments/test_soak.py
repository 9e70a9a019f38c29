"""experiments.soak: a few seconds of it, and that it sees what it is there to see."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from dms_jax import compilation
from experiments import bench_generate, soak
from experiments.reports import figures_bench

SHORT = soak.Config(
  minutes=0.05, warm_up=0.0, width=3, longest_prompt=12, longest_answer=12, turns=2, page_size=4, prefill_chunk=16,
  decode_block=4, check=3, growth=10.0, slowing=10.0, servers=("dms", "vanilla", "tova"),
)  # fmt: skip


@pytest.fixture(scope="module")
def servers():
  return soak.made(SHORT)


@pytest.fixture(scope="module")
def ran(servers):
  """(servers, outcome) of three seconds of traffic, and what is open then."""
  with compilation.counted() as count:
    return servers, soak.soak(servers, SHORT, soak.Traffic(SHORT, 257), count)


def test_what_was_served_is_sound(ran, tmp_path):
  servers, outcome = ran
  result = soak.verdict(servers, SHORT, outcome)
  held = {
    name: ok for name, ok in result["checks"].items() if name != "something_was_preempted"
  }  # there was little time
  assert all(held.values()), result
  assert result["conversations_checked"] == len(outcome["kept"]) > 0 and result["lost_pages"] == 0
  assert result["requests"] > 0 and result["tokens"] > 0 and result["characters"] > 0
  lengths = {len(values) for values in outcome["samples"].values()}
  assert lengths == {result["steps"]} and outcome["samples"]["pages"][-1] == 0
  series = figures_bench.over_time(outcome["samples"], 5)
  assert series["pages"][-1][0] == 0 and all(least <= mean <= most for least, mean, most in series["running"])
  assert result["programs"] > 0 and series["programs"][-1][2] == result["programs"]
  image = figures_bench.soak(tmp_path / "soak.png", series, outcome["begin"], result["pages"], "a test")
  assert image is None or (tmp_path / "soak.png").stat().st_size > 1000


def test_a_conversation_goes_on_where_it_can(ran):
  """With another policy, by way of a file too; a generator that cannot continue it refuses it and is left as it was."""
  dms, vanilla, tova = ran[0]
  assert vanilla.continues(dms) and dms.continues(vanilla)
  assert not tova.continues(dms) and not dms.continues(tova)
  assert not soak.Server("dms:int8", dms.generator).continues(dms)
  options = dict(chains=1, max_new_tokens=3, temperature=0.0, seed=0, numbers={})
  talk = soak.Talk([])
  for server, by_file in ((dms, False), (vanilla, True)):
    ticket = soak.submit(server.generator, [1, 2, 3], options, talk.past)
    list(server.generator.run())
    result = server.generator.results.pop(ticket)
    talk.turns.append(soak.Turn(server, [1, 2, 3], options, soak.answers(result)))
    talk.past = result.stored[0]
    if by_file:
      talk.past = soak.by_file(talk.past, server.generator)
  assert soak.refuses(tova, talk, ([4], options)) and not tova.generator.busy
  assert not soak.refuses(dms, talk, ([4], options)) and dms.generator.busy
  list(dms.generator.run())
  dms.generator.results.clear()
  assert soak.alone(talk)


def test_other_tokens_are_seen(ran):
  talk = ran[1]["kept"][0]
  assert soak.alone(talk)
  turn = talk.turns[-1]
  tokens, logprobs, text, reason = turn.answers[0]
  for other in (([*tokens[:-1], tokens[-1] ^ 1], logprobs, text, reason), (tokens, logprobs, text + "a", reason)):
    changed = dataclasses.replace(turn, answers=[other, *turn.answers[1:]])
    assert not soak.alone(soak.Talk([*talk.turns[:-1], changed]))


def test_lost_pages_are_seen(servers):
  generator = servers[0].generator
  cache = generator.cache
  assert soak.lost_pages(generator) == 0
  pool = cache.table.pool
  for broken in (pool.replace(count=pool.count - 2), pool.replace(owners=pool.owners.at[jnp.array([1, 3])].set(1))):
    generator.cache = cache.replace(table=cache.table.replace(pool=broken))
    assert soak.lost_pages(generator) == 2
  generator.cache = cache


def made_up(**columns) -> dict:
  """What a soak of 100 steps leaves: all flat, but for `columns`."""
  flat = {"memory": [2**20] * 100, "device": [None] * 100, "arrays": [50] * 100, "programs": [7] * 100}
  flat |= {"tokens": [10 * i for i in range(100)], "busy": [0.2 * i for i in range(100)]}
  samples = {"seconds": list(range(100)), **flat, **columns}
  return {"samples": samples, "begin": 30, "counts": {"preemptions": 1}, "kept": []}


@pytest.mark.parametrize(
  ("columns", "failed"),
  [
    (dict(), set()),
    (dict(memory=[None] * 100), set()),
    (dict(arrays=list(range(1, 31)) + [50] * 70), set()),  # it may grow while it warms up
    (dict(arrays=[50] * 60 + [90] + [50] * 39), set()),  # and one step may have more
    (dict(arrays=list(range(50, 150))), {"arrays_flat"}),
    (dict(memory=[2**20 + 2**12 * i for i in range(100)]), {"memory_flat"}),
    (dict(device=[2**20] * 100), set()),
    (dict(device=[2**20 + 2**12 * i for i in range(100)]), {"device_flat"}),
    (dict(busy=[0.002 * i * i for i in range(100)]), {"time_flat"}),
    (dict(tokens=[0] * 100), set()),
  ],
)
def test_growth_is_seen(servers, columns, failed):
  result = soak.verdict(servers, soak.Config(), made_up(**columns))
  assert {name for name, held in result["checks"].items() if not held} == failed
  assert result["passed"] == (not failed)
  assert result["arrays_growth"] == pytest.approx(146 / 83 - 1 if "arrays_flat" in failed else 0)


def test_flags_are_checked():
  with pytest.raises(ValueError, match=r"--retrofit=x .*--checkpoint"):
    soak.Config(retrofit="x")
  with pytest.raises(ValueError, match="--kernels"):
    soak.Config(kernels=True, checkpoint="x")
  with pytest.raises(ValueError, match="unknown policy 'lru'"):
    soak.Config(servers=("lru",))
  with pytest.raises(ValueError, match="--servers=dms:int3: the page format must be one of"):
    soak.Config(servers=("dms:int3",))
  for flag, value in (("minutes", 0), ("warm_up", -1.0), ("width", 0)):
    with pytest.raises(ValueError, match=f"--{flag}={value}"):
      soak.Config(**{flag: value})


def test_a_model_for_kernels():
  model, _ = soak.served_model(soak.Config(kernels=True))
  assert model.dtype == jnp.bfloat16 and model.config.head_dim == 64


def test_the_first_difference():
  assert bench_generate.first_difference([1, 2], [1, 2]) is None
  assert bench_generate.first_difference([1, 2, 3], [1, 5, 3]) == 1
  assert bench_generate.first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.slow
def test_widths_are_compared():
  model, _ = soak.served_model(SHORT)
  found = bench_generate.width_divergence(
    model, [[1, 2, 3], [4]], 3, new_tokens=5, prefill_chunk=16, decode_block=4, page_size=4, max_length=48, pages=48
  )
  assert found["widths"] == [1, 3] and len(found["first_difference"]) == 2
  assert found["largest_logprob_difference"] < 1e-4  # float32 through two layers
