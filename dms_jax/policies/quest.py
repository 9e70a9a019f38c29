"""Quest: every token is kept, each query reads the pages that may matter (arXiv 2406.10774)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import Policy, is_whole, per_row, register
from dms_jax.policies.budget import allowance, check_budget
from pallas_kernels.common.xla_dot import einsum


@register
@struct.dataclass
class Quest(Policy):
  """Reads the pages with the largest upper bound of q . k, by each channel's least and greatest key (section 3.4).

  `budget` is the most tokens that a query reads, the window included; `cr` sets it to the tokens seen so far / `cr`. A
  query reads at least one archive page. Only decode steps select: chunks of a prompt read everything, and so do the
  first `dense_layers` layers. The paper selects pages for each query head. Here the query heads of a KV head read the
  same pages, and the bound of a page is its largest over these heads. With `each_head` every query head selects its own
  pages within the budget, and all query heads of the KV head read the union: reads count distinct pages, as in arXiv
  2506.05345, and may exceed the budget.

  A page has `page` slots. `window` None makes the window one page. The window is always read; pages are selected from
  the archive alone.

  Attributes:
    dense_layers: first layers, which read everything.
    each_head: each query head selects its own pages; their union is read.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  page: int = struct.field(pytree_node=False, default=16)
  budget: int | None = None
  cr: float | None = None
  dense_layers: int = 2
  each_head: bool = struct.field(pytree_node=False, default=False)

  evicts = False

  def resolved(self, window):
    if not is_whole(self.page) or self.page < 1:
      raise ValueError(f"Quest: page={self.page} must be 1 or more slots, a whole number")
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
    bound = product(positive, greatest) + product(negative, least)
    if not self.each_head:
      bound = jnp.max(bound, axis=2, keepdims=True)
    order = jnp.argsort(jnp.where(live[:, :, None], -bound, jnp.inf), axis=-1)
    rank = jnp.min(jnp.argsort(order, axis=-1), axis=2)  # of a page in the query head that wants it most
    pages = jnp.maximum((allowance(self, tokens) - (self.window + 1)) // self.page, 1)
    dense = jnp.asarray(layer) < per_row(self.dense_layers, 2)
    return live & (dense | (rank < pages[:, None, None]))
