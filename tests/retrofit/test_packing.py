"""Whole documents in rows: none is lost or cut, prompts are masked, workers change nothing."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing.connection
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from dms_jax.retrofit import DataConfig, RetrofitConfig, ScheduleConfig, packing
from dms_jax.retrofit.data import Packer, load_sources
from dms_jax.retrofit.packing import StreamPacker, WholePacker, best_fit
from dms_jax.tokenizer import byte_tokenizer

CONFIG = RetrofitConfig(batch_size=3, seq_len=40, seed=4, schedule=ScheduleConfig(steps=6))
END = 256


def sums(seed: int, start: int, count: int, most: int = 60):
  """Documents whose text repeats their number: (prompt, text); document i depends on (seed, i) alone."""
  for number in range(start, start + count):
    rng = random.Random(f"{seed} {number}")
    yield f"{number}?", "".join(rng.choice("abc") for _ in range(rng.randint(1, most)))


def documents_of(batch) -> list[list[tuple[str, str]]]:
  """The (prompt, text) of each document of each row, read back from a batch of bytes."""
  rows = []
  for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
    assert (segments[np.flatnonzero(np.diff(segments)) + 1] > 0).sum() + 1 == segments.max()  # contiguous runs
    assert not mask[segments == 0].any() and not tokens[segments == 0].any()
    row = []
    for number in range(1, segments.max() + 1):
      ids, counted = tokens[segments == number], mask[segments == number]
      first = int(np.flatnonzero(counted)[0])
      assert ids[-1] == END and counted[first:].all() and END not in ids[:-1]
      row.append((bytes(ids[:first].tolist()).decode(), bytes(ids[first:-1].tolist()).decode()))
    rows.append(row)
  return rows


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_places_each_once_and_within_its_row(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 41, 30).tolist()
  packed = best_fit(lengths, 40)
  assert sorted(i for row in packed for i in row) == list(range(30))
  assert all(sum(lengths[i] for i in row) <= 40 for row in packed)
  assert len(packed) <= 11 / 9 * -(-sum(lengths) // 40) + 1 + sum(n > 20 for n in lengths)  # loosely: no row a document
  assert best_fit(lengths, 40, len(packed)) == packed and best_fit(lengths, 40, len(packed) - 1) is None


def test_generated_documents_stay_whole_and_in_order():
  """A batch holds the first documents of its range that fit, each once; those too long are counted and named."""
  packer = StreamPacker(functools.partial(sums, most=60), byte_tokenizer(), DataConfig(families=("sums",), workers=0),
                        CONFIG)  # fmt: skip
  for step in (0, 5):
    batch, start = packer.batch(step), step * 120
    assert batch.tokens.shape == (3, 40) and batch.loss_mask.dtype == bool
    found = [document for row in documents_of(batch) for document in row]
    size = lambda document: sum(map(len, document)) + 1
    drawn = [d for d in sums(4, start, 120) if size(d) <= 40]
    assert sorted(found) == sorted(drawn[: len(found)])
    assert best_fit([size(d) for d in drawn[: len(found) + 1]], 40, 3) is None  # the next one fits nowhere
    last = max(int(prompt[:-1]) for prompt, _ in drawn[: len(found)])
    too_long = [d for d in sums(4, start, last - start) if size(d) > 40]
    notes = packer.notes(step)
    assert notes["left_out"] == len(too_long) and packer.notes(step) == {}
    assert notes["filled"] == round(float((batch.segment_ids > 0).mean()), 4) > 0.6
  assert packer.left_out > 0
  assert set(packer.fingerprints()) == {"sums"}
  with pytest.raises(ValueError, match=r"data\.families: no document fits into a row of retrofit\.seq_len=3 tokens"):
    StreamPacker(sums, byte_tokenizer(), DataConfig(workers=0), RetrofitConfig(batch_size=1, seq_len=3)).batch(0)


def with_workers(workers: int) -> StreamPacker:
  return StreamPacker(sums, byte_tokenizer(), DataConfig(families=("sums",), workers=workers), CONFIG)


def test_workers_change_no_batch_and_go_on_after_sigterm():
  alone = with_workers(0)
  with contextlib.closing(with_workers(2)) as packer:
    for step in (0, 1, 2, 4, 5, 0):  # in order, a step skipped, and back
      jax.tree.map(np.testing.assert_array_equal, packer.batch(step), alone.batch(step))
      assert packer.notes(step) == alone.notes(step)
    rows = packer.batch(1, only=[2, 0])
    jax.tree.map(lambda x, whole: np.testing.assert_array_equal(x, whole[[2, 0]]), rows, alone.batch(1))
    for pid in packer._pool._processes:
      os.kill(pid, signal.SIGTERM)  # the parent's business
    jax.tree.map(np.testing.assert_array_equal, packer.batch(2), alone.batch(2))


def test_a_worker_that_ends_is_told_in_one_line_and_the_others_end(monkeypatch):
  """SIGTERM ends a worker after the grace; then the pool sends it to the others, and waits for them."""
  monkeypatch.setattr(packing, "GRACE", 0.5)
  with contextlib.closing(with_workers(2)) as packer:
    packer.batch(0)
    workers = list(packer._pool._processes.values())
    start = time.monotonic()
    os.kill(workers[0].pid, signal.SIGTERM)
    assert multiprocessing.connection.wait([workers[0].sentinel], timeout=60)
    assert time.monotonic() - start >= packing.GRACE
    assert multiprocessing.connection.wait([workers[1].sentinel], timeout=60)  # nobody has killed it
    with pytest.raises(OSError, match=r"a worker process .* ended .*--data\.workers"):
      for step in [0, 3] * 100:
        packer.batch(step)


def test_documents_of_files(tmp_path):
  """Records with a prompt: whole in rows, or cut; their mask is False on the prompt either way."""
  path = tmp_path / "traces.jsonl"
  records = [{"prompt": p, "text": t} for p, t in sums(0, 0, 40)] + [{"text": "no prompt"}]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  data = DataConfig(paths=(str(path),), whole_documents=True)
  [source] = load_sources(data, byte_tokenizer())
  assert source.document[-1] == 41
  packer = WholePacker([source], data, CONFIG)
  kept = [d for d in sums(0, 0, 40) if sum(map(len, d)) + 1 <= 40]
  assert 0 < len(kept) < 40 and len(packer.left_out) == 40 - len(kept)
  for name, number, size in packer.left_out:
    assert name == str(path) and size == sum(map(len, list(sums(0, 0, 40))[number - 1])) + 1 > 40
  placed = [d.number for row in packer._rows[source.name] for d in row]
  assert sorted(placed) == sorted({*range(41)} - {number - 1 for _, number, _ in packer.left_out})
  seen = [document for step in range(30) for row in documents_of(packer.batch(step)) for document in row]
  assert {*seen} == {*kept, ("", "no prompt")}
  jax.tree.map(np.testing.assert_array_equal, packer.batch(3), WholePacker([source], data, CONFIG).batch(3))
  cut = Packer([source], DataConfig(paths=(str(path),)), CONFIG).batch(0)
  prompts = np.isin(cut.tokens, list(b"0123456789?"))
  assert prompts.any()
  np.testing.assert_array_equal(cut.loss_mask, ~prompts)
  with pytest.raises(ValueError, match=r"every document of .* is longer than a row of retrofit\.seq_len=3"):
    WholePacker([source], data, RetrofitConfig(seq_len=3))
  path.write_text(json.dumps({"prompt": 3, "text": "a"}))
  with pytest.raises(ValueError, match=r"traces\.jsonl:1: `prompt` must be a string, found int"):
    load_sources(data, byte_tokenizer())


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"workers": -2}, r"data\.workers=-2"),
    ({"families": ("a",), "paths": ("b",)}, r"data\.families are generated"),
    ({"whole_documents": True, "separate_documents": False}, r"data\.separate_documents=false"),
  ],
)
def test_settings_of_documents_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**fields)
