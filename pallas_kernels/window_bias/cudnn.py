"""Dense causal attention by cuDNN: the case without bias, which a teacher's forward pass is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.dispatch import Expected
from pallas_kernels.common.platform import platform


def window_bias_attention(q, k, v, bias, window, segment_ids, lse=False, softcap=None, by_age=False):
  """See `api.window_bias_attention`; refuses what cuDNN's fused attention cannot express."""
  if platform() != "gpu":
    raise Expected(f"cuDNN needs an NVIDIA GPU, this is a {platform()}")
  if bias is not None or segment_ids is not None:
    raise Expected("cuDNN's attention takes neither a bias on far keys alone nor segments")
  if lse or softcap is not None:
    raise Expected("cuDNN's attention returns no log-sum-exp, which sinks need, and caps no scores")
  if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
    raise NotImplementedError(
      f"cuDNN's attention takes 16-bit floats and head sizes up to 128, not {q.dtype}, {q.shape}"
    )
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
