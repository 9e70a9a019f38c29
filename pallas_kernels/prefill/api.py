"""Dispatch of prefill attention."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch
from pallas_kernels.prefill import gpu, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.prefill_attention, "tpu": tpu.prefill_attention, "xla": xla.prefill_attention}


def prefill_attention(
  q: Float[Array, "B T N H"],
  keys: Float[Array, "B K S H"],
  values: Float[Array, "B K S H"],
  q_pos: Int[Array, "B T"],
  k_first: Int[Array, "B K S"],
  k_last: Int[Array, "B K S"],
  *,
  lse: bool = False,
  query_weights: Float[Array, "B T"] | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N H"] | tuple:
  """Attention in which key j is visible to query i iff `k_first[j] <= q_pos[i] <= k_last[j]`.

  A kept key at position p has (p, NEVER), an evicted one (p, p + W), a cached key that all queries see (-1, NEVER), a
  dead slot (NEVER, -1). Queries at positions below -1 are padding: they see nothing and give zeros. Keys may come in
  any order, and dead ones may hold NaN. The kernels' cost follows the visible pairs if the keys that only some queries
  see are sorted by position.

  Args:
    q: queries after RoPE.
    lse: also return the logarithm of each query's sum of exponentials, float32 [B, T, N], sinks included; -inf for a
      sum of nothing.
    query_weights: float32; also return the mass of each key, float32 [B, K, S]: the attention probability that it gets
      from the G query heads of its KV head, summed over queries, each times its weight. Keys that no query sees have 0.
      Queries of weight 0 cost little.
    softcap: scores s, before any mask or bias, become softcap tanh(s / softcap) (Gemma 2); None leaves them.
    sinks: a logit for each query head, whose exponential joins the sum of the softmax and has no value (gpt-oss).

  Returns:
    out in q's dtype, or the tuple (out, log-sum-exp if asked for, mass if asked for).

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: the implementations named cannot do the case.
  """
  b, t, n, h = q.shape
  k, s = keys.shape[1:3]
  dispatch.check(keys.shape == values.shape == (b, k, s, h), f"keys {keys.shape}, values {values.shape}: not [B,K,S,H]")
  dispatch.check(n % k == 0, f"N={n} query heads are not a multiple of K={k} KV heads")
  dispatch.check_sinks(sinks, n)
  dispatch.check(q_pos.shape == (b, t), f"q_pos {q_pos.shape} must be [B, T] = {(b, t)}")
  found = f"k_first {k_first.shape}, k_last {k_last.shape}"
  dispatch.check(k_first.shape == k_last.shape == (b, k, s), f"{found}: not [B,K,S]")
  if query_weights is not None:
    dispatch.check(query_weights.shape == (b, t), f"query_weights {query_weights.shape} must be [B, T] = {(b, t)}")
  args, options = (
    (q, keys, values, q_pos, k_first, k_last),
    {"lse": lse, "query_weights": query_weights, "softcap": softcap, "sinks": sinks},
  )
  return dispatch.call("prefill", IMPLEMENTATIONS, implementation, *args, **options)
