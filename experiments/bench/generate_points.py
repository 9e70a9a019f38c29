"""Time, memory and energy of decode steps and prompts of a model's shape, dense and with DMS.

A dense model has a contiguous cache and no gates, a DMS model rings, pages and random evictions
(`experiments.bench.synthetic`). A "by_cr" model also has low-rank updates of q, k, v and o that grow with each row's CR
and are not merged (`LoRAConfig.by_cr`); merged for one CR (`Model.at`) it is the DMS model. A *point* is a batch of
rows at one length. Its steps are timed inside compiled decode blocks, each from the same state. Its roofline is the
bytes of the weights and of the live keys and values over the measured read bandwidth; on a mesh, those of the device
that reads most in each layer. Programs are compiled in parallel, before anything is timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax import cache as caches
from dms_jax import spmd
from dms_jax.cache import Cache, PagedCache, ShardedCache
from dms_jax.config import ModelConfig
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.generation.decode import DecodeState, StopCriteria
from dms_jax.generation.sampling import Sampling
from dms_jax.model import Model
from dms_jax.policies import Policy, Vanilla
from dms_jax.sharding import Split
from experiments.bench import synthetic

Kind = Literal["dense", "dms", "by_cr"]
KINDS: tuple[Kind, ...] = ("dense", "dms")
RANK, RATIOS = 16, (1.5, 12.0)  # of "by_cr", as in the retrofit smollm2-135m-elastic-by-cr


@dataclasses.dataclass(frozen=True)
class Shape:
  """A model's shape and its evictions: `cr` at each length, or `held` [L][K] tokens at length `held_at`.

  `page` is the slots of a page, `steps` those of a compiled decode block.
  """

  config: ModelConfig
  window: int
  cr: float = 8.0
  held: tuple[tuple[float, ...], ...] | None = None
  held_at: int = 0
  dtype: str = "bfloat16"
  page: int = 32
  steps: int = 16

  def policy(self, kind: Kind, tokens: int) -> Policy:
    if kind == "dense":
      return Vanilla().resolved(0)
    if self.held is not None:
      return synthetic.policy_of(np.array(self.held), tokens=self.held_at, window=self.window)
    return synthetic.sampled_policy(self.config, tokens=tokens, cr=self.cr, window=self.window)


@dataclasses.dataclass(frozen=True)
class Point:
  """`batch` rows that end a decode block with `tokens` tokens; memory is allocated for `longest`.

  With `chains` the rows continue one prompt and share its pages.
  """

  kind: Kind
  batch: int
  tokens: int
  longest: int
  chains: bool = False


class Energy:
  """`energy()` reads the GPU's energy counter through NVML, in joules; None without one, and `why` says why."""

  def __init__(self):
    self.why, self._read = "", None

  def __call__(self) -> float | None:
    if self._read is None and not self.why:
      try:
        self._read = self._counter()
        self._read()
      except Exception as error:  # no GPU, not installed, or a device that does not count
        self.why, self._read = f"{type(error).__name__}: {error}", None
    return None if self._read is None else self._read()

  @staticmethod
  def _counter() -> Callable[[], float]:
    if jax.default_backend() != "gpu":
      raise RuntimeError(f"the default device is a {jax.default_backend()}")
    import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    by_name = visible and not visible.isdigit()  # "GPU-..."
    device = (
      pynvml.nvmlDeviceGetHandleByUUID(visible) if by_name else pynvml.nvmlDeviceGetHandleByIndex(int(visible or 0))
    )
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3


def bytes_in_use() -> int:
  """Device memory in use as the runtime reports it, or else the bytes of all live arrays."""
  stats = jax.devices()[0].memory_stats()
  return stats["bytes_in_use"] if stats else sum(x.nbytes for x in jax.live_arrays())


class Programs:
  """Traces programs one by one and compiles them in parallel; `get` raises the program's error."""

  def __init__(self, workers: int):
    self._pool, self._futures = ThreadPoolExecutor(workers), {}

  def start(self, key: Any, lower: Callable[[], Any]) -> None:
    if key in self._futures:
      return
    try:
      self._futures[key] = self._pool.submit(lower().compile)
    except Exception as error:  # the cases that need it will say so
      self._futures[key] = failed = Future()
      failed.set_exception(error)

  def wait(self, seconds: float) -> None:
    """Waits until nothing is being compiled, so that timing has the machine to itself; at most `seconds`."""
    concurrent.futures.wait(self._futures.values(), timeout=seconds)

  def get(self, key: Any, lower: Callable[[], Any]) -> Any:
    self.start(key, lower)
    return self._futures[key].result()


