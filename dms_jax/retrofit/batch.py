"""A batch of text, a forward pass over it, and the student's loss on it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax.decoder import Model, head_inputs, output_head
from dms_jax.model import forward
from dms_jax.retrofit import losses
from dms_jax.retrofit.config import RetrofitConfig


@struct.dataclass
class Batch:
  """`tokens` int32 [B, T]; `segment_ids` int32 [B, T], 0 for padding (None: each row one document).

  `loss_mask` bool [B, T]: tokens whose prediction the loss counts, False on prompts and padding (None: all real ones).
  """

  tokens: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"] | None = None
  loss_mask: Bool[Array, "B T"] | None = None


def real_tokens(batch: Batch) -> Bool[Array, "B T"]:
  """Whether each token is no padding."""
  return jnp.ones(batch.tokens.shape, bool) if batch.segment_ids is None else batch.segment_ids > 0


def run(model: Model, batch: Batch, config: RetrofitConfig, **options):
  """`forward` over a batch, with other arguments in `options`."""
  return forward(model, batch.tokens, segment_ids=batch.segment_ids, remat=config.memory.remat, **options)


def text_loss(
  kind: losses.Loss, hidden: Float[Array, "B T D"], student: Model, teacher: Model, batch: Batch, config: RetrofitConfig
) -> Float[Array, ""]:
  """The loss `kind`, nats, mean over the counted tokens; `hidden`: the student's states before the final norm.

  Under a `loss_mask` the divergence from the teacher, too, counts only where the next token is in the mask.
  """
  c, ids, real = student.config, batch.segment_ids, real_tokens(batch)
  # The token after an end of text does not depend on the text before, so ends of text are not counted.
  counted = real & ~jnp.isin(batch.tokens, jnp.asarray(c.eos_token_ids, jnp.int32))
  if kind == "lm" or batch.loss_mask is not None:
    goes_on = jnp.arange(real.shape[1]) < real.shape[1] - 1
    counted = counted & (goes_on if ids is None else goes_on & (jnp.roll(ids, -1, axis=1) == ids))
  if batch.loss_mask is not None:
    counted = counted & jnp.roll(batch.loss_mask, -1, axis=1)
  if kind == "lm":
    against = {"targets": jnp.roll(batch.tokens, -1, axis=1)}
  else:
    against = {"teacher": head_inputs(teacher, run(teacher, batch, config)[0]), "teacher_head": output_head(teacher)}
  return losses.vocabulary_loss(
    kind, head_inputs(student, hidden), output_head(student), counted, **against,
    chunk=config.memory.loss_chunk, vocab_chunk=config.memory.vocab_chunk, train_head=config.trainable == "all",
    softcap=c.logit_softcap,
  )  # fmt: skip
