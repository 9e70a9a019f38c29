"""Times PyTorch's FlexAttention with the training bias, as the first implementation trains.

Two forms are timed. "flex" is the form of NVIDIA Model-Optimizer (experimental/dms): one batch row for each row and KV
head, causality and window as factors of the score in `score_mod`, no block mask, and the bias in bfloat16 through
automatic mixed precision. "flex_blocks" is the fastest form known: a causal block mask skips the blocks above the
diagonal, and native atomics sum the gradient of a float32 bias.

`experiments.bench_kernels` runs `measure` in a separate process, so that two frameworks do not share a device's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

MASKED = -50000.0  # the score of a key that is not visible, without a block mask


def forms(tokens: int, device) -> dict[str, Callable]:
  """{name: attend(q [B, N, T, H], k and v [B, K, T, H], bias float [B, K, T], window), giving [B, N, T, H]}."""
  import torch
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  compiled = torch.compile(flex_attention, dynamic=False)
  mask = create_block_mask(lambda b, n, i, j: i >= j, None, None, tokens, tokens, device=device)

  def as_trained(q, k, v, bias, window):
    (b, _, t, h), heads = q.shape, k.shape[1]
    rows = lambda x: x.reshape(b * heads, -1, t, h)
    low = bias.to(q.dtype).reshape(b * heads, t)

    def score(s, row, _, i, j):
      seen, near = (i >= j).to(s.dtype), (i - j <= window).to(s.dtype)
      return seen * (near * s + (1 - near) * (s + low[row, j])) + (1 - seen) * MASKED

    return compiled(rows(q), rows(k), rows(v), score_mod=score, enable_gqa=True).reshape(q.shape)

  def with_blocks(q, k, v, bias, window):
    group = q.shape[1] // k.shape[1]

    def score(s, b, n, i, j):
      return s + torch.where(i - j > window, bias[b, n // group, j], 0.0)

    return compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)

  return {"flex": as_trained, "flex_blocks": with_blocks}


def measure(batch: int, tokens: int, queries: int, heads: int, size: int, window: int) -> dict:
  """Microseconds of each form, forward ("flex_forward_us") and with the backward pass of q, k, v and bias ("flex_us").

  Attention is causal, in bfloat16, with the bias added to keys outside the window. {"skipped": why} if it cannot run.
  """
  try:
    import torch
    import torch.nn.attention.flex_attention
  except ImportError as error:
    return {"skipped": f"PyTorch with FlexAttention is not installed: {error}"}
  if not torch.cuda.is_available():
    return {"skipped": "PyTorch sees no GPU"}
  torch.manual_seed(0)
  device = torch.device("cuda")
  make = lambda n: torch.randn(batch, n, tokens, size, device=device, dtype=torch.bfloat16).requires_grad_()
  q, k, v = make(queries), make(heads), make(heads)
  bias = torch.nn.functional.logsigmoid(4 * torch.randn(batch, heads, tokens, device=device)).requires_grad_()
  dout = torch.randn(q.shape, device=device, dtype=q.dtype)

  def clock(call) -> float:
    """Microseconds: the best of three rounds of three calls, of single ones where a call takes long."""

    def timed(calls: int) -> float:
      torch.cuda.synchronize()
      begin = time.perf_counter()
      for _ in range(calls):
        call()
      torch.cuda.synchronize()
      return (time.perf_counter() - begin) / calls

    call()
    once = timed(1)
    return min(timed(3 if once < 0.1 else 1) for _ in range(3)) * 1e6

  found = {"torch": torch.__version__}
  for name, form in forms(tokens, device).items():
    attend = partial(form, q, k, v, bias, window)

    def both(attend=attend):
      for x in (q, k, v, bias):
        x.grad = None
      attend().backward(dout)

    with torch.no_grad():
      found[f"{name}_forward_us"] = clock(attend)
    found[f"{name}_us"] = clock(both)
  return found
