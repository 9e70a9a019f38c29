"""Layers that slide, in a cache: each holds its own window, whatever the policy evicts in others.

A sliding layer shows a token to the V tokens after it and then forgets it. Rings have W + 1 slots in every layer, with
W <= V. A token that leaves the ring of a sliding layer goes to the layer's archive, which is a second ring of V - W
slots: token t has slot t mod (V - W) there, and takes the place of token t - (V - W), which has just left the sliding
window. So the number of tokens read gives the position of every slot, a slot is reused where it is, and a head needs no
pages beyond those of V - W slots. In pages of 8 bits these tokens are quantised as archived ones are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dms_jax.config import ModelConfig
from dms_jax.policies import Policy, Retired
from dms_jax.policies.base import capacity_of


@dataclasses.dataclass(frozen=True)
class Sliding:
  """Which layers slide, and how far.

  Attributes:
    layers: by layer, whether it slides.
    window: V in tokens; the newest token and the V tokens before it are visible.
    ring: slots of the ring, W + 1.
  """

  layers: tuple[bool, ...]
  window: int
  ring: int

  @classmethod
  def of(cls, config: ModelConfig, window: int) -> Sliding | None:
    """The sliding layers of a model in a cache whose rings hold `window` tokens and the newest; None without such.

    Raises:
      ValueError: the rings hold more than the sliding window.
    """
    if config.ring_window is None:
      return None
    if window > config.ring_window:
      raise ValueError(f"window={window} must be at most {config.ring_window}, which sliding layers hold")
    return cls(config.sliding_layers, config.ring_window, window + 1)

  @property
  def span(self) -> int:
    """Archive slots of a head of a sliding layer, V - W."""
    return self.window + 1 - self.ring

  def at(self, layer: int | Int[Array, ""] | slice) -> Bool[Array, "*L"]:
    """Whether a layer slides, bool []; those of a slice, bool [L]."""
    return jnp.asarray(self.layers)[layer]

  def in_force(
    self, layer: int | Int[Array, ""] | slice, evicted: Bool[Array, "*n"]
  ) -> tuple[Bool[Array, "*n"], Int[Array, "*w"]]:
    """(which tokens are evicted, and after which window), of a layer, or of all [L, ...] for `slice(None)`.

    A sliding layer evicts every token, after a window of its own; in others the decisions `evicted` hold, after W.
    """
    slides = self.at(layer)
    slides = slides.reshape(slides.shape + (1,) * (evicted.ndim - 1) if slides.ndim else ())
    return evicted | slides, jnp.where(slides, self.window, self.ring - 1)

  @property
  def heads(self) -> np.ndarray:
    """Whether each layer slides, bool [L, 1, 1], numpy: to broadcast against arrays [L, B, K]."""
    return np.asarray(self.layers)[:, None, None]

  def place(self, position: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The archive slots of tokens that have left the ring."""
    return position % max(self.span, 1)

  def archived(self, tokens: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Tokens in the archive of a row that has read `tokens` tokens."""
    return jnp.clip(tokens - self.ring, 0, self.span)

  def positions(self, tokens: Int[Array, "B"], slots: int) -> Int[Array, "B A"]:
    """The position of the token in each of `slots` archive slots, after `tokens` tokens; arbitrary where none is."""
    newest = (tokens - self.ring - 1)[:, None]  # of those that have left the ring
    return newest - self.place(newest - jnp.arange(slots))

  def retired(self, retired: Retired, left: Int[Array, "B 1"], archived: Int[Array, "L B K"], none: int) -> Retired:
    """`retired`, a policy's answer for all layers, with what happens in sliding layers instead.

    Args:
      left: position of the leaving tokens.
      archived: tokens in the archives.
      none: the archive slot that stands for none, A.
    """
    slides = self.heads
    slot = -1 if retired.slot is None else retired.slot
    removed = None if retired.removed is None else jnp.where(slides[..., None], none, retired.removed)
    return Retired(
      keep=jnp.where(slides, self.span > 0, retired.keep),
      slot=jnp.where(slides, jnp.where(archived < self.span, -1, self.place(left)), slot).astype(jnp.int32),
      merge=None if retired.merge is None else jnp.where(slides, 1.0, retired.merge),
      removed=removed,
    )

  def holds(self, slots: int) -> bool:
    """Whether `slots` slots a head, the ring's included, suffice for a sliding layer and a text of any length."""
    return slots > self.window


def most_slots(policy: Policy, config: ModelConfig, tokens: int) -> int:
  """`Policy.capacity` in a model: the most slots that a head of any layer and row needs for `tokens` tokens."""
  slots = int(np.asarray(capacity_of(policy, tokens)).max())
  return slots if config.sliding_window is None else max(slots, min(tokens, config.sliding_window))
