"""Generation on eight simulated devices against one, in processes of generation/test_mesh.py."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

import dms_jax
from dms_jax import cache as caches
from dms_jax import checkpoint, execution, policies, spmd
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.execution import fastest_form
from dms_jax.experts import expert_mlp
from dms_jax.families import PRESETS
from dms_jax.generation import decode as decoding
from dms_jax.generation import pressure
from dms_jax.generation.batching import Generator
from dms_jax.generation.conversation import place_like
from dms_jax.generation.sampling import Sampling
from dms_jax.generation.stops import StopCriteria
from dms_jax.model import Model, check_policy
from dms_jax.params import abstract_params, param_table
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.sharding import Split, make_mesh
from experiments import mesh_memory
from experiments.bench import synthetic
from tests.helpers import OTHER_FAMILIES, check_falling_thresholds
from tests.programs import run_cases

WINDOW = 5
CONFIG = tiny.config(num_heads=8, num_kv_heads=4, vocab_size=96)
THREE_HEADS = tiny.config(num_heads=6, num_kv_heads=3, vocab_size=96)
SETTINGS = dict(max_new_tokens=12, eos=False, prefill_chunk=8, decode_block=8)
PROMPTS = [tiny.tokens(CONFIG, 1, n, n).tolist()[0] for n in (1, 19, 8, 5, 3, 12, 30, 7)]


def one_device(gates=None) -> Model:
  return fastest_form(tiny.model(CONFIG, gates or tiny.dms(window=WINDOW)))


def owned(cache) -> np.ndarray:
  """Pages of each head [L, B, K]."""
  return cache.whole(cache.shards.table.owned) if isinstance(cache, caches.ShardedCache) else cache.table.owned


def check_pools(cache) -> None:
  """On every device each page is free or owned, as often as its table says."""
  parts = cache.shards.table.pages, cache.shards.table.owned, cache.shards.table.pool.owners
  pages, own, owners = map(cache.by_device, parts)
  for at in np.ndindex(cache.devices.shape):
    listed = pages[at][np.arange(pages.shape[-1]) < own[at][..., None]]
    np.testing.assert_array_equal(np.bincount(listed, minlength=owners.shape[-1]), owners[at])


def assert_same(many, one) -> None:
  """Tokens, tokens held and keys read are equal; log-probabilities by rounding: sums run in another order."""
  assert many.tokens == one.tokens
  np.testing.assert_allclose(many.logprobs, one.logprobs, atol=3e-5)
  for name in ("seen", "live", "decode_reads", "prompt_reads", "peak", "bytes_live"):
    np.testing.assert_array_equal(getattr(many.metrics, name), getattr(one.metrics, name), err_msg=name)
  if caches.kind_of(one.conversation.cache) == "paged":
    np.testing.assert_array_equal(owned(many.conversation.cache), owned(one.conversation.cache))


def generates(
  kind: str, data: int, tensor: int, policy: policies.Policy | None = None, model: Model | None = None, **settings
) -> None:
  model = model or one_device()
  run = lambda model: dms_jax.generate(model, PROMPTS, policy=policy, cache=kind, **{**SETTINGS, **settings})
  assert_same(run(spmd.place(model, make_mesh(data, tensor))), run(model))


def caches_of_all_kinds() -> None:
  generates("paged", 8, 1)
  generates("contiguous", 1, 2)
  generates("masked", 2, 4)
  generates("paged", 2, 4)


def other_policies() -> None:
  """Heads that sample by their number, statistics of attention, a memory, pages that are selected, sampled tokens."""
  sampled = dict(temperature=0.8, key=jax.random.key(3))
  generates("paged", 2, 4, policies.Random(budget=12, window=4), **sampled)
  generates("contiguous", 1, 4, policies.Quest(budget=16, page=4, window=3, dense_layers=0))
  generates("paged", 1, 4, policies.RKV(budget=14, window=3, buffer=4))
  generates("contiguous", 2, 2, policies.H2O(budget=12, window=5))


def other_families() -> None:
  """Biases after projections, which one device alone must add; attention sinks; experts, stacked and apart."""
  generates("paged", 1, 2, model=of_family("gpt2"))
  for name, experts, data, tensor in (
    ("mixtral", 4, 2, 2), ("mixtral", 8, 1, 4), ("gpt_oss", 4, 2, 2), ("gpt_oss", 4, 2, 4), ("qwen3_moe", 6, 2, 2),
    ("qwen3_moe", 8, 1, 4),
  ):  # fmt: skip
    generates("paged", data, tensor, model=with_experts(name, experts))


def families_without_experts() -> None:
  """Layers that slide, capped scores, partial RoPE, layers without it, norms over all heads."""
  for name in ("gpt_neox", "phi3-partial", "granite", "gemma2", "gemma3", "smollm3", "olmo3"):
    generates("paged", 2, 2, model=of_family(name))
  four = dict(num_heads=8, num_kv_heads=4)
  generates("paged", 2, 4, model=of_family("olmo2", **four))
  generates("contiguous", 1, 4, policies.H2O(budget=12, window=5), model=of_family("olmo2", **four))


def by_rows() -> None:
  """Three KV heads on four devices, which split rows in their place."""
  generates("paged", 2, 4, model=three_heads())


def policies_by_rows() -> None:
  """Heads that decide together, and those of the cases above, sampled; padded rows and late gates, as on a GPU."""
  model, sampled = three_heads(), dict(temperature=0.8, key=jax.random.key(3))
  generates("contiguous", 2, 2, policies.H2O(budget=12, window=5), model=model)
  generates("contiguous", 1, 2, policies.TOVA(budget=9, per_layer=True), model=model)
  generates("contiguous", 1, 4, policies.Quest(budget=16, page=4, window=3, dense_layers=0), model=model)
  generates("paged", 1, 4, policies.RKV(budget=14, window=3, buffer=4), model=model)
  generates("masked", 2, 4, policies.Random(budget=12, window=4), model=model, **sampled)
  generates("paged", 2, 2, model=three_heads(tiny.dms(window=WINDOW, granularity="layer")))
  with execution.override(least_rows=5, late_gates=True):
    generates("paged", 1, 4, model=model)


def families_by_rows() -> None:
  """One KV head, sinks, norms over all heads, whole and split experts with biases, joint updates by row."""
  generates("paged", 2, 4, model=of_family("gemma3", num_heads=4, num_kv_heads=1))
  generates("contiguous", 1, 4, policies.H2O(budget=12, window=5), model=of_family("olmo2"))
  generates("paged", 2, 4, model=of_family("gpt_oss"))  # two KV heads
  generates("paged", 1, 4, model=of_family("gpt_oss", num_experts=6))
  generates("paged", 2, 4, model=of_family("mixtral", num_experts=8))
  gates = tiny.dms(window=3, scale=20.0, offset=0.0, elastic=(1.5, 12.0))
  targets = tuple(f"{name}_proj" for name in ("q", "o", "gate", "up", "down"))
  lora = LoRAConfig(rank=2, scale=8.0, by_cr=True, targets=targets)
  model = fastest_form(tiny.model(three_heads().config, gates, lora))
  with execution.override(joint_updates=8):
    generates("paged", 2, 2, policies.DMS(cr=np.linspace(1.5, 12, len(PROMPTS))), model=model)


def three_heads(gates=None) -> Model:
  return fastest_form(tiny.model(THREE_HEADS, gates or tiny.dms(window=WINDOW)))


def of_family(name: str, **changes) -> Model:
  """A tiny model of a family, with a vocabulary that four devices share."""
  config = dataclasses.replace(OTHER_FAMILIES[name], vocab_size=96, **changes)
  return fastest_form(tiny.model(config, tiny.dms(window=2 if config.sliding_layers else WINDOW)))


def with_experts(name: str, experts: int, d_ff: int = 24) -> Model:
  """One of so many experts a layer, and heads that four devices share."""
  return of_family(name, num_experts=experts, d_ff=d_ff, num_heads=8, num_kv_heads=4)


def whole_experts() -> None:
  """Each device has and computes its own experts, whatever stands in others' rows of the products; six are split."""
  ragged_dot = jax.lax.ragged_dot

  def poisoned(x, weights, sizes, **options):
    y = ragged_dot(x, weights, sizes, **options)
    return jnp.where((jnp.arange(len(y)) < jnp.sum(sizes))[:, None], y, jnp.nan)

  def mlp(model, x):
    return (expert_mlp(model.config, model.params["layers"][0], x),)

  mesh, run = make_mesh(2, 4), jax.jit(spmd.on_mesh(spmd.ROWS)(mlp))
  for name, experts, d_ff, shard in (
    ("mixtral", 8, 22, (2, 22)), ("gpt_oss", 4, 24, (1, 24)), ("qwen3_moe", 6, 24, (6, 6)),
  ):  # fmt: skip
    model, folder = with_experts(name, experts, d_ff), Path(tempfile.mkdtemp()) / name
    checkpoint.save(folder, tiny.model(model.config, model.dms))
    placed, _ = dms_jax.load(folder, mesh=mesh)
    shapes = {name: x.addressable_shards[0].data.shape for name, x in placed.params["layers"][0].items()}
    assert shapes["up_proj"][:2] == shard and shapes["down_proj"][::2] == shard and shapes["router"][0] == experts
    if name == "gpt_oss":
      assert shapes["up_bias"] == shard and shapes["down_bias"][0] == 1 and shapes["router_bias"] == (experts,)
    for tokens in (1, 5):  # with one, there are devices whose experts no token has chosen
      x = jax.random.normal(jax.random.key(tokens), (2, tokens, model.config.d_model))
      want = jax.jit(mlp)(model, x)[0]
      with mock.patch.object(jax.lax, "ragged_dot", poisoned):
        got = run(placed, x)[0]
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # devices' sums are added in another order


