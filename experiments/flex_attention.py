"""PyTorch's FlexAttention with the retrofit's bias, timed: the way the method's first implementation trains.

`experiments.bench_kernels` runs `main` in a process of its own, so that two frameworks do not share their memory.
"""

from __future__ import annotations

import json
import sys
import time


def measure(batch: int, tokens: int, queries: int, heads: int, size: int, window: int) -> dict:
  """Microseconds forward ("flex_forward_us") and with the backward pass, the bias's gradient included ("flex_us"), or
  why there are none ("flex_skipped"); bfloat16, causal, the bias added where a key is further back than the window."""
  try:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
  except ImportError as error:
    return {"flex_skipped": f"PyTorch with FlexAttention is not installed: {error}"}
  if not torch.cuda.is_available():
    return {"flex_skipped": "PyTorch sees no GPU"}
  torch.manual_seed(0)
  device, group = torch.device("cuda"), queries // heads
  make = lambda n: torch.randn(batch, n, tokens, size, device=device, dtype=torch.bfloat16).requires_grad_()
  q, k, v = make(queries), make(heads), make(heads)
  bias = torch.nn.functional.logsigmoid(4 * torch.randn(batch, heads, tokens, device=device)).requires_grad_()
  dout = torch.randn(q.shape, device=device, dtype=q.dtype)
  mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)
  compiled = torch.compile(flex_attention, dynamic=False)

  def attend():
    def score(s, b, h, i, j):
      return s + torch.where(i - j > window, bias[b, h // group, j], 0.0)

    return compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)

  def both():
    for x in (q, k, v, bias):
      x.grad = None
    attend().backward(dout)

  def clock(call) -> float:
    for _ in range(2):
      call()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
      begin = time.perf_counter()
      for _ in range(3):
        call()
      torch.cuda.synchronize()
      best = min(best, (time.perf_counter() - begin) / 3)
    return best * 1e6

  with torch.no_grad():
    forward = clock(attend)
  return {"flex_forward_us": forward, "flex_us": clock(both), "torch": torch.__version__}


def main() -> None:
  """Measures what the first argument says, as a JSON object of `measure`'s arguments; prints another of the result."""
  print(json.dumps(measure(**json.loads(sys.argv[1]))))
