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


def create(
  kind: str, config, *, batch: int, capacity: int, lag: int, window: int | None = None,
  policy: Policy | None = None, dtype=jnp.float32, longest: int | None = None, **options,
) -> Cache:  # fmt: skip
  """An empty cache of `kind` for a model: `capacity` tokens a row (masked), or a head, its ring included.

  Args:
    longest: the most that one head may hold, where heads share room (paged); else that is `capacity`.
    lag: the lag of the gates' decisions (`DMSConfig.lag`).
    options: `page` and `archive` of `PagedCache.create`.
    policy: what it is for, with a window; some need more of a cache than keys and values. `window` alone instead: any
      policy with that window that does not.

  Raises:
    ValueError: unknown kind; not one of policy and window.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown cache {kind!r}; there are {sorted(KINDS)}")
  if (policy is None) == (window is None):
    raise ValueError("caches.create: give either policy= or window=")
  if kind == "paged":
    options["longest"] = longest
  return KINDS[kind].create(
    config.num_layers, batch, config.num_kv_heads, config.head_dim,
    capacity=capacity, policy=policy or Policy(window=window), lag=lag, dtype=dtype, **options,
  )  # fmt: skip
