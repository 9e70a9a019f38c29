"""Models and caches for benchmarks: random weights and evictions, caches as after a long text.

The cost of a step depends on the number of tokens that each head holds, not on their content, so no text is read. A
cache is created in the state after a given number of tokens: lengths, decisions, pages allocated in random order, and
random keys and values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from dms_jax import cache as caches
from dms_jax.cache import Cache, PagedCache, ShardedCache
from dms_jax.cache.base import packed
from dms_jax.cache.paged import Store
from dms_jax.cache.pool import Pool
from dms_jax.cache.sharded import DEVICE
from dms_jax.collectives import devices, head_numbers, own_heads
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.generation.decode import RUNNING, DecodeState
from dms_jax.model import Model
from dms_jax.params import init_params, param_table
from dms_jax.policies import Policy
from dms_jax.policies.random import uniform
from dms_jax.sharding import Split

SPREAD = 0.8  # standard deviation of the logarithm of the tokens that heads hold
TILE = 1024  # slots of random numbers, which a cache repeats
EIGHT_BITS = 30  # factor by which the random numbers are scaled to be stored in 8 bits


@struct.dataclass
class Sampled(Policy):
  """Head k of layer l keeps a share `rates[l, k]` of the tokens that leave the window, by a hash of the position.

  The model's gates are computed but not used, since a random model's gates are arbitrary. A step reserves and writes
  what it would for gates with the same decisions. `crs`: the CR by which each row scales low-rank updates
  (`LoRAConfig.by_cr`); it changes no decision.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  rates: Float[Array, "L K"] = struct.field(kw_only=True)
  crs: Float[Array, "B"] | None = None

  uses_gates = True

  @property
  def target(self):  # type: ignore[override]
    return 1.0 if self.crs is None else self.crs

  def decide(self, logits, layer, position, keys=None):
    count = self.rates.shape[1] // devices()
    head = head_numbers(count)[:, None]
    # For one layer without a gather.
    rates = own_heads(self.rates[layer], count)[:, None] if isinstance(layer, int) else self.rates[layer, head]
    evict = uniform(layer, head, position) >= rates
    return evict if logits is None else evict & (logits == logits)  # never NaN, which no compiler knows


def sampled_policy(config: ModelConfig, *, tokens: int, cr: float, window: int, seed: int = 0) -> Sampled:
  """A policy whose heads hold exp(SPREAD N(0, 1)) times a mean of tokens / cr, and at least the window, after `tokens`.

  Raises:
    ValueError: the window alone holds as much as that.
  """
  least, mean = window + 1, tokens / cr
  if mean <= least:
    raise ValueError(f"CR {cr:g} at {tokens} tokens leaves {mean:g} a head, not more than the window's {least}")
  normal = np.random.default_rng(seed).normal(size=(config.num_layers, config.num_kv_heads))
  held = np.exp(SPREAD * normal)
  for _ in range(100):  # the clip moves the mean
    held = np.clip(held / held.mean() * mean, least, tokens)
  return policy_of(held, tokens=tokens, window=window)


def policy_of(held: np.ndarray, *, tokens: int, window: int) -> Sampled:
  """A policy whose heads hold `held` [L, K] tokens after `tokens` tokens."""
  share = (held - window - 1) / (tokens - window - 1)
  return Sampled(window=window, rates=jnp.asarray(np.clip(share, 0, 1), jnp.float32))


def random_model(config: ModelConfig, *, window: int | None, dtype) -> Model:
  """A model with random weights, and with adapter gates if a window is given."""
  dms = None if window is None else DMSConfig(gate="adapter", window=window)
  params = jax.jit(lambda key: init_params(param_table(config, dms), key, dtype))(jax.random.key(0))
  return Model(params, config, dms)


