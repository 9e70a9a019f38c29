"""Metrics against their definitions, counted in numpy from decisions that never saw a cache."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import metrics
from dms_jax import testing as tiny
from tests import oracle
from tests.programs import read

WINDOW = 5


def held_and_read(evicted: np.ndarray, position: int) -> np.ndarray:
  """Keys visible to the query at `position`: j <= i and (i - j <= W or not evicted[j]); [..., T] -> [...]."""
  j = np.arange(evicted.shape[-1])
  return ((j <= position) & ((position - j <= WINDOW) | ~evicted)).sum(axis=-1)


@pytest.mark.parametrize("kind", ["contiguous", "masked", "paged"])
def test_definitions(kind):
  model = tiny.model(gates=tiny.dms(window=WINDOW))
  cfg, chunk, new = model.config, 4, 18
  lengths = [3, 11, 8]
  prompts = [tiny.tokens(cfg, 1, n, seed=n).tolist()[0] for n in lengths]
  out = dms_jax.generate(
    model, prompts, max_new_tokens=new, eos=False, cache=kind, prefill_chunk=chunk, decode_block=8, history=True
  )
  m = out.metrics
  evicted = []
  for prompt, tokens in zip(prompts, out.tokens, strict=True):
    _, z = read(model, [prompt + tokens[:-1]])
    evicted.append(oracle.about(z[:, 0] > 0, model.dms.shift))  # [L, K, T]
  assert 0.1 < np.mean([e.mean() for e in evicted]) < 0.9  # decisions are mixed

  total = np.array(lengths) + new - 1  # the last token is chosen and never fed
  np.testing.assert_array_equal(m.seen, total)
  live = np.stack([held_and_read(e, t - 1) for e, t in zip(evicted, total, strict=True)], axis=1)
  np.testing.assert_array_equal(m.live, live)
  assert m.achieved_cr == pytest.approx(1 / np.mean(live / total[:, None]))
  assert m.achieved_cr > 1.2

  steps = [np.stack([held_and_read(e, n + s) for s in range(new - 1)]) for e, n in zip(evicted, lengths, strict=True)]
  np.testing.assert_array_equal(m.decode_reads, np.stack([s.sum(axis=0) for s in steps], axis=1))
  assert m.kv_reads == pytest.approx(sum(s.mean(axis=(1, 2)).sum() for s in steps))
  np.testing.assert_array_equal(m.history, np.stack(steps, axis=2))
  reads = [sum(held_and_read(e, i) for i in range(n)) for e, n in zip(evicted, lengths, strict=True)]
  np.testing.assert_array_equal(m.prompt_reads, np.stack(reads, axis=1))
  assert m.prefill_reads == pytest.approx(sum(r.mean() for r in reads))

  # Held after every chunk (each row from its own start) and step, averaged over layers and heads.
  curve = np.array(
    [
      [held_and_read(e, min(n, chunk * (c + 1)) - 1).mean() for e, n in zip(evicted, lengths, strict=True)]
      for c in range(-(-max(lengths) // chunk))
    ]
    + [[s[i].mean() for s in steps] for i in range(new - 1)]
  )
  np.testing.assert_allclose(m.peak, curve.max(axis=0))
  assert m.peak_tokens == pytest.approx(curve.max()) and m.peak_total == pytest.approx(curve.sum(axis=1).max())

  store = out.conversation.cache
  assert m.bytes_allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(store))
  assert m.bytes_live == live.sum() * 2 * cfg.head_dim * 4
  np.testing.assert_array_equal(m.new_tokens, [new] * 3)
  summary = m.to_json()
  assert summary["achieved_cr"] == m.achieved_cr and summary["seen_tokens"] == total.tolist()


def test_dense_holds_everything():
  model = tiny.model()
  out = dms_jax.generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=5, eos=False, prefill_chunk=4, decode_block=4)
  m = out.metrics
  assert m.achieved_cr == 1.0 and (m.live == 7).all() and m.peak_total == 14
  assert m.kv_reads == 2 * (4 + 5 + 6 + 7) and m.prefill_reads == 2 * (1 + 2 + 3)


def test_rows_that_are_done_hold_but_do_not_read():
  model = tiny.model()
  settings = dict(max_new_tokens=9, temperature=2.0, key=jax.random.key(0), prefill_chunk=4, decode_block=4)
  free = dms_jax.generate(model, [[1, 2, 3], [4, 5, 6]], eos=False, **settings)
  last = free.tokens[0][2]
  assert last not in free.tokens[0][:2] and last not in free.tokens[1]
  out = dms_jax.generate(model, [[1, 2, 3], [4, 5, 6]], eos=[last], **settings)
  assert out.finish_reason == ["eos", "length"] and out.tokens == [free.tokens[0][:3], free.tokens[1]]
  np.testing.assert_array_equal(out.metrics.new_tokens, [3, 9])
  np.testing.assert_array_equal(out.metrics.seen, [5, 11])
  assert out.metrics.kv_reads == (4 + 5) + sum(range(4, 12)) and out.metrics.peak_total == 16


def test_empty():
  zero = metrics.Metrics.zero(2, 3, 1)
  assert np.isnan(zero.achieved_cr) and zero.kv_reads == 0 and zero.peak_tokens == 0
