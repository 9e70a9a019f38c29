"""Oracle of decode attention: plain loops in float64 from the formula."""

from __future__ import annotations

import dataclasses

import numpy as np


def decode_attention(
  q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, softcap=None, sinks=None
):
  """softmax(q k^T / sqrt(H)) v over the live slots of each (row, KV head): a prefix of kv, then the archive in pages.

  A head's sink is one more score, of a slot without a value.

  Args: q [B, N, H], kv [L, B, K, S, 2H] or None, layer int, lengths [B, K] or None, pages a `Pages` or None. All in
  float64; zeros if nothing is live. Returns what `api.decode_attention` does.
  """
  q = np.asarray(q, np.float64)
  if pages is not None:  # indexing arrays of JAX would run a program for each slot
    parts = {field.name: getattr(pages, field.name) for field in dataclasses.fields(pages)}
    pages = dataclasses.replace(pages, **{name: np.asarray(x) for name, x in parts.items() if x is not None})
  b, n, h = q.shape
  k = (np.shape(kv) if kv is not None else np.shape(pages.table))[2]
  group = n // k
  out = np.zeros((b, n, h))
  sinks = np.full(n, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
  logs = np.tile(sinks, (b, 1))
  of_kv = None if kv is None else np.zeros((b, k, np.shape(kv)[3]))
  of_pages = None if pages is None else np.zeros((b, k, np.shape(pages.table)[3] * np.shape(pages.pool)[1]))
  for row in range(b):
    for head in range(n):
      kv_head = head // group
      slots, first = np.zeros((0, 2 * h)), 0
      if kv is not None:
        first = int(lengths[row, kv_head])
        slots = np.asarray(kv[layer, row, kv_head, :first], np.float64)
      if pages is not None:
        archive = [slot_of(pages, pages.table[layer, row, kv_head], i) for i in range(int(pages.lengths[row, kv_head]))]
        slots = np.concatenate([slots, np.reshape(archive, (-1, 2 * h))])
      if not len(slots):
        continue
      scores = slots[:, :h] @ q[row, head] / np.sqrt(h)
      scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
      top = max(scores.max(), sinks[head])
      total = np.exp(scores - top).sum() + np.exp(sinks[head] - top)
      weights = np.exp(scores - top) / total
      out[row, head] = weights @ slots[:, h:]
      logs[row, head] = top + np.log(total)
      if kv is not None:
        of_kv[row, kv_head, :first] += weights[:first]
      if pages is not None:
        of_pages[row, kv_head, : len(slots) - first] += weights[first:]
  results = (out, *([logs] if lse else []), *([(of_kv, of_pages)] if mass else []))
  return results if len(results) > 1 else out


def slot_of(pages, table, index: int) -> np.ndarray:
  """Key and value of the archive's slot `index`, float64 [2H]; `table` [M]."""
  page = pages.pool.shape[1]
  number, slot = int(table[index // page]), index % page
  row = np.asarray(pages.pool[number, slot], np.float64)
  if pages.scales is not None:
    scales = np.asarray(pages.scales[number, 0, 2 * slot : 2 * slot + 2], np.float64)
    row = row * np.repeat(scales, len(row) // 2)
  return row
