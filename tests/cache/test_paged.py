"""PagedCache: no page owned twice or lost, a full pool, rows that come, share, leave and return."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.host import offload_row, restore_row
from dms_jax.config import DMSConfig
from dms_jax.model import cached_forward, last_logits
from pallas_kernels.common import compat_tpu
from pallas_kernels.common.platform import tracing_for
from tests.helpers import check_pages as check

PAGE, WINDOW, ROWS = 4, 3, 3
POLICY = policies.DMS(window=WINDOW, threshold=0.0)


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=DMSConfig(window=WINDOW))


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def feed(model, policy, cache, tokens, lengths):
  out, cache = cached_forward(model, policy, cache, tokens, lengths)
  return last_logits(model, out), out.stalled, cache


def create(model, capacity, policy=POLICY, longest=80, rows=ROWS, **options):
  return caches.create(
    "paged",
    model.config,
    batch=rows,
    capacity=capacity,
    longest=longest,
    policy=policy,
    lag=1,
    page_size=PAGE,
    **options,
  )


def decode(model, cache, text, start, steps, active=None, policy=POLICY):
  """Feeds `text` [B, T] from `start` on, a token a step, to the rows that are active; (logits of each step, cache)."""
  active = np.ones(len(text), np.int32) if active is None else np.asarray(active, np.int32)
  logits = []
  for i in range(start, start + steps):
    out, stalled, cache = feed(model, policy, cache, text[:, i : i + 1], active)
    assert not np.asarray(stalled).any()
    logits.append(np.asarray(out))
  return np.stack(logits), cache


def test_pages_are_owned_once_and_returned(model):
  """Through chunks, which ask for more than they keep, single tokens, and releases; at the end all are free."""
  text, cache = np.array(tiny.tokens(model.config, ROWS, 40)), create(model, 40)
  for start, width in ((0, 9), (9, 9), (18, 1), (19, 1), (20, 9)):
    *_, cache = feed(model, POLICY, cache, text[:, start : start + width], np.array([width, width, width // 2 + 1]))
    check(cache)
  used = -(-np.asarray(cache.archived) // PAGE)
  assert (used <= np.asarray(cache.table.owned)).all() and np.asarray(cache.table.owned).sum() <= used.sum() + used.size
  for row in range(ROWS):
    cache = cache_rows.free_rows(cache, jnp.arange(ROWS) == row)
    check(cache)
  assert int(cache.table.pool.count) == cache.pages and not cache.live().any()


def test_a_full_pool_stalls_a_row_and_no_other(model):
  """Rows that find no page sit out, bitwise untouched, and go on once there are pages; all equal rows with room."""
  text = np.array(tiny.tokens(model.config, ROWS, 48))
  keeps = POLICY.replace(threshold=1e9)  # nothing is evicted
  roomy, small = create(model, 60), create(model, WINDOW + 1 + 3 * PAGE)
  at, expected = np.zeros(ROWS, int), []
  for i in range(48):
    logits, stalled, roomy = feed(model, keeps, roomy, text[:, i : i + 1], np.ones(ROWS, np.int32))
    assert not np.asarray(stalled).any()
    expected.append(np.asarray(logits))
  stalls = 0
  while (at < 48).any():
    tokens = text[np.arange(ROWS), np.minimum(at, 47)][:, None]
    before = small
    logits, stalled, small = feed(model, keeps, small, tokens, (at < 48).astype(np.int32))
    check(small)
    stalled = np.asarray(stalled)
    stalls += int(stalled.sum())
    for row in np.flatnonzero((at < 48) & ~stalled):
      np.testing.assert_array_equal(np.asarray(logits)[row], expected[at[row]][row])
    for row in np.flatnonzero(stalled):
      for name in ("kv", "archived", "evicted"):
        np.testing.assert_array_equal(getattr(small, name)[:, row], getattr(before, name)[:, row])
    fed = (at < 48) & ~stalled
    at = at + fed
    if not fed.any():
      small = small.with_pages(small.pages + 40)
  assert stalls


def test_a_chunk_takes_pages_as_if_nothing_were_evicted(model):
  """Where not all rows' chunks fit, the first ones are read; the others are left out whole."""
  cache = create(model, WINDOW + 1 + PAGE)  # one page a head
  text = np.array(tiny.tokens(model.config, ROWS, 20))
  _, stalled, cache = feed(model, POLICY, cache, text[:, :12], np.full(ROWS, 12, np.int32))
  assert np.asarray(stalled).tolist() == [False, True, True]
  assert np.asarray(cache.seen).tolist() == [12, 0, 0]
  check(cache)


def test_a_row_that_fits_no_table_stalls(model):
  cache = create(model, WINDOW + 1 + PAGE, longest=WINDOW + 1 + PAGE)
  _, stalled, cache = feed(model, POLICY, cache, np.ones((ROWS, 12), np.int32), np.array([12, 3, 8], np.int32))
  assert np.asarray(stalled).tolist() == [True, False, False]