def moves_of_other_kinds() -> None:
  moves(("contiguous", "masked"))


def moves_by_rows() -> None:
  moves(("paged", "contiguous", "masked"), THREE_HEADS)


def moves(kinds: tuple[str, ...] = ("paged",), config: ModelConfig = CONFIG) -> None:
  """A checkpoint is loaded to its shards; conversations go on over meshes, in memory and from disk."""
  folder = Path(tempfile.mkdtemp())
  checkpoint.save(folder / "model", tiny.model(config, tiny.dms(window=WINDOW), LoRAConfig(rank=2, scale=0.1)))
  mesh = make_mesh(2, 4)
  (one, _), (many, _) = dms_jax.load(folder / "model"), dms_jax.load(folder / "model", mesh=mesh)
  shards = {name: x.addressable_shards[0].data for name, x in many.params["layers"][0].items()}
  assert len(shards["q_proj"]) == config.num_heads // Split.of(config, mesh).head_parts
  assert len(shards["up_proj"]) == config.d_ff // 4
  assert len(many.params["embed"].addressable_shards[0].data) == config.vocab_size // 4
  turn = [[3, 4]] * 8
  for kind in kinds:
    alone, begun = (dms_jax.generate(model, PROMPTS, cache=kind, **SETTINGS) for model in (one, many))
    want = dms_jax.generate(one, turn, continue_from=alone, **SETTINGS)
    dms_jax.save_conversation(folder / kind, begun)
    for model, past in (
      (many, begun), (one, begun), (many, alone),
      (one, dms_jax.load_conversation(folder / kind, one)), (many, dms_jax.load_conversation(folder / kind, many)),
    ):  # fmt: skip
      got = dms_jax.generate(model, turn, continue_from=past, **SETTINGS)
      assert got.tokens == want.tokens
      np.testing.assert_array_equal(got.metrics.live, want.metrics.live)


