"""KV caches: fixed-shape pytrees, passed in and returned, donated, carried through the layer scan."""

from __future__ import annotations

import jax.numpy as jnp

from dms_jax.cache.base import Cache as Cache
from dms_jax.cache.base import Plan as Plan
from dms_jax.cache.contiguous import ContiguousCache as ContiguousCache
from dms_jax.cache.masked import MaskedCache as MaskedCache
from dms_jax.cache.paged import PagedCache as PagedCache
from dms_jax.policies import Policy

KINDS = {"masked": MaskedCache, "contiguous": ContiguousCache, "paged": PagedCache}


def default_kind(policy: Policy) -> str:
  """Pages where heads may hold different amounts; else every head as many slots as the others."""
  return "paged" if policy.data_dependent else "contiguous"


def for_model(
  model, policy: Policy, *, batch: int, capacity: int, kind: str | None = None, longest: int | None = None, **options
) -> Cache:
  """An empty cache for `batch` rows of a model under a policy whose window is known (`model.check_policy`).

  Args:
    model: a `Model`; its layers, KV heads, head size, dtype and the lag of its gates' decisions matter.
    capacity: slots a head, the ring included (pages: on the average over heads and rows); tokens a row if masked.
    kind: "paged", "contiguous" or "masked"; default `default_kind`.
    longest: the most that one head may hold, where heads share a pool; default `capacity`.
    options: `page_size` and `page_format` of `PagedCache.create`.

  Raises:
    ValueError: unknown kind or options.
  """
  kind, lag = kind or default_kind(policy), model.lag(policy.window)
  sizes = dict(batch=batch, capacity=capacity, longest=longest)
  return create(kind, model.config, lag=lag, policy=policy, dtype=model.dtype, **sizes, **options)


def create(
  kind: str, config, *, batch: int, capacity: int, lag: int, window: int | None = None, policy: Policy | None = None,
  dtype=jnp.float32, longest: int | None = None, **options,
) -> Cache:  # fmt: skip
  """`for_model` from a `ModelConfig` alone.

  Args:
    lag: a decision computed at token t is about token t - lag (`DMSConfig.lag`).
    window: instead of `policy`: that of a policy which needs nothing but keys and values.

  Raises:
    ValueError: unknown kind; not exactly one of policy and window.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown cache {kind!r}; there are {sorted(KINDS)}")
  if (policy is None) == (window is None):
    raise ValueError("caches.create: give either policy= or window=")
  if kind == "paged":
    options["longest"] = longest
  return KINDS[kind].create(
    config.num_layers, batch, config.num_kv_heads, config.head_dim, capacity=capacity, lag=lag, dtype=dtype,
    policy=policy or Policy(window=window), **options,
  )  # fmt: skip
