"""KVzap: a gate predicts how much a reconstruction of the text needs each token (arXiv 2601.07891)."""

from __future__ import annotations

from flax import struct

from dms_jax.policies.base import Policy, per_row, register


@register
@struct.dataclass
class KVzap(Policy):
  """Evicts a token whose predicted score lies below `threshold` once it has left the window.

  The score is the logarithm of KVzip+, predicted from hidden states by the gates of a retrofit with
  `retrofit.objective=kvzap`. A higher threshold evicts more; it may be one number a row [B]. `window` None takes the
  window in the retrofit's config; kvpress protects the last 128 tokens. Prompts are pruned as they are read, so later
  tokens of a prompt do not see what was evicted before; kvpress reads a prompt densely and prunes it at the end. Scores
  depend on the model and on the length of the texts that its gates were trained on, so each model needs a threshold of
  its own; the default is that of an example in kvpress.

  Attributes:
    window: W; none: the window in the retrofit's config.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = -3.0

  objective = "kvzap"
  uses_gates = True

  def decide(self, logits, layer, position, keys=None):
    return logits < per_row(self.threshold, 2).astype(logits.dtype)
