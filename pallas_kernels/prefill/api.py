"""Dispatch of prefill attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch
from pallas_kernels.prefill import gpu, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.prefill_attention, "tpu": tpu.prefill_attention, "xla": xla.prefill_attention}
NEVER = np.int32(2**30)  # as `k_first`: a slot no query sees; as `k_last`: a key that is never evicted


def prefill_attention(
  q: Float[Array, "B T N H"],
  keys: Float[Array, "B K S H"],
  values: Float[Array, "B K S H"],
  q_pos: Int[Array, "B T"],
  k_first: Int[Array, "B K S"],
  k_last: Int[Array, "B K S"],
  *,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N H"]:
  """Attention in which key j is visible to query i iff `k_first[j] <= q_pos[i] <= k_last[j]`.

  A kept key at position p has (p, NEVER), an evicted one (p, p + W), a cached key that all may read (-1, NEVER), a
  dead slot (NEVER, -1). Queries at negative positions below -1 see nothing and give zeros. Keys may stand in any order;
  the kernels' cost follows what is visible where those that not all queries see are in the order of their positions.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  b, t, n, h = q.shape
  k, s = keys.shape[1:3]
  dispatch.check(keys.shape == values.shape == (b, k, s, h), f"keys {keys.shape}, values {values.shape}: not [B,K,S,H]")
  dispatch.check(n % k == 0, f"N={n} query heads are not a multiple of K={k} KV heads")
  dispatch.check(q_pos.shape == (b, t), f"q_pos {q_pos.shape} must be [B, T] = {(b, t)}")
  dispatch.check(
    k_first.shape == k_last.shape == (b, k, s), f"k_first {k_first.shape}, k_last {k_last.shape}: not [B,K,S]"
  )
  return dispatch.call("prefill", IMPLEMENTATIONS, implementation, q, keys, values, q_pos, k_first, k_last)
