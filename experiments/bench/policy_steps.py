"""Decode steps under policies with a budget, against the dense cache of the same rows.

The model has random weights and no gates. A cache is created in the state after a text of `tokens` tokens, in which
every head holds the budget (`experiments.bench.synthetic`). Steps are timed in compiled decode blocks, each from the
same state, so no text is read and none grows. A policy that cuts its heads every `buffer` tokens is timed over as many
steps, which include one cut; the budget bounds what a head holds just before it.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from dms_jax import policies
from dms_jax.cache import Cache
from dms_jax.cache.base import rounded
from dms_jax.generation import decode as decoding
from dms_jax.generation.decode import StopCriteria
from dms_jax.generation.sampling import Sampling
from dms_jax.layers import rope_frequencies
from dms_jax.model import Model, check_policy
from dms_jax.policies import Policy, Vanilla
from dms_jax.policies.periodic import Periodic
from dms_jax.policies.triattention import Calibration
from experiments.bench import synthetic
from experiments.bench.generate_points import Energy, clock, copied, small

KINDS = ("contiguous", "paged")
PAGE = 32  # slots, unless the policy has its own


def budgeted() -> list[str]:
  """Names of the registered policies that take a budget and need no gates."""
  fields = lambda cls: {field.name for field in dataclasses.fields(cls)}
  return sorted(name for name, cls in policies.REGISTRY.items() if "budget" in fields(cls) and not cls.uses_gates)


def held_tokens(policy: Policy, tokens: int, budget: int) -> int:
  """Tokens that each head holds after a text of `tokens` tokens."""
  if not policy.evicts:
    return tokens
  if isinstance(policy, Periodic):
    return policy.budget + policy.buffer  # the first step cuts it
  return int(policy.capacity(tokens)) if policy.bounded else budget


def with_budget(name: str, model: Model, budget: int) -> Policy:
  """The policy called `name`, under which a head of `model` holds at most `budget` tokens; a calibration is random."""
  cls, config = policies.get(name), model.config
  policy: Policy = cls(**{"budget": budget})
  if isinstance(policy, Periodic):
    buffer = min(policy.buffer, max(budget // 4, 1))
    policy = policy.replace(budget=budget - buffer, buffer=buffer)
  if name == "triattention":
    draw = np.random.default_rng(0).normal
    centres = draw(size=(config.num_layers, config.num_heads, config.head_dim)).astype(np.float32)
    norms = np.abs(centres[..., : config.head_dim // 2]) + 1
    policy = policy.replace(tables=Calibration(centres, norms, np.asarray(rope_frequencies(config))[None]))
  return policy


@dataclasses.dataclass(frozen=True)
class Steps:
  """`rows` rows that end a decode block of `steps` steps with `tokens` tokens each, under a `budget` of tokens a head.

  Each timing takes `seconds`.
  """

  model: Model
  rows: int
  tokens: int
  budget: int
  steps: int = 16
  seconds: float = 0.5

  def cache_shape(self, policy: Policy, kind: str, held: int, steps: int) -> Cache:
    """A cache with room for the tokens that a decode block of `steps` steps adds."""
    model, longest = self.model, rounded(held + steps)
    if kind == "contiguous":
      return synthetic.slots_shape(model, policy, batch=self.rows, longest=longest)
    page, config = policy.page or PAGE, model.config
    archived = max(held - policy.window - 1, 0) + steps
    pages = self.rows * config.num_layers * config.num_kv_heads * -(-archived // page)
    return synthetic.pages_shape(model, policy, batch=self.rows, longest=longest, pages=pages, page=page)

  def measure(self, policy: Policy, kind: str) -> dict[str, Any]:
    """{ms of a step, tokens_per_s, achieved CR, cache_bytes}.

    Raises:
      RuntimeError: rows without room.
    """
    policy = check_policy(self.model, policy)
    steps = policy.buffer if isinstance(policy, Periodic) else self.steps
    before = self.tokens - steps
    held = held_tokens(policy, before, self.budget)
    shape = self.cache_shape(policy, kind, held, steps)
    cache = synthetic.filled(shape, self.model, policy, tokens=before, held=held)
    begin = copied((small(cache), synthetic.running_rows(self.rows)))
    sampling, criteria = Sampling(), StopCriteria(jnp.zeros(0, jnp.int32))

    def decode_block(cache: Cache) -> tuple[Cache, Any]:
      fresh, rows = copied(begin)
      cache, _, emitted, counts = decoding.decode_block(
        self.model, policy, cache.replace(**fresh), rows, sampling, criteria, steps=steps, history=False
      )
      return cache, (emitted, counts)

    cache, (emitted, counts) = decode_block(cache)
    if not bool(jnp.all(emitted.valid)):
      raise RuntimeError(f"{type(policy).__name__} in a {kind} cache: rows without room")
    live = float(np.asarray(counts.live).mean())
    best, _, _ = clock(decode_block, cache, self.seconds, Energy())
    return {
      "ms": best / steps * 1e3, "tokens_per_s": self.rows * steps / best, "CR": self.tokens / live,
      "cache_bytes": synthetic.nbytes(shape),
    }  # fmt: skip

  @cached_property
  def dense(self) -> dict[str, Any]:
    """`measure` of a contiguous cache that keeps all tokens."""
    return self.measure(Vanilla(), "contiguous")

  def against_dense(self, name: str, kind: str) -> dict[str, Any]:
    """`measure` of the policy called `name`, and of the dense cache."""
    row = self.measure(with_budget(name, self.model, self.budget), kind)
    return row | {"dense_ms": self.dense["ms"], "dense_ratio": self.dense["ms"] / row["ms"]}
