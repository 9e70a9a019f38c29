"""Decoding in PyTorch with a window ring and an append-only archive.

Mirrors dms_jax/cache/ring.py. Source: arXiv 2506.05345, section 3.2. Each KV head of each layer holds, for each row,

    [ ring: W + 1 slots, token t in slot t mod (W + 1) | archive: tokens kept as they left the ring ]

Token t displaces token t - (W + 1), which is first appended to the archive unless it was evicted. Live slots are always
the first of each, and archived entries never change. Keys are stored after RoPE, so that the order of slots does not
matter. Attention over the live slots equals the mask of `attention.py`; the released code's reuse of slots holds the
same tokens.

Everything is one token and one head at a time, for reading; dms_jax settles all heads of all layers at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.torch_reference.gates import DMSConfig
from experiments.torch_reference.model import ModelConfig, Weights, run_layers


class HeadCache:
  """The keys and values, each [H], that one KV head of one layer holds for one row."""

  def __init__(self, window: int, shift: int):
    self.ring: list[tuple[Tensor, Tensor] | None] = [None] * (window + 1)
    self.archive: list[tuple[Tensor, Tensor]] = []
    self.evicted: dict[int, bool] = {}  # decisions about the ring's tokens
    self.shift = shift
    self.seen = 0

  def add(self, key: Tensor, value: Tensor, evict: bool) -> None:
    """Takes the next token, and the decision that it computed: about the token `shift` before."""
    t, slot = self.seen, self.seen % len(self.ring)
    self.evicted[t - self.shift] = evict  # first: at W = 0 and shift 1 it is about the token that leaves now
    leaving = t - len(self.ring)
    if leaving >= 0 and not self.evicted.pop(leaving):
      self.archive.append(self.ring[slot])
    self.ring[slot] = (key, value)
    self.seen += 1

  def live(self) -> list[tuple[Tensor, Tensor]]:
    """What the newest token attends to, itself included."""
    return self.ring[: self.seen] + self.archive

  def attend(self, q: Tensor) -> Tensor:
    """Attention of the group's queries [G, H] over the live slots."""
    keys, values = (torch.stack(part) for part in zip(*self.live(), strict=True))
    return (q @ keys.T * q.shape[-1] ** -0.5).softmax(dim=-1) @ values


class Cache:
  """`heads[layer][row][kv_head]`, for B rows."""

  def __init__(self, config: ModelConfig, dms: DMSConfig, rows: int):
    new = lambda: [HeadCache(dms.window, dms.shift) for _ in range(config.num_kv_heads)]
    self.heads = [[new() for _ in range(rows)] for _ in range(config.num_layers)]

  def seen(self) -> Tensor:
    """Tokens that each row has read, [B]: the position of its next one."""
    return torch.tensor([heads[0].seen for heads in self.heads[0]])

  def live(self) -> Tensor:
    """Tokens held, [L, B, K]: `metrics.live` of dms_jax."""
    return torch.tensor([[[len(head.live()) for head in row] for row in layer] for layer in self.heads])


def read(
  weights: Weights,
  config: ModelConfig,
  dms: DMSConfig,
  cache: Cache,
  tokens: Tensor,
  active: Tensor | None = None,
  threshold: float = 0.0,
) -> Tensor:
  """Reads one token a row, [B], into the cache; returns logits [B, V].

  Args:
    active: bool [B]; other rows, which are at padding, read nothing, and their logits mean nothing.
    threshold: a token is evicted where its gate logit is above.
  """
  rows = range(len(tokens)) if active is None else active.nonzero()[:, 0].tolist()

  def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    out, group = torch.zeros_like(q), config.num_heads // config.num_kv_heads
    for b in rows:
      for kv, head in enumerate(cache.heads[layer][b]):
        head.add(k[b, kv, 0], v[b, kv, 0], bool(logits[b, kv, 0] > threshold))
        own = slice(kv * group, (kv + 1) * group)
        out[b, own, 0] = head.attend(q[b, own, 0])
    return out

  return run_layers(weights, config, dms, tokens[:, None], cache.seen()[:, None], attention)[:, 0]


@torch.no_grad()
def generate(
  weights: Weights,
  config: ModelConfig,
  dms: DMSConfig,
  prompts: Tensor,
  new_tokens: int,
  *,
  mask: Tensor | None = None,
  cache: Cache | None = None,
  threshold: float = 0.0,
) -> tuple[Tensor, Cache]:
  """Continues prompts [B, T] greedily by `new_tokens` each; returns (tokens [B, new_tokens], cache).

  Prompts are read token by token; dms_jax's sparse chunks give the same. The cache has not read the last new token: for
  a second turn, pass it on, with prompts that begin with that token.

  Args:
    mask: bool [B, T], false for padding on the left.
  """
  cache = cache or Cache(config, dms, len(prompts))
  mask = torch.ones_like(prompts, dtype=torch.bool) if mask is None else mask
  for tokens, active in zip(prompts.T, mask.T, strict=True):
    logits = read(weights, config, dms, cache, tokens, active, threshold)
  found = [logits.argmax(dim=-1)]
  while len(found) < new_tokens:
    found.append(read(weights, config, dms, cache, found[-1], threshold=threshold).argmax(dim=-1))
  return torch.stack(found, dim=1), cache