def with_updates(model: Model, *, rank: int, ratios: tuple[float, float]) -> Model:
  """A model with adapter gates for a range of ratios, and low-rank updates of q, k, v and o by each row's CR.

  The updates are beside the weights, which both models share. They are 0, as at the start of a training.
  """
  dms, lora = dataclasses.replace(model.dms, elastic=ratios), LoRAConfig(rank, by_cr=True)
  table = {path: spec for path, spec in param_table(model.config, dms, lora).items() if spec.group == "lora"}
  added = jax.jit(lambda key: init_params(table, key, model.dtype))(jax.random.key(1))
  own, updates = model.params["layers"], Model(added, model.config)
  if isinstance(own, list):
    layers = [a | b for a, b in zip(own, updates.unstacked().params["layers"], strict=True)]
  else:
    layers = own | added["layers"]
  return model.replace(params={**model.params, "layers": layers}, dms=dms, lora=lora)


@partial(jax.jit, static_argnames=("layers", "heads", "tokens", "lag"))
def _left_by(policy: Policy, *, layers: int, heads: int, tokens: int, lag: int) -> tuple[Array, Array]:
  """(tokens archived int32 [L, K], decisions about the ring's tokens bool [L, K, W+1]) after `tokens` tokens."""
  ring = policy.window + 1
  layer, shape = jnp.arange(layers)[:, None, None, None], (layers, 1, heads)
  about = lambda position: policy.decide(None, layer, jnp.broadcast_to(position, (*shape, position.size)))[:, 0]
  archived = jnp.sum(~about(jnp.arange(max(tokens - ring, 0))), axis=-1, dtype=jnp.int32)
  first = tokens - ring
  position = first + (jnp.arange(ring) - first) % ring  # of the token in each slot
  return archived, about(position) & ((position >= 0) & (position < tokens - lag))


