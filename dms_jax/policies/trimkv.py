"""TRIM-KV: learned importance that decays with age; the least important goes (2512.03324)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class TRIMKV(Budgeted):
  """Forgets the token outside the window with the least beta^(t - i), once a head holds `budget` tokens.

  beta in (0, 1) is the sigmoid of the gate's logit about token i, and t the position of the newest token held. Scores
  are compared as (t - i) log beta. Their order changes with time, so every eviction scores the held tokens anew from
  two statistics, log beta and the position. Attention is plain: only training multiplies the decay into it
  (`retrofit.decay`). The paper protects no window: W = 0.

  The gates are those of a retrofit with `retrofit.objective=trimkv`. Scores do not depend on attention, so a prompt
  read in chunks is read exactly as one token at a time; the released code cuts a whole chunk at once, and evicts only
  every `buffer_size` tokens while decoding. The budget shared by all layers and heads (arXiv 2605.09649) and scores
  that look several steps ahead are not part of this.
  """

  objective = "trimkv"
  uses_gates = True
  replays = True
  stats = ("log_beta", "position")
  gate_stats = ("log_beta",)

  def admit(self, layer, position):
    return {"log_beta": jnp.zeros(position.shape), "position": position.astype(jnp.float32)}

  def rate(self, logits):
    return {"log_beta": jax.nn.log_sigmoid(logits)}

  def retire(self, leaving):
    newest = (leaving.tokens - 2).astype(jnp.float32)  # the token that this step reads does not count yet
    score = lambda stats, t: {**stats, "score": (t - stats["position"]) * stats["log_beta"]}
    return super().retire(
      leaving.replace(stats=score(leaving.stats, newest), archive_stats=score(leaving.archive_stats, newest[..., None]))
    )