def decode_block(model: Model, kind: str, batch: int, capacity: int):
  """(compiled program, cache) of two decode steps."""
  policy, column = check_policy(model, None), lambda: jnp.zeros(batch, jnp.int32)
  cache = caches.for_model(model, policy, batch=batch, capacity=capacity, kind=kind)
  rows = place_like(model, decoding.DecodeState(column(), None, column(), column() + 4, column(), column()))
  stop = StopCriteria(jnp.zeros(1, jnp.int32))
  lowered = decoding.decode_block.lower(model, policy, cache, rows, Sampling(), stop, steps=2, history=False)
  return lowered.compile(), cache


def programs_of_experts() -> None:
  """Those of one MLP a layer: no weights move, and nothing goes from all devices to all."""
  for name in ("mixtral", "gpt_oss", "qwen3_moe"):
    programs(with_experts(name, 8), ("paged",))


def programs_of_norms_over_all_heads() -> None:
  """A third sum a layer, of two numbers a row: the mean squares of queries and keys."""
  programs(of_family("olmo2", num_heads=8, num_kv_heads=4), ("paged", "contiguous"))


def programs(model: Model | None = None, kinds: tuple[str, ...] = ("paged", "contiguous", "masked")) -> None:
  """Two sums a layer over "tensor", none over "data"; a device's memory is its share, and no cache is copied."""
  mesh = make_mesh(2, 4)
  model = spmd.place((model or tiny.model(CONFIG, tiny.dms(window=WINDOW))).unstacked(), mesh)
  config = model.config
  for kind in kinds:
    program, cache = decode_block(model, kind, 8, 8192)
    found = exchanges(program)
    assert {name for _, name in found} <= {"all-reduce", "all-gather"}, found
    widths = f"f32[4,1,{config.d_model}]", f"f32[4,{config.d_model}]"  # experts take rows of tokens
    activations = [shape for shape, _ in found if shape.startswith(widths)]
    assert len(activations) == 2 * config.num_layers + 1  # and the embedding
    gathers = [shape for shape, name in found if name == "all-gather"]
    assert len(gathers) == 1 and gathers[0].startswith(f"f32[4,{config.vocab_size}]")
    squares = [shape for shape, _ in found if re.match(r"f32\[4,(1,)?2\]", shape)]
    assert len(squares) == (config.num_layers if config.qk_norm_over == "all" else 0), found
    # Once a step whether each of 4 rows found slots; after the block the counts of 2 steps and 4 rows.
    rest = [shape for shape, name in found if name == "all-reduce" and shape not in (*activations, *squares)]
    assert all(re.fullmatch(r"\(?(s32\[(4|2,4)\]\{[\d,]*\}(, )?)+\)?", shape) for shape in rest), rest
    check_memory(program, model, cache, sum(x.nbytes for x in jax.tree.leaves(model)) / 4)