def left_by(model: Model, policy: Policy, tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens archived int32 [L, K], decisions about the ring's tokens bool [L, K, W+1]) after `tokens` tokens."""
  c = model.config
  left = _left_by(policy, layers=c.num_layers, heads=c.num_kv_heads, tokens=tokens, lag=model.lag(policy.window))
  return jax.device_get(left)


def pages_for(model: Model, policy: Policy, tokens: int, page: int) -> int:
  """Number of pages that a row of `tokens` tokens needs; on a mesh, on the device whose heads hold most."""
  owned = -(-left_by(model, policy, tokens)[0] // page)
  parts = 1 if model.mesh is None else Split.of(model.config, model.mesh).head_parts
  return int(owned.reshape(len(owned), parts, -1).sum((0, 2)).max())


def slots_shape(model: Model, policy: Policy, *, batch: int, longest: int) -> Cache | ShardedCache:
  """The shapes of a contiguous cache that keeps all of `longest` tokens."""
  make = lambda: caches.for_model(model, policy, batch=batch, capacity=-(-longest // 8) * 8, kind="contiguous")
  return _shapes(make, model)


def pages_shape(
  model: Model, policy: Policy, *, batch: int, longest: int, pages: int, page: int | None = None,
  archive: str | None = None,
) -> Cache | ShardedCache:  # fmt: skip
  """The shapes of a cache with a pool of `pages` pages a device, and at least one for each head of each row."""

  def make():
    cache = caches.for_model(
      model, policy, batch=batch, capacity=policy.window + 2, longest=longest, kind="paged", page_size=page,
      page_format=archive,
    )  # fmt: skip
    return cache.with_pages(max(pages, caches.of_device(cache).pages))

  return _shapes(make, model)


def _shapes(make: Callable[[], Cache | ShardedCache], model: Model) -> Cache | ShardedCache:
  """The shapes of the cache that `make` makes, on a mesh with their shardings."""
  shape = jax.eval_shape(make)
  if model.mesh is None:
    return shape
  sharding = NamedSharding(model.mesh, DEVICE)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shape)


def nbytes(shape: Cache | ShardedCache) -> int:
  """Bytes of a cache of these shapes."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape))


@partial(jax.jit, static_argnames=("shape", "dtype", "seed"))
def _noise(*, shape: tuple[int, ...], dtype, seed: int) -> Array:
  """Random numbers of `shape` in a cache's storage `dtype`, TILE rows repeated."""
  count = math.prod(shape[:-1])
  tile = jax.random.normal(jax.random.key(seed), (TILE, shape[-1]), jnp.bfloat16)
  tile = (tile * EIGHT_BITS).astype(dtype) if jnp.dtype(dtype).itemsize == 1 else packed(tile, dtype)
  return tile[jnp.arange(count) % TILE].reshape(shape)


def filled(
  shape: Cache | ShardedCache, model: Model, policy: Policy, *, tokens: int, held: int | None = None,
  shared: bool = False, seed: int = 0, part: int = 0,
) -> Cache | ShardedCache:  # fmt: skip
  """A cache of these shapes after `tokens` tokens of each row; statistics, memories and summaries are random.

  Args:
    held: tokens that every head holds, more than the window; default: those that the policy's decisions leave.
    shared: the rows are chains of one text and share the full pages of their archives.
    part: which part of the model's KV heads a cache of fewer heads has.

  Raises:
    ValueError: the pool is too small.
  """
  if isinstance(shape, ShardedCache):
    return _filled_on_mesh(shape, model, policy, tokens=tokens, held=held, shared=shared, seed=seed)
  its = slice(part * shape.archived.shape[2], (part + 1) * shape.archived.shape[2])
  archived, evicted = (x[:, its] for x in left_by(model, policy, tokens))
  if held is not None:
    archived = np.full_like(archived, held - policy.window - 1)
  layers, batch, heads = shape.archived.shape
  noise = lambda x, seed: None if x is None else _noise(shape=x.shape, dtype=x.dtype, seed=seed)
  every = lambda x: np.repeat(x[:, None], batch, axis=1)
  cache = shape.replace(
    kv=noise(shape.kv, seed),
    stats={name: noise(stat, seed + 2) for name, stat in shape.stats.items()},
    summaries=noise(shape.summaries, seed + 3),
    memory={name: noise(memory, seed + 4) for name, memory in shape.memory.items()},
    archived=jnp.asarray(every(archived)),
    evicted=jnp.asarray(every(evicted)),
    seen=jnp.full(batch, tokens, jnp.int32),
  )
  if not isinstance(shape, PagedCache):
    return cache
  store, size, number = shape.store, shape.page_size, shape.pages
  place = np.arange(shape.table.pages.shape[3])
  owned = -(-archived // size)
  common = place < (archived // size if shared else np.zeros_like(archived))[..., None]  # [L, K, M]
  own = (place < owned[..., None]) & ~common
  needed = int(common.sum()) + batch * int(own.sum())
  if needed > number:
    raise ValueError(f"{batch} rows of {tokens} tokens need {needed} pages, and there are {number}")
  free = np.random.default_rng(seed).permutation(number).astype(np.int32)
  taken = free[number - needed :]
  pages = np.full((layers, batch, heads, place.size), number, np.int32)
  of_all = np.full(common.shape, number, np.int32)
  of_all[common] = taken[: common.sum()]
  pages[every(own)] = taken[common.sum() :]
  pages = np.where(every(common), of_all[:, None], pages)
  owners = np.bincount(pages[pages < number], minlength=number).astype(np.int32)
  pool = Pool(jnp.asarray(free), jnp.int32(number - needed), jnp.asarray(owners))
  table = shape.table.replace(pages=jnp.asarray(pages), owned=jnp.asarray(every(owned).astype(np.int32)), pool=pool)
  cells = noise(store.pages, seed + 1)
  scales = None if store.scales is None else jnp.full(store.scales.shape, 1 / EIGHT_BITS, jnp.float32)
  return cache.replace(table=table, store=Store(cells, scales))


def _filled_on_mesh(shape: ShardedCache, model: Model, policy: Policy, **options) -> ShardedCache:
  """`filled` for each device's own rows and heads, on that device."""
  parts = []
  for place in np.ndindex(shape.devices.shape):
    with jax.default_device(shape.devices[place]):
      cache = filled(shape.own, model, policy, part=place[1], **options)
      parts.append(ShardedCache.of_device(cache, shape.split))
  sharding = NamedSharding(shape.mesh, DEVICE)
  join = lambda *xs: jax.make_array_from_single_device_arrays((len(xs) * len(xs[0]), *xs[0].shape[1:]), sharding, xs)
  return jax.tree.map(join, *parts)


def running_rows(batch: int) -> DecodeState:
  """Rows that sample greedily and never end."""
  column = lambda value: jnp.full(batch, value, jnp.int32)
  return DecodeState(column(1), None, column(0), column(2**30), column(0), column(RUNNING))