class Bench:
  """One shape's model and its points.

  Args:
    bandwidth: measured read bandwidth of the device, bytes a second.
    seconds: length of each timing.
    alone: on a mesh, the bench of one device whose weights are also these.
    mesh: devices of the points; None: one device.
  """

  def __init__(
    self, shape: Shape, bandwidth: float, programs: Programs, energy: Energy, seconds: float = 0.5,
    alone: Bench | None = None, mesh: Mesh | None = None,
  ):  # fmt: skip
    self.shape, self.bandwidth, self.programs, self.energy, self.seconds = shape, bandwidth, programs, energy, seconds
    self.dtype = jnp.dtype(shape.dtype)
    self.alone, self.mesh = alone, mesh
    self.row_parts, self.head_parts = (1, 1) if mesh is None else Split.of(shape.config, mesh).parts
    self._models: dict[Kind, Model] = {}
    self._pages: dict[int, int] = {}  # of a row, by its length
    self._points: dict[tuple[Point, float], dict[str, Any]] = {}

  def on(self, mesh: Mesh) -> Bench:
    """The points of the same weights on a mesh. `Energy` counts one device, so that it is not counted."""
    return Bench(self.shape, self.bandwidth, self.programs, lambda: None, self.seconds, self, mesh)

  def of(self, shape: Shape) -> Bench:
    """The points of another shape on the same device, with weights of its own."""
    return Bench(shape, self.bandwidth, self.programs, self.energy, self.seconds)

  def model(self, kind: Kind) -> Model:
    """All kinds have the same weights; "dms" and "by_cr" also have gates."""
    if not self._models:
      gated = self.alone.model("dms") if self.alone else self._random()
      gated = spmd.place(gated, self.mesh)
      bare = lambda layer: {name: x for name, x in layer.items() if not name.startswith("dms_")}
      layers = gated.params["layers"]
      layers = [bare(layer) for layer in layers] if isinstance(layers, list) else bare(layers)
      self._models = {"dms": gated, "dense": gated.replace(dms=None, params={**gated.params, "layers": layers})}
    if kind not in self._models:
      self._models[kind] = synthetic.with_updates(self._models["dms"], rank=RANK, ratios=RATIOS)
    return self._models[kind]

  def _random(self) -> Model:
    return fastest_form(synthetic.random_model(self.shape.config, window=self.shape.window, dtype=self.dtype))

  def cache_shape(self, kind: Kind, batch: int, longest: int, archive: str | None = None) -> Cache | ShardedCache:
    """A cache just large enough for `batch` texts of `longest` tokens; `archive`: DMS's pages in "int8" or "float8"."""
    model, policy, page = self.model(kind), self.shape.policy(kind, longest), self.shape.page
    if kind == "dense":
      return synthetic.slots_shape(model, policy, batch=batch, longest=longest)
    if longest not in self._pages:
      self._pages[longest] = synthetic.pages_for(model, policy, longest, page)
    options = dict(longest=longest, pages=batch // self.row_parts * self._pages[longest], page=page, archive=archive)
    return synthetic.pages_shape(model, policy, batch=batch, **options)

  def rows_in(self, budget: int, longest: int) -> int:
    """Rows of `longest` tokens with DMS whose caches fit a budget of bytes."""
    size = lambda batch: synthetic.nbytes(self.cache_shape("dms", batch, longest))
    rows = max(int(budget // (size(2) - size(1))), 1)
    while rows > 1 and size(rows) > budget:
      rows -= 1
    return rows

  # Decoding -----------------------------------------------------------------------------------------------------------

  def arguments(self, kind: Kind, tokens: int, batch: int = 1) -> tuple[Model, Policy, Sampling, StopCriteria]:
    policy = self.shape.policy(kind, tokens)
    if kind == "by_cr":  # the rows ask for CRs of their own
      policy = policy.replace(crs=jnp.linspace(*RATIOS, batch))
    others = policy, Sampling(), StopCriteria(jnp.zeros(0, jnp.int32))
    if self.mesh is not None:
      others = jax.device_put(others, NamedSharding(self.mesh, P()))
    return self.model(kind), *others

  def rows(self, batch: int) -> DecodeState:
    """Rows that never end, each on its device."""
    rows = synthetic.running_rows(batch)
    return rows if self.mesh is None else spmd.place_rows(self.model("dense"), rows)

  def lower(self, point: Point) -> Any:
    """The lowered decode block of a point, which serves all points of its kind, batch and longest text."""
    model, policy, sampling, stop_criteria = self.arguments(point.kind, point.longest, point.batch)
    cache = self.cache_shape(point.kind, point.batch, point.longest)
    rows, decode_block = self.rows(point.batch), decoding.decode_block
    return decode_block.lower(
      model, policy, cache, rows, sampling, stop_criteria, steps=self.shape.steps, history=False
    )

  def start(self, point: Point) -> None:
    """Begins to compile the programs of a point."""
    self.programs.start(self._key(point), partial(self.lower, point))

  def _key(self, point: Point) -> tuple:
    return self.shape, point.kind, point.batch, point.longest, self.mesh

  def point(self, point: Point, seconds: float | None = None) -> dict[str, Any]:
    """Measures a point once; later calls give the same result.

    Returns:
      ms of a step, tokens_per_s, CR, kv_bytes live, cache_bytes allocated, used_bytes of it (pages that are free left
      out), roofline_ms and of_roofline, joules_per_token (None without NVML).

    Raises:
      RuntimeError: rows without room.
    """
    seconds = seconds or self.seconds
    known = [found for (other, took), found in self._points.items() if other == point and took >= seconds]
    if not known:
      known = [self._measure(point, seconds)]
      self._points[point, seconds] = known[0]
    return known[0]

  def _measure(self, point: Point, seconds: float) -> dict[str, Any]:
    run = self.programs.get(self._key(point), partial(self.lower, point))
    model, policy, sampling, stop_criteria = self.arguments(point.kind, point.tokens, point.batch)
    shape, steps = self.cache_shape(point.kind, point.batch, point.longest), self.shape.steps
    cache = synthetic.filled(shape, model, policy, tokens=point.tokens - steps, shared=point.chains)
    rows = self.rows(point.batch)
    used = synthetic.nbytes(shape)
    if isinstance(own := caches.of_device(cache), PagedCache):
      used -= int(np.sum(arrays(cache).table.pool.count)) * own.page_bytes
    begin = copied((small(cache), rows))

    def decode_block(cache: Cache | ShardedCache) -> tuple[Cache | ShardedCache, Any]:
      fresh, rows = copied(begin)
      cache, _, emitted, counts = run(model, policy, with_small(cache, fresh), rows, sampling, stop_criteria)
      return cache, (emitted, counts)

    cache, (emitted, counts) = decode_block(cache)
    if not bool(jnp.all(emitted.valid)):
      raise RuntimeError(f"{point}: rows without room")
    live = np.asarray(counts.live)
    best, took, joules = clock(decode_block, cache, seconds, self.energy)
    del cache
    weights = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model.params))
    slot = 2 * self.shape.config.head_dim * self.dtype.itemsize
    parts = self.row_parts, -1, self.head_parts, live.shape[2] // self.head_parts
    of_devices = live.reshape(len(live), *parts).sum((2, 4))
    busiest = int(of_devices.max((1, 2)).sum())  # in each layer: devices wait for one another
    kv, roofline = int(live.sum()) * slot, (weights + busiest * slot) / self.bandwidth
    return {
      "ms": best / steps * 1e3, "tokens_per_s": point.batch * steps / best,
      "CR": float(point.tokens / live.mean()), "kv_bytes": kv, "cache_bytes": synthetic.nbytes(shape),
      "used_bytes": used, "roofline_ms": roofline * 1e3, "of_roofline": roofline * steps / best,
      "joules_per_token": None if joules is None else joules / (took * point.batch * steps),
    }  # fmt: skip

  # Prompts ------------------------------------------------------------------------------------------------------------

  def prompt_cache(self, kind: Kind, tokens: int) -> Cache:
    """An empty cache for one prompt, with pages for all of it: a chunk reserves pages as if it evicted nothing."""
    model, policy, page = self.model(kind), self.shape.policy(kind, tokens), self.shape.page
    if kind == "dense":
      return synthetic.slots_shape(model, policy, batch=1, longest=tokens)
    pages = self.shape.config.num_layers * self.shape.config.num_kv_heads * -(-tokens // page)
    return synthetic.pages_shape(model, policy, batch=1, longest=tokens, pages=pages, page=page)

  def lower_prompt(self, kind: Kind, tokens: int, chunk: int) -> Any:
    """The program that reads a chunk of a prompt of `tokens` tokens."""
    model, policy, *_ = self.arguments(kind, tokens)
    spec = jax.ShapeDtypeStruct
    return decoding.prefill_chunk.lower(
      model, policy, self.prompt_cache(kind, tokens), spec((1, chunk), jnp.int32), spec((1,), jnp.int32),
      spec((1,), jnp.int32), spec((1, self.shape.config.vocab_size), jnp.float32),
    )  # fmt: skip

  def start_prompt(self, kind: Kind, tokens: int, chunk: int) -> None:
    self.programs.start((self.shape, kind, tokens, chunk, "prompt"), partial(self.lower_prompt, kind, tokens, chunk))

  def first_token(self, kind: Kind, tokens: int, chunk: int, rounds: int = 4) -> dict[str, Any]:
    """(seconds from a prompt on the host to its first token there, best of `rounds`; achieved CR after the prompt).

    Raises:
      RuntimeError: no room.
    """
    key = self.shape, kind, tokens, chunk, "prompt"
    run = self.programs.get(key, partial(self.lower_prompt, kind, tokens, chunk))
    model, policy, sampling, stop_criteria = self.arguments(kind, tokens)
    ids = np.random.default_rng(0).integers(0, self.shape.config.vocab_size, (1, tokens)).astype(np.int32)
    best, vocabulary = float("inf"), self.shape.config.vocab_size
    for _ in range(rounds):
      cache, rows = empty(self.prompt_cache(kind, tokens)), synthetic.running_rows(1)
      logits = jax.block_until_ready(jnp.zeros((1, vocabulary), jnp.float32))
      stalls, begin = [], time.perf_counter()
      for at in range(0, tokens, chunk):
        part = np.zeros((1, chunk), np.int32)
        part[:, : tokens - at] = ids[:, at : at + chunk]
        length = np.array([min(chunk, tokens - at)], np.int32)
        remaining = np.array([max(tokens - at - chunk, 0)], np.int32)
        cache, logits, stalled, _ = run(model, policy, cache, part, length, remaining, logits)
        stalls.append(stalled)
      rows, _ = decoding.first_token(rows, logits, np.ones(1, bool), sampling, stop_criteria)
      np.asarray(rows.token)
      best = min(best, time.perf_counter() - begin)
    if any(bool(stalled[0]) for stalled in stalls):
      raise RuntimeError(f"a prompt of {tokens} tokens had no room")
    return {"s": best, "CR": float(tokens / np.asarray(cache.live()).mean())}


def arrays(cache: Cache | ShardedCache) -> Cache:
  """A cache, or those of all devices of a mesh."""
  return cache.shards if isinstance(cache, ShardedCache) else cache


def small(cache: Cache | ShardedCache) -> dict[str, Any]:
  """A cache's state without its keys and values."""
  own = arrays(cache)
  fields = {"seen": own.seen, "archived": own.archived, "evicted": own.evicted}
  return fields | ({"table": own.table} if isinstance(own, PagedCache) else {})


def with_small(cache: Cache | ShardedCache, fields: dict[str, Any]) -> Cache | ShardedCache:
  """`cache` with another `small`."""
  return (
    cache.replace(shards=cache.shards.replace(**fields)) if isinstance(cache, ShardedCache) else cache.replace(**fields)
  )


@jax.jit
def copied(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def empty(shape: Cache) -> Cache:
  """An empty cache of these shapes."""
  cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
  if isinstance(shape, PagedCache):
    pool = caches.paged.Pool.create(shape.pages)
    cache = cache.replace(table=cache.table.replace(pool=pool))
  return jax.block_until_ready(cache)


def clock(
  decode_block: Callable[[Cache], tuple[Cache, Any]], cache: Cache, seconds: float, energy: Energy, rounds: int = 3
) -> tuple[float, int, float | None]:
  """(seconds of a decode block, best of `rounds` of queued blocks; number of blocks run; joules of all blocks)."""
  begin = time.perf_counter()
  cache, out = decode_block(cache)
  jax.block_until_ready(out)
  once = time.perf_counter() - begin
  calls = max(1, min(200, int(seconds / rounds / once)))
  best, before = float("inf"), energy()
  for _ in range(rounds):
    begin = time.perf_counter()
    for _ in range(calls):
      cache, out = decode_block(cache)
    jax.block_until_ready(out)
    best = min(best, (time.perf_counter() - begin) / calls)
  after = energy()
  return best, rounds * calls, None if after is None else after - before


def report(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Points of both kinds as one row: DMS's figures by name, dense's prefixed with "dense_", and the ratio."""
  row = dict(points["dms"])
  if "dense" in points:
    dense = points["dense"]
    row |= {f"dense_{name}": dense[name] for name in ("ms", "of_roofline", "cache_bytes", "joules_per_token")}
    row["dense_ratio"] = dense["ms"] / row["ms"]
  return row
