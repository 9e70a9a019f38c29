"""KV caches: fixed-shape pytrees, passed in and returned, donated, carried through the layer scan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dms_jax.cache.base import Cache as Cache
from dms_jax.cache.base import Plan as Plan
from dms_jax.cache.contiguous import ContiguousCache as ContiguousCache
from dms_jax.cache.masked import MaskedCache as MaskedCache
from dms_jax.cache.paged import PagedCache as PagedCache
from dms_jax.cache.sharded import ShardedCache as ShardedCache
from dms_jax.cache.sliding import Sliding
from dms_jax.config import ModelConfig
from dms_jax.policies import Policy
from dms_jax.sharding import Split

KINDS = {"masked": MaskedCache, "contiguous": ContiguousCache, "paged": PagedCache}


def of_device(cache: Cache | ShardedCache) -> Cache:
  """The cache of one device, on a mesh as shapes: its kind and sizes."""
  return cache.own if isinstance(cache, ShardedCache) else cache


def kind_of(cache: Cache | ShardedCache) -> str:
  """The name of a cache's kind."""
  return next(name for name, kind in KINDS.items() if isinstance(of_device(cache), kind))


def default_kind(policy: Policy, config: ModelConfig) -> str:
  """The default kind of cache: "paged" if heads may hold different numbers of tokens, else "contiguous"."""
  return "paged" if policy.data_dependent or config.sliding_layers else "contiguous"


def for_model(
  model, policy: Policy, *, batch: int, capacity: int, kind: str | None = None, longest: int | None = None, **options
) -> Cache | ShardedCache:
  """An empty cache for `batch` rows of a model under a policy whose window is known (`model.check_policy`).

  Args:
    model: a `Model`; its layers, KV heads, head size, dtype, mesh and the lag of its gates' decisions matter.
    policy: a cache is made for the policy's window, statistics and page.
    batch: B, the number of rows.
    capacity: slots of each head, its ring of W + 1 included. A paged cache has so many on average over heads and rows;
      a masked cache has so many tokens a row.
    kind: "paged", "contiguous" or "masked"; default `default_kind`.
    longest: the most slots that one head of a paged cache may hold; default `capacity`. Other kinds ignore it.
    options: `page_size` and `page_format` of `PagedCache.create`.

  Raises:
    ValueError: `kind` is unknown, or `PagedCache.create` refuses an option.
  """
  kind, lag = kind or default_kind(policy, model.config), model.lag(policy.window)

  def make(rows: int, devices: int) -> Cache:
    """The cache of `rows` rows and one of `devices` parts of the heads."""
    config, heads = model.config, (model.config.num_heads // devices, model.config.num_kv_heads // devices)
    config = dataclasses.replace(config, num_heads=heads[0], num_kv_heads=heads[1])
    sizes = dict(batch=rows, capacity=capacity, longest=longest)
    return create(kind, config, lag=lag, policy=policy, dtype=model.dtype, **sizes, **options)

  if (mesh := model.mesh) is None:
    return make(batch, 1)
  return ShardedCache.create(Split.of(model.config, mesh), batch, make)


def create(
  kind: str, config, *, batch: int, capacity: int, lag: int, window: int | None = None, policy: Policy | None = None,
  dtype=jnp.float32, longest: int | None = None, **options,
) -> Cache:  # fmt: skip
  """An empty cache for a `ModelConfig`; `for_model` describes the other arguments.

  Args:
    lag: a decision computed at token t is about token t - lag (`DMSConfig.lag`).
    window: W in tokens, instead of `policy`. The cache then serves any policy of this window that has no statistics and
      selects no pages.
    dtype: of keys and values. (A cache's own `create` also takes `group`, query heads of a KV head, for the memory of
      a policy.)

  Raises:
    ValueError: `kind` is unknown, `policy` and `window` are both given or both missing, `PagedCache.create` refuses an
      option, or the window is larger than that of layers that slide.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown cache {kind!r}; there are {sorted(KINDS)}")
  if (policy is None) == (window is None):
    raise ValueError("caches.create: give either policy= or window=")
  policy = policy or Policy(window=window)
  if kind == "paged":
    options["longest"] = None if longest is None else int(longest)
  sizes = dict(
    layers=config.num_layers, batch=int(batch), heads=config.num_kv_heads, head_dim=config.head_dim,
    capacity=int(capacity), lag=lag, dtype=dtype, group=config.num_heads // config.num_kv_heads,
    sliding=Sliding.of(config, policy.window), **options,
  )  # fmt: skip
  return _empty(policy, kind=kind, sizes=tuple(sizes.items()))


@functools.partial(jax.jit, static_argnames=("kind", "sizes"))
def _empty(policy: Policy, *, kind: str, sizes: tuple[tuple[str, Any], ...]) -> Cache:
  """An empty cache; its arrays are made by one program instead of one each."""
  return KINDS[kind].create(policy=policy, **dict(sizes))
