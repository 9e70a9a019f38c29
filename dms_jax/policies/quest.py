"""Quest: every token is kept, each query reads the pages that may matter (arXiv 2406.10774)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import Policy, register
from dms_jax.policies.budget import allowance, check_budget
from pallas_kernels.common.xla_dot import einsum


@register
@struct.dataclass
class Quest(Policy):
  """Reads the pages with the largest upper bound of q . k, by each channel's least and greatest key (section 3.3).

  `budget` is the most tokens that a query reads, the window included (or `cr`: a cr-th of the tokens seen so far); at
  least one page beside it. The first `dense_layers` layers read everything, and so do chunks of a prompt: a step of a
  single token selects. The paper selects for each query head; here the query heads of a KV head share its pages, which
  are read once for all of them, each page with the largest bound of any.

  `window` None is one page: the newest tokens are read always, as the archive is where pages are.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  page: int = struct.field(pytree_node=False, default=16)
  budget: int | None = None
  cr: float | None = None
  dense_layers: int = 2

  evicts = False

  def resolved(self, window):
    if self.page < 1:
      raise ValueError(f"Quest: page={self.page} must be 1 or more slots")
    if self.window is None:
      return self.replace(window=self.page - 1).resolved(window)
    if (self.window + 1) % self.page:
      raise ValueError(f"Quest: window={self.window} and the newest token must make whole pages of {self.page}")
    check_budget(self, self.window + 1 + self.page)
    return super().resolved(window)

  def summarise(self, keys, live):
    live = live[..., None]
    some = jnp.any(live, axis=-2)
    least = jnp.min(jnp.where(live, keys, jnp.inf), axis=-2)
    greatest = jnp.max(jnp.where(live, keys, -jnp.inf), axis=-2)
    return jnp.concatenate([jnp.where(some, x, jnp.zeros((), x.dtype)) for x in (least, greatest)], axis=-1)

  def select(self, layer, q, summaries, live, tokens):
    h = q.shape[-1]
    least, greatest = summaries[..., :h], summaries[..., h:]
    positive, negative = jnp.maximum(q, 0).astype(least.dtype), jnp.minimum(q, 0).astype(least.dtype)
    product = lambda a, b: einsum("bkgh,bkph->bkgp", a, b)
    bound = jnp.max(product(positive, greatest) + product(negative, least), axis=2)
    order = jnp.argsort(jnp.where(live, -bound, jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    pages = jnp.maximum((allowance(self, tokens) - (self.window + 1)) // self.page, 1)
    dense = jnp.asarray(layer) < jnp.asarray(self.dense_layers)
    return live & (dense | (rank < pages[:, None, None]))