def programs_by_rows_of_experts() -> None:
  programs_by_rows(of_family("mixtral", num_experts=8))


def programs_by_rows(model: Model | None = None) -> None:
  """Two exchanges a layer over "tensor": rows before the feed-forward, their sums after it; attention moves nothing."""
  model = spmd.place((model or three_heads()).unstacked(), make_mesh(2, 4))
  width, layers = model.config.d_model, model.config.num_layers
  attention = re.compile("[qkvo]_proj|router|dms_|.*norm")  # and what is small
  whole = sum(x.nbytes for layer in model.params["layers"] for name, x in layer.items() if attention.match(name))
  weights = whole + (sum(x.nbytes for x in jax.tree.leaves(model)) - whole) / 4
  for kind in ("paged", "contiguous"):
    program, cache = decode_block(model, kind, 16, 8192)
    found = [(re.sub(r"\{[\d,]*\}", "", shape), name) for shape, name in exchanges(program)]
    states = lambda rows: (f"f32[{rows},1,{width}]", f"f32[{rows},{width}]")  # experts take rows of tokens
    joined = [shape for shape, name in found if name == "all-gather" and shape in states(8)]
    parted = [shape for shape, name in found if name == "reduce-scatter" and shape in states(2)]
    # Once a step the tokens, the sums of their embeddings, the last states and the logits.
    assert len(joined) == len(parted) == layers + 1, found
    rest = [shape for shape, name in found if name != "all-to-all" and shape not in (*joined, *parted)]
    assert rest == ["s32[8,1]"] and len(found) == 2 * layers + 4, found
    check_memory(program, model, cache, weights)