def prompted(model, policy=POLICY, length=30, **options):
  """A cache whose row 1 has read a prompt, and a text to go on with."""
  text = np.array(tiny.tokens(model.config, ROWS, length + 20))
  text[:] = text[1]
  lengths = np.array([0, length, 0], np.int32)
  _, stalled, cache = feed(model, policy, create(model, 60, policy, **options), text[:, :length], lengths)
  assert not np.asarray(stalled).any()
  return cache, text


@pytest.mark.parametrize(
  "policy",
  [POLICY, policies.H2O(budget=17, window=WINDOW), policies.RKV(budget=17, buffer=4, window=WINDOW)],
  ids=["dms", "h2o", "rkv"],
)
def test_chains_share_their_prompt(model, policy):
  """Full pages have three owners, nothing they hold changes, and each chain goes on as the prompt's own row does."""
  policy = policy.resolved(WINDOW)
  cache, text = prompted(model, policy)
  free = int(cache.table.pool.count)
  cache, enough = cache_rows.fork_row(cache, 1, jnp.array([True, False, True]), whole=policy.rewrites)
  assert bool(enough)
  owners = check(cache)
  archived = np.asarray(cache.archived[:, 1])
  if policy.rewrites:  # a policy that writes into old pages has its own
    assert owners.max() == 1
  else:
    assert (owners == 3).sum() == (archived // PAGE).sum() > 0
    assert free - int(cache.table.pool.count) == 2 * (archived % PAGE > 0).sum()
  shared = np.flatnonzero(owners == 3)
  before = np.asarray(cache.store.pages)[shared]
  text[0, 35:], text[2, 35:] = text[0, 35:][::-1], (text[2, 35:] + 1) % model.config.vocab_size  # chains diverge
  logits, cache = decode(model, cache, text, 30, 15, policy=policy)
  np.testing.assert_array_equal(np.asarray(cache.store.pages)[shared], before)
  check(cache)
  for row in range(ROWS):
    alone, _ = prompted(model, policy)
    alone, _ = (
      cache_rows.fork_row(alone, 1, jnp.arange(ROWS) == row, whole=policy.rewrites) if row != 1 else (alone, True)
    )
    expected, _ = decode(model, alone, text, 30, 15, np.arange(ROWS) == row, policy)
    np.testing.assert_array_equal(logits[:, row], expected[:, row])
  for row in (1, 0, 2):
    cache = cache_rows.free_rows(cache, jnp.arange(ROWS) == row)
    check(cache)
  assert int(cache.table.pool.count) == cache.pages


def test_a_fork_without_pages_changes_nothing(model):
  cache, _ = prompted(model)
  table = cache.table
  cache = cache.replace(table=table.replace(pool=table.pool.replace(count=jnp.int32(0))))
  before = jax.tree.map(np.array, cache)
  cache, enough = cache_rows.fork_row(cache, 1, jnp.array([True, False, False]))
  assert not bool(enough)
  jax.tree.map(np.testing.assert_array_equal, before, cache)


@pytest.mark.parametrize("case", ["dms", "h2o", "quest", "int8"])
def test_a_stored_row_goes_on_as_if_it_had_stayed(model, case):
  """From one pool into another of another size and another place, bit by bit."""
  policy = {"h2o": policies.H2O(budget=17, window=WINDOW), "quest": policies.Quest(page=PAGE, budget=16)}.get(
    case, POLICY
  )
  policy = policy.resolved(WINDOW)
  options = {"page_format": "int8"} if case == "int8" else {}
  cache, text = prompted(model, policy, **options)
  stored = offload_row(cache, 1)
  expected, cache = decode(model, cache, text, 30, 12, [0, 1, 0], policy)
  other = create(model, 30, policy, longest=60, **options)
  _, _, other = feed(model, policy, other, text[:, ::-1][:, :20], np.array([20, 0, 0], np.int32))  # someone else
  other, enough = restore_row(other, 2, stored)
  assert enough
  check(other)
  np.testing.assert_array_equal(other.live()[:, 2], stored.archived + WINDOW + 1)
  logits, other = decode(model, other, text, 30, 12, [0, 0, 1], policy)
  np.testing.assert_array_equal(logits[:, 2], expected[:, 1])
  np.testing.assert_array_equal(other.archived[:, 2], cache.archived[:, 1])


def test_a_stored_row_that_does_not_fit_is_refused(model):
  stored = offload_row(prompted(model)[0], 1)
  small = create(model, WINDOW + 2)  # a page a head
  assert (stored.archived > PAGE).sum() > small.pages // 2 or len(stored.pages) > small.pages
  assert not restore_row(small, 0, stored)[1]
  with pytest.raises(ValueError, match=r"archive slots does not fit a table of 4"):
    restore_row(create(model, WINDOW + 2, longest=WINDOW + 2), 0, stored)
  with pytest.raises(ValueError, match="stored row with archive"):
    restore_row(create(model, 60, page_format="int8"), 0, stored)


@pytest.mark.parametrize("archive, error", [("int8", 0.02), ("float8", 0.06)])
def test_an_archive_in_eight_bits_stays_near(model, archive, error):
  """The ring is exact; a slot's error is at most half a step of 127 (int8), or of 3 bits of mantissa (float8)."""
  text = np.array(tiny.tokens(model.config, ROWS, 40))
  exact, quantised = create(model, 60), create(model, 60, page_format=archive)
  keeps = POLICY.replace(threshold=1e9)
  for start in (0, 10, 20):
    lengths = np.full(ROWS, 10, np.int32)
    _, _, exact = feed(model, keeps, exact, text[:, start : start + 10], lengths)
    _, _, quantised = feed(model, keeps, quantised, text[:, start : start + 10], lengths)
  assert quantised.store.pages.dtype.itemsize == 1
  np.testing.assert_allclose(quantised.kv[0], exact.kv[0], atol=1e-6)  # no attention yet in the first layer
  values = lambda cache: np.asarray(cache._archive(cache.layer_carry(), cache.table, 0))[..., : exact.kv.shape[-1] // 2]
  live = np.arange(exact.slots - exact.ring) < np.asarray(exact.archived[0])[..., None]
  mine, theirs = values(quantised)[live], values(exact)[live]
  step = np.abs(theirs).max(-1, keepdims=True) * (0.5 / 127 if archive == "int8" else 2**-4)
  assert (np.abs(mine - theirs) <= step * 1.001).all()
  logits, _ = decode(model, exact, text, 30, 8, policy=keeps)
  near, _ = decode(model, quantised, text, 30, 8, policy=keeps)
  assert 0 < np.abs(near - logits).max() < error * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("archive", ["int8", "float8"])
def test_an_archive_in_eight_bits_on_a_tpu(archive):
  """A prompt in chunks and steps after it, its slots written and read by the kernels: as XLA does it, to rounding."""
  config, window = tiny.config(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64), 3
  model, policy = tiny.model(config, DMSConfig(window=window)), policies.DMS(window=window, threshold=0.0)
  text = np.array(tiny.tokens(config, 2, 90))
  results = []
  for name, interpreting in (("cpu", contextlib.nullcontext), ("tpu", compat_tpu.interpret_mode)):
    with tracing_for(name), interpreting():
      options = dict(batch=2, capacity=90, longest=96, policy=policy, lag=1, page_format=archive)
      cache, logits = caches.create("paged", config, page_size=64, **options), []
      run = jax.jit(cached_forward)
      for start, size in ((0, 40), (40, 44), *((i, 1) for i in range(84, 90))):
        lengths = jnp.asarray([size, max(size - 3, 1)], jnp.int32)
        out, cache = run(model, policy, cache, text[:, start : start + size], lengths)
        logits.append(np.asarray(last_logits(model, out)))
    results.append((np.stack(logits), cache))
  (want, by_xla), (found, by_kernels) = results
  np.testing.assert_array_equal(by_kernels.archived, by_xla.archived)
  assert int(by_xla.archived.max()) > 64 > int(by_xla.archived.min())
  # A number that rounds to the next of 8 bits moves a logit by half a step of them.
  np.testing.assert_allclose(found, want, rtol=0, atol=0.02 * np.abs(want).max())
  np.testing.assert_allclose(found[0], want[0], rtol=0, atol=1e-5 * np.abs(want).max())
  check(by_kernels)


def test_bytes(model):
  """What the cache says it holds and has allocated, and that a page costs what a pool grows by."""
  cache, _ = prompted(model)
  heads = model.config.num_layers * model.config.num_kv_heads
  slot = 2 * model.config.head_dim * 4
  assert cache.bytes_live() == (int(cache.archived.sum()) + heads * (WINDOW + 1)) * slot
  assert cache.with_pages(cache.pages + 7).nbytes - cache.nbytes == 7 * cache.page_bytes
  assert cache.fixed_bytes + cache.pages * cache.page_bytes == cache.nbytes
  with pytest.raises(ValueError, match="cannot shrink a pool"):
    cache.with_pages(cache.pages - 1)


def test_bad_settings_are_named(model):
  with pytest.raises(ValueError, match=r"page_format='int3' is not one of \['float8', 'int8'\]"):
    create(model, 40, page_format="int3")
  with pytest.raises(ValueError, match="page_size=4, but Quest selects pages of 8 slots"):
    create(model, 40, policies.Quest(page=8, budget=32).resolved(None))
  with pytest.raises(ValueError, match="capacity=8 is below the"):
    create(model, 40).with_capacity(8, 80)
