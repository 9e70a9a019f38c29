"""Dispatch of window-bias attention."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch
from pallas_kernels.common.softmax import with_sinks
from pallas_kernels.window_bias import cudnn, gpu, tpu, xla

IMPLEMENTATIONS = {
  "cudnn": cudnn.window_bias_attention,
  "gpu": gpu.window_bias_attention,
  "tpu": tpu.window_bias_attention,
  "xla": xla.window_bias_attention,
}


def window_bias_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  bias: Float[Array, "B K T"] | None,
  window: int,
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  lse: bool = False,
  by_age: bool = False,
  softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N H"] | tuple:
  """Causal attention; `bias[b, k, j]` is added to the scores of key j for queries i with i - j > window.

  With bias = log(1 - alpha) this is the training mask of DMS (arXiv 2506.05345, figure 2b); with bias -inf where a key
  is evicted it is the hard mask of inference; `by_age` and bias = log(beta) are the decay of TRIM-KV (2512.03324).
  Differentiable in q, k, v, bias and sinks; memory linear in T.

  Args:
    bias: float32, -inf allowed; None adds nothing.
    window: W in tokens, inclusive: a key W back is still free of bias.
    segment_ids: tokens of different ids never see each other; ids must be contiguous runs.
    lse: also return the logarithm of each query's sum of exponentials, float32 [B, T, N], sinks included; it has
      gradients, too.
    by_age: each key's bias is multiplied by its age i - j.
    softcap: scores s, before any mask or bias, become softcap tanh(s / softcap) (Gemma 2); None leaves them.
    sinks: a logit for each query head, whose exponential joins the sum of the softmax and has no value (gpt-oss).

  Returns:
    out in q's dtype, or the pair (out, log-sum-exp) if asked for.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: the implementations named cannot do the case.
  """
  b, t, n, h = q.shape
  heads = k.shape[2]
  dispatch.check(k.shape == v.shape == (b, t, heads, h), f"k {k.shape}, v {v.shape}: not [B, T, K, H] with q {q.shape}")
  dispatch.check(n % heads == 0, f"N={n} query heads are not a multiple of K={heads} KV heads")
  dispatch.check(bias is None or bias.shape == (b, heads, t), f"bias {getattr(bias, 'shape', None)}: not [B, K, T]")
  dispatch.check_sinks(sinks, n)
  dispatch.check(segment_ids is None or segment_ids.shape == (b, t), "segment_ids must be [B, T]")
  args = q, k, v, bias, window, segment_ids
  wanted = lse or sinks is not None
  results = dispatch.call(
    "window_bias", IMPLEMENTATIONS, implementation, *args, lse=wanted, softcap=softcap, by_age=by_age
  )
  if not wanted:
    return results
  results = with_sinks(*results, sinks)
  return results if lse else results[0]