def exchanges(program) -> list[tuple[str, str]]:
  """(shapes, kind) of what devices of one row of a mesh (2, 4) exchange; others exchange nothing."""
  text = program.as_text()
  groups = set(re.findall(r"replica_groups=(\{\{.*?\}\}|\[\S+)", text))
  assert groups <= {"{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]"}, groups
  return re.findall(r"= (.*?) (all-[a-z-]+?|reduce-scatter|collective-[a-z]+?)(?:-start)?\(", text)


def check_memory(program, model: Model, cache: caches.ShardedCache, weights: float) -> None:
  """A device's memory is its share, that of the weights as given, of a mesh of eight; no cache is copied."""
  sizes = program.memory_analysis()
  share = cache.device_bytes + sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model))
  assert abs(share / (cache.nbytes / 8 + weights) - 1) < 0.05 and abs(sizes.argument_size_in_bytes / share - 1) < 0.05
  assert sizes.alias_size_in_bytes >= cache.device_bytes
  if caches.kind_of(cache) != "masked":  # whose attention reads all slots into an array of its own
    assert sizes.temp_size_in_bytes < 0.1 * cache.device_bytes


def a_large_model() -> None:
  """70B, 32 chains of 128K tokens at CR 8: it fits eight devices."""
  config, devices = mesh_memory.Config(), MeshConfig(tensor=8)
  assert foreseen(config, devices)["fits"]
  on_tpu = mesh_memory.measure(dataclasses.replace(config, device_gib=95), MeshConfig(data=2, tensor=8))
  assert on_tpu["fits"] and not mesh_memory.measure(dataclasses.replace(config, cr=1), devices)["fits"]


def memory_by_rows() -> None:
  """SmolLM2-135M, whose three KV heads four devices do not share."""
  foreseen(mesh_memory.Config("smollm2-135m", tokens=8192), MeshConfig(data=2, tensor=4))


