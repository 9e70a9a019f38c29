"""The objective "kvzap": gates that predict what repeating the text needs (arXiv 2601.07891).

The untouched model reads each row of text, is asked to repeat it, and reads the repetition. The score of token i for a
KV head, KVzip+, is the logarithm of

    max over tokens j of the repetition and query heads n of the group:   a_ji,n |W_O,n v_i| / |h_j|

where a is the attention probability (all of KVzip's score, arXiv 2505.23416), W_O,n head n's part of the output
projection, and h_j the attention's input at token j, after its norm, as in kvpress. The gates' logits at the tokens of
the text are regressed on the scores by the mean squared error. No gradient passes through attention.

kvpress takes 500 tokens of each text of 750 to 1,250 tokens. It trains an MLP with 512 hidden units (15 epochs of
AdamW, learning rate 5e-3 falling by a cosine) or a linear regression (`dms.gate=linear`, here by the same gradient
descent). Here a row is one text, even if it holds several documents; all its tokens count, and the gate has a norm of
its own. Scores before the logarithm are at least FLOOR, as a probability may round to 0. The log holds the error, the
share of the variance within heads that is explained, and the thresholds for CR 2, 4 and 8 of each batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dms_jax.attention import window_bias_attention
from dms_jax.decoder import Model, normed
from dms_jax.gates import gate_logits
from dms_jax.model import forward
from dms_jax.retrofit.batch import Batch, real_tokens
from dms_jax.retrofit.config import RetrofitConfig
from pallas_kernels.common.xla_dot import einsum

if TYPE_CHECKING:
  from dms_jax.tokenizer import Tokenizer

BLOCK = 256  # queries whose probabilities are in memory at once
FLOOR = 1e-20  # least KVzip+ score before the logarithm
_TEXT = "dms_jax puts the text here"


def frame(tokenizer: Tokenizer | None, config: RetrofitConfig, longest: int) -> tuple[Int[Array, "P"], Int[Array, "M"]]:
  """Tokens before a text, and between it and its repetition: the user's turn and the start of the assistant's.

  Without a chat template there is nothing before, and the request and a line break between.

  Args:
    longest: tokens that the model can read (`max_position_embeddings`).

  Raises:
    ValueError: there is no tokenizer, or a text and its repetition are too long for the model.
  """
  if tokenizer is None:
    raise ValueError("retrofit.objective=kvzap needs a tokenizer, for the request to repeat the text")
  before, between = "", config.kvzap.prompt + "\n"
  if tokenizer.settings.get("chat_template"):
    asked = tokenizer.chat([{"role": "user", "content": _TEXT + config.kvzap.prompt}])
    before, found, between = asked.partition(_TEXT)
    if not found:
      raise ValueError("retrofit.objective=kvzap: the tokenizer's chat template changes the text of a message")
  first, middle = (jnp.asarray(tokenizer.encode(text) if text else [], jnp.int32) for text in (before, between))
  whole = first.size + middle.size + 2 * config.seq_len
  if whole > longest:
    raise ValueError(
      f"retrofit.seq_len={config.seq_len}: a text and its repetition are {whole} tokens, more than the {longest} "
      "that the model can read; lower it"
    )
  return first, middle


def scores(
  layer: dict, h: Float[Array, "B S D"], q: Float[Array, "B S N H"], k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"], start: int, length: int,
) -> Float[Array, "B K T"]:  # fmt: skip
  """Logarithms of the KVzip+ scores of one layer, float32.

  Args:
    layer: its parameters; `o_proj` [D, N, H] is read.
    h: the attention's input, after its norm.
    q, k, v: of S tokens, q and k after RoPE; the last `length` tokens are the repetition.
    start, length: the text is the tokens start .. start + length - 1.
  """
  b, s, n, width = q.shape
  heads = k.shape[2]
  block = min(BLOCK, length)
  norms = jnp.sqrt(jnp.sum(jnp.square(h.astype(jnp.float32)), axis=-1))
  grouped = q.reshape(b, s, heads, n // heads, width)

  def step(most, first):
    queries = s - length + jnp.minimum(first + jnp.arange(block), length - 1)  # the last block repeats the last token
    logits = einsum("bqkgh,bskh->bkgqs", grouped[:, queries], k) * width**-0.5
    logits = jnp.where(jnp.arange(s) <= queries[:, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)[..., start : start + length] / norms[:, None, None, queries, None]
    return jnp.maximum(most, jnp.max(weights, axis=3)), None

  init = jnp.zeros((b, heads, n // heads, length), jnp.float32)
  most, _ = lax.scan(step, init, jnp.arange(-(-length // block)) * block)
  # |W v|^2 = v' (W' W) v: no vector of the model's width for each head and token
  o_proj = layer["o_proj"].astype(jnp.float32).reshape(-1, heads, n // heads, width)
  square = einsum("dkgh,dkgj->kghj", o_proj, o_proj)
  value = v[:, start : start + length].astype(jnp.float32)
  output = jnp.sum(einsum("kghj,btkj->bkgth", square, value) * jnp.moveaxis(value, 1, 2)[:, :, None], axis=-1)
  most = jnp.max(most * jnp.sqrt(jnp.maximum(output, 0.0)), axis=2)
  return jnp.log(jnp.maximum(most, FLOOR))


def loss_fn(
  student: Model, batch: Batch, frame: tuple[Int[Array, "P"], Int[Array, "M"]], config: RetrofitConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The mean squared error of the gates' logits, and the metrics for the log."""
  c, dms, (b, t) = student.config, student.dms, batch.tokens.shape
  before, between = (jnp.broadcast_to(x, (b, x.size)) for x in frame)
  start = before.shape[1]
  tokens = jnp.concatenate([before, batch.tokens, between, batch.tokens], axis=1)
  real = real_tokens(batch)[:, None]

  def attention(layer, x, q, k, v):
    x, q, k, v = lax.stop_gradient((x, q, k, v))
    h = normed(c, layer, "attn_norm", x)
    target = lax.stop_gradient(scores(layer, h, q, k, v, start, t))
    part = slice(start, start + t)
    found = gate_logits(c, dms, layer, x[:, part], q[:, part])
    return window_bias_attention(q, k, v, None, 0, None), (found, target)

  _, (found, target) = forward(student, tokens, remat=config.memory.remat, attention=attention)
  count = jnp.maximum(jnp.sum(real), 1).astype(jnp.float32)
  by_head = lambda x: jnp.sum(jnp.where(real, x, 0.0), axis=(1, 3), keepdims=True) / count
  mean = lambda x: jnp.mean(by_head(x))
  loss = mean(jnp.square(found - target))
  spread = mean(jnp.square(target - by_head(target)))
  return loss, {
    "mse": loss,
    "explained": 1.0 - loss / jnp.maximum(spread, 1e-12),  # of the variance within heads; R^2
    "score": mean(target),
    **{f"threshold_cr{cr}": _threshold(found, cr) for cr in (2, 4, 8)},
  }


def _threshold(found: Float[Array, "L B K T"], cr: int) -> Float[Array, ""]:
  """The threshold below which all but 1/`cr` of the gates' logits of a batch lie, padding included."""
  return jnp.sort(found, axis=None)[int(found.size * (1 - 1 / cr))]