def foreseen(config: mesh_memory.Config, devices: MeshConfig) -> dict:
  """What `mesh_memory` foresees: the arguments of a compiled decode block."""
  mesh, shape, dms = make_mesh(devices.data, devices.tensor), PRESETS[config.preset], DMSConfig(window=256)
  table = param_table(shape, dms)
  put = lambda tree, spec: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
  )
  model = Model(abstract_params(table, jnp.bfloat16), shape, dms, mesh=mesh)
  specs = spmd.model_specs(model, mesh)
  model = model.replace(params=jax.tree.map(put, model.params, specs))
  policy, column = check_policy(model, None), jax.ShapeDtypeStruct((config.rows,), jnp.int32)
  slots = -(-config.tokens // int(config.cr))
  make = lambda: caches.for_model(model, policy, batch=config.rows, capacity=slots, longest=config.tokens, kind="paged")
  cache = put(jax.eval_shape(make), spmd.CACHE)
  rows = put(decoding.DecodeState(column, None, column, column, column, column), cache.split.spec(spmd.ROWS))
  stop = StopCriteria(jnp.zeros(1, jnp.int32))
  with execution.override(bits_storage=False):
    lowered = decoding.decode_block.lower(model, policy, cache, rows, Sampling(), stop, steps=2, history=False)
  arguments = lowered.compile().memory_analysis().argument_size_in_bytes
  found = mesh_memory.measure(config, devices)
  expected = found["bytes"]["weights"] + found["bytes"]["cache"]
  assert abs(arguments / expected - 1) < 0.05, (arguments, expected)
  print({name: round(size / 2**30, 2) for name, size in found["bytes"].items()}, arguments / 2**30)
  return found


def requests_over_heads() -> None:
  requests_of_a_generator(1, 4)


def requests_by_rows() -> None:
  requests_of_a_generator(1, 2, three_heads(tiny.dms(window=3)))


def requests_to_experts() -> None:
  requests_of_a_generator(2, 4, with_experts("mixtral", 8))


def requests_to_layers_that_slide() -> None:
  requests_of_a_generator(2, 2, of_family("gpt_oss"))


def requests_of_a_generator(data: int = 2, tensor: int = 2, model: Model | None = None) -> None:
  """The same tokens as alone on one device, though pages run out on the mesh and rows are preempted."""
  model = model or one_device(tiny.dms(window=3))
  sizes = dict(page_size=4, prefill_chunk=8, decode_block=4, max_length=96, eos=False, temperature=0.8)
  rng, requests = np.random.default_rng(0), []
  for seed in range(6):
    length, new, chains = (int(rng.integers(*limits)) for limits in ((1, 40), (1, 40), (1, 3)))
    requests.append((tiny.tokens(CONFIG, 1, length, seed).tolist()[0], new, chains, jax.random.key(seed)))

  def answer(model, width, **budget):
    generator = Generator(model, width=width, **sizes, **budget)
    tickets = []
    for ids, new, chains, key in requests:
      tickets.append(generator.submit(ids, max_new_tokens=new, chains=chains, key=key, keep=True))
      for _ in range(2):
        generator.step()
    while generator.busy:
      generator.step()
      if model.mesh is not None:
        check_pools(generator.cache)
    assert not generator.cache.live().any()
    return generator, [generator.results[ticket] for ticket in tickets]

  _, want = answer(model, 3, pages=400)
  mesh = make_mesh(data, tensor)
  placed, pools = spmd.place(model, mesh), Split.of(model.config, mesh).row_parts
  memory = Generator(placed, width=2 * pools, **sizes).memory
  longest = max(memory.pages_of(stored.cache) for one in want for stored in one.stored)
  budget = memory.own.fixed_bytes + (longest + 2 * memory.pool_heads) * memory.own.page_bytes
  few = dict(pages=memory.own.pages) if pools > 1 else {}  # the pools grow, at last by way of host memory
  generator, results = answer(placed, 2 * pools, budget=budget, **few)
  assert generator.preemptions and generator.cache.device_bytes <= budget
  for got, one in zip(results, want, strict=True):
    assert got.tokens == one.tokens and got.finish_reason == one.finish_reason
    assert [used.until() for used in got.usage] == [used.until() for used in one.usage]
    for mine, theirs in zip(got.stored, one.stored, strict=True):
      np.testing.assert_array_equal(mine.cache.archived, theirs.cache.archived)


def rows_under_pressure() -> None:
  """Chains give up the same tokens as on one device; of two pools that which is short compresses its own."""
  sizes = dict(width=4, page_size=4, prefill_chunk=8, decode_block=4, max_length=96, eos=False, on_pressure="compress")
  gates = tiny.dms(window=3, scale=3.0, offset=1.0)
  for model, data, tensor in ((one_device(gates), 2, 4), (three_heads(gates), 1, 2)):
    placed, outcomes = spmd.place(model, make_mesh(data, tensor)), []
    for each in (model, placed):
      generator = Generator(each, pages=400, **sizes)
      for ids in (PROMPTS[n] for n in (1, 2, 5, 6)):
        generator.submit(ids, max_new_tokens=24)
      for _ in range(3):
        generator.step()
      for pool in range(generator.memory.pools):
        assert pressure.compress(generator.policy, generator.rows, generator.memory, pool)
        pressure.record(generator.rows, generator.memory)
      for _ in generator.run():
        pass
      outcomes.append([(result, result.given_up[0][0]) for result in generator.results.values()])
    for (got, given), (want, wanted) in zip(*outcomes, strict=True):
      assert got.tokens == want.tokens and (given.seen, given.tokens) == (wanted.seen, wanted.tokens)
      np.testing.assert_allclose(given.numbers["threshold"], wanted.numbers["threshold"], rtol=1e-5)
    memory = generator.memory
    budget = memory.own.fixed_bytes + (memory.pool_rows + 14) * memory.pool_heads * memory.own.page_bytes
    generator, asked = Generator(placed, budget=budget, **sizes), ((30, 40), (3, 4), (26, 40), (5, 4))
    prompts = [tiny.tokens(CONFIG, 1, length, length).tolist()[0] for length, _ in asked]
    tickets = [generator.submit(ids, max_new_tokens=new) for ids, (_, new) in zip(prompts, asked, strict=True)]
    while generator.busy:
      generator.step()
      check_pools(generator.cache)
    assert generator.cache.device_bytes <= budget and not generator.preemptions
    results = [generator.results[ticket] for ticket in tickets]
    check_falling_thresholds(model, float(generator.policy.limit), prompts[::2], results[::2])
    assert not any(any(result.given_up) for result in results[1::2])


def caches_of_benchmarks() -> None:
  """A cache that is filled on a mesh stands where that of one device does; every pool is sound."""
  for model, mesh in ((one_device(), make_mesh(2, 4)), (three_heads(), make_mesh(2, 2))):
    check_filled(model, mesh)


def check_filled(model: Model, mesh: Mesh) -> None:
  tokens, pools = 57, Split.of(model.config, mesh).row_parts
  policy = synthetic.sampled_policy(model.config, tokens=tokens, cr=4, window=WINDOW)
  for kind in ("contiguous", "paged"):

    def filled(model, data=1, kind=kind):
      if kind == "contiguous":
        shape = synthetic.slots_shape(model, policy, batch=4, longest=64)
      else:
        pages = 4 // data * synthetic.pages_for(model, policy, tokens, 4)
        shape = synthetic.pages_shape(model, policy, batch=4, longest=64, pages=pages, page=4)
      cache = synthetic.filled(shape, model, policy, tokens=tokens)
      assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(lambda x: x.shape, shape)
      return cache

    one, many = filled(model), filled(spmd.place(model, mesh), pools)
    np.testing.assert_array_equal(many.seen, one.seen)
    for name in ("archived", "evicted"):
      np.testing.assert_array_equal(many.whole(getattr(many.shards, name)), getattr(one, name))
    if kind == "paged":
      np.testing.assert_array_equal(owned(many), owned(one))
      check_pools(many)


def refusals() -> None:
  import pytest

  model, mesh = one_device(), make_mesh(2, 4)
  placed = spmd.place(model, mesh)
  explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
  for message, call in (
    ("mesh.tensor=5 does not divide the 48 channels", lambda: spmd.place(model, make_mesh(1, 5))),
    ("mesh.data=1 x mesh.tensor=8 does not divide 3 rows: give a multiple of 8, since", lambda: dms_jax.generate(
      spmd.place(model, make_mesh(1, 8)), PROMPTS[:3], **SETTINGS)),
    ("'2x4' is no mesh", lambda: dms_jax.load("nowhere", mesh="2x4")),
    (r"a mesh of axes \('x', 'y'\)", lambda: dms_jax.load("nowhere", mesh=jax.make_mesh((2, 4), ("x", "y")))),
    ("not \\('data', 'tensor'\\)", lambda: spmd.place(model, Mesh(mesh.devices.T, ("tensor", "data")))),
    ("AxisType.Auto", lambda: spmd.place(model, explicit)),
    ("mesh.data=2 does not divide 3 rows", lambda: dms_jax.generate(placed, PROMPTS[:3], **SETTINGS)),
    ("granularity=layer", lambda: spmd.place(one_device(tiny.dms(granularity="layer")), mesh)),
    (r"decide together here \(TOVA\)", lambda: dms_jax.generate(
      placed, PROMPTS, policy=policies.TOVA(budget=9, per_layer=True), **SETTINGS)),
    ("the width 2 of a device", lambda: Generator(placed, width=4).submit([1], chains=3)),
    ("take .* on each device; give a larger budget", lambda: Generator(placed, width=4, budget=9)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      call()


QUICK = (
  whole_experts, caches_of_all_kinds, by_rows, programs, programs_by_rows, moves, requests_of_a_generator,
  requests_by_rows, caches_of_benchmarks, refusals,
)  # fmt: skip
SLOW = (
  other_policies, other_families, families_without_experts, moves_of_other_kinds, programs_of_experts,
  programs_of_norms_over_all_heads, programs_by_rows_of_experts, policies_by_rows, families_by_rows, moves_by_rows,
  requests_over_heads, requests_to_experts, requests_to_layers_that_slide, rows_under_pressure, a_large_model,
  memory_by_rows,
)  # fmt: skip
CASES = {case.__name__: case for case in (*QUICK, *SLOW)}

if __name__ == "__main__":
  run_cases(CASES)
