"""Saved conversations continue bit by bit, also in a cache of another size; refusals."""

from __future__ import annotations

import dataclasses
import json
import random
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.cache import ContiguousCache, PagedCache
from dms_jax.config import DMSConfig
from dms_jax.generation import files
from dms_jax.generation.batching import Generator
from dms_jax.generation.files import HEADER, ROWS
from tests.helpers import check_pages

WINDOW, PAGE = 3, 4
SIZES = dict(prefill_chunk=8, decode_block=4, eos=False)
POLICIES = {
  "h2o": policies.H2O(budget=17, window=WINDOW), "quest": policies.Quest(page=PAGE, budget=16),
  "expected": policies.ExpectedAttention(budget=17, buffer=4, window=WINDOW),  # its memory is saved, too
  "shared": policies.DMS(budget=17, limit_over="layer"), "scored": policies.DMS(threshold=0.5, scored=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=DMSConfig(window=WINDOW))


def prompt(model, length, seed=0):
  return np.asarray(tiny.tokens(model.config, 1, length, seed))[0].tolist()


def talk(model, kind="contiguous", policy=None, rows=(21, 2), **options):
  """A first turn: of rows that differ in length, one of them shorter than the window's ring."""
  prompts = [prompt(model, n, n) for n in rows]
  settings = {**SIZES, "max_new_tokens": 1, "capacity": 48, **options}
  return dms_jax.generate(model, prompts, cache=kind, policy=policy, **settings)


def go_on(model, past, **options):
  return dms_jax.generate(
    model, [prompt(model, 6, 50), prompt(model, 9, 51)], continue_from=past, max_new_tokens=9, **SIZES, **options
  )


def assert_same(a, b):
  assert a.tokens == b.tokens and a.logprobs == b.logprobs  # to the bit
  assert a.metrics.held_tokens.tolist() == b.metrics.held_tokens.tolist()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind, dtype, case", [
  ("contiguous", "float32", None), ("paged", "bfloat16", None), ("paged", "float32", "h2o"),
  ("paged", "float32", "expected"), pytest.param("masked", "float32", "expected", marks=SLOW),
  pytest.param("contiguous", "bfloat16", None, marks=SLOW), pytest.param("masked", "float32", None, marks=SLOW),
  pytest.param("contiguous", "float32", "shared", marks=SLOW), pytest.param("paged", "float32", "scored", marks=SLOW),
  pytest.param("contiguous", "float32", "quest", marks=SLOW), pytest.param("paged", "float32", "quest", marks=SLOW),
])  # fmt: skip
def test_what_was_saved_goes_on_as_if_it_had_stayed(model, tmp_path, kind, dtype, case):
  model = jax.tree.map(lambda x: x.astype(dtype), model)
  out = talk(model, kind, POLICIES.get(case))
  dms_jax.save_conversation(tmp_path / "saved", out)
  past = dms_jax.load_conversation(tmp_path / "saved", model)
  assert type(past.cache) is type(out.conversation.cache) and past.cache.slots == out.conversation.cache.slots
  np.testing.assert_array_equal(past.cache.live(), out.conversation.cache.live())
  assert repr(past.policy) == repr(out.conversation.policy)
  assert_same(go_on(model, past), go_on(model, out))
  if kind == "paged":
    check_pages(past.cache)


def test_a_file_holds_live_slots_alone(model, tmp_path):
  out = talk(model, "contiguous", rows=(21, 2), capacity=512)
  dms_jax.save_conversation(tmp_path / "saved", out.conversation)
  with np.load(tmp_path / "saved" / ROWS) as arrays:
    held = sum(arrays[f"{b}.{name}"].nbytes for b in range(2) for name in ("kv", "pages"))
  assert held == out.conversation.cache.bytes_live()
  assert (tmp_path / "saved" / ROWS).stat().st_size < held + 2 * 7 * 512


def test_into_a_pool_that_must_grow(model, tmp_path):
  out = talk(model, "paged", rows=(150, 2), capacity=100, prefill_chunk=64)
  dms_jax.save_conversation(tmp_path / "saved", out)
  expected = go_on(model, out)
  small = dms_jax.load_conversation(tmp_path / "saved", model, capacity=40)
  assert small.cache.pages < out.conversation.cache.pages
  check_pages(small.cache)
  assert_same(go_on(model, small), expected)


@pytest.mark.slow
def test_into_caches_of_other_kinds(model, tmp_path):
  """The same bits in a larger pool; the same tokens where slots become pages, and back."""
  out = talk(model, "paged", rows=(150, 2), capacity=100, prefill_chunk=64)
  dms_jax.save_conversation(tmp_path / "saved", out)
  expected = go_on(model, out)
  large = dms_jax.load_conversation(tmp_path / "saved", model, capacity=200)
  assert large.cache.pages > out.conversation.cache.pages
  assert_same(go_on(model, large), expected)
  slots = dms_jax.load_conversation(tmp_path / "saved", model, cache="contiguous")
  assert isinstance(slots.cache, ContiguousCache) and go_on(model, slots).tokens == expected.tokens
  dms_jax.save_conversation(tmp_path / "again", slots)
  paged = dms_jax.load_conversation(tmp_path / "again", model, cache="paged")
  assert isinstance(paged.cache, PagedCache)
  assert_same(go_on(model, paged), expected)


@pytest.mark.parametrize("archive", ["int8", pytest.param(None, marks=SLOW), pytest.param("float8", marks=SLOW)])
def test_a_generator_s_rows(model, tmp_path, archive):
  """Kept, saved, and taken up by a generator with another pool; or with pages of another size, in other sums."""
  settings = dict(width=2, page_format=archive, max_length=96, temperature=0.7, **SIZES)
  first = Generator(model, page_size=PAGE, pages=200, **settings)
  tickets = [first.submit(prompt(model, n), max_new_tokens=7, key=jax.random.key(n), keep=True) for n in (25, 3)]
  list(first.run())
  kept = [first.results[ticket].stored[0] for ticket in tickets]
  dms_jax.save_conversation(tmp_path / "one", kept[0])
  dms_jax.save_conversation(tmp_path / "all", kept)
  past, both = (dms_jax.load_conversation(tmp_path / name, model) for name in ("one", "all"))
  for one, other in zip(kept, (past.row(0), both.row(1)), strict=True):
    jax.tree.map(np.testing.assert_array_equal, one.cache, other.cache)
    assert (one.pending, one.generated) == (other.pending, other.generated)

  def following(generator, source):
    ticket = generator.submit(prompt(model, 5, 1), max_new_tokens=8, key=jax.random.key(1), continue_from=source)
    list(generator.run())
    return generator.results[ticket].tokens, generator.results[ticket].logprobs

  other = Generator(model, page_size=PAGE, pages=90, **settings)
  expected = following(first, kept[0])
  assert following(other, past) == expected
  if archive is None:
    assert following(Generator(model, page_size=8, pages=90, **settings), past)[0] == expected[0]
  with pytest.raises(ValueError, match=r"a conversation of 2 rows; pick one with .row\(index\)"):
    other.submit([1], continue_from=both, key=jax.random.key(0))
  with pytest.raises(ValueError, match="row 2: the conversation has 2"):
    both.row(2)
  with pytest.raises(ValueError, match="continue_from: a conversation held under DMS cannot go on under TOVA"):
    Generator(model, policy=policies.TOVA(budget=9, window=WINDOW), **settings).submit(
      [1], continue_from=past, key=jax.random.key(0)
    )


def test_a_failed_save_leaves_what_was_there(model, tmp_path, monkeypatch):
  out = talk(model)
  dms_jax.save_conversation(tmp_path / "saved", out)
  before = {p: p.read_bytes() for p in (tmp_path / "saved").iterdir()}

  def full(*args, **kwargs):
    raise OSError("disk full")

  monkeypatch.setattr(files.np.lib.format, "write_array", full)
  with pytest.raises(OSError, match="disk full"):
    dms_jax.save_conversation(tmp_path / "saved", out)
  with pytest.raises(OSError, match="disk full"):
    dms_jax.save_conversation(tmp_path / "new", out)
  assert {p: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before
  assert [p.name for p in tmp_path.iterdir()] == ["saved"]
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "letter.txt").write_text("dear")
  with pytest.raises(ValueError, match="mine: exists and is not something this program wrote"):
    dms_jax.save_conversation(tmp_path / "mine", out)
  with pytest.raises(ValueError, match="save_conversation: give an output of generate"):
    dms_jax.save_conversation(tmp_path / "new", [])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "cache"
  dms_jax.save_conversation(path, talk(model, "paged", rows=(150, 2), capacity=100, prefill_chunk=64))
  return path


def test_another_model_or_policy_is_refused(model, saved):
  refused = lambda match, other=model, **options: pytest.raises(ValueError, match=match)
  for other, message in (
    (tiny.model(tiny.config(num_layers=3), DMSConfig(window=WINDOW)), "layers is 2 there and 3 here"),
    (tiny.model(tiny.config(num_kv_heads=4), DMSConfig(window=WINDOW)), "kv_heads is 2 there and 4 here"),
    (jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), "dtype is 'float32' there and 'bfloat16' here"),
    (tiny.model(), "policy: DMS needs eviction gates and this model has none"),
  ):
    with refused(message) as error:
      dms_jax.load_conversation(saved, other)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
  for options, message in (
    (dict(policy=policies.DMS(window=8)), "policy window is 3 there and 8 here"),
    (dict(policy=policies.TOVA(budget=9, window=WINDOW)), "policy is DMS there and TOVA here"),
    (dict(policy=policies.Quest(page=PAGE, budget=16)), "policy page is 0 there and 4 here"),
    (dict(cache="masked"), "cache='masked' cannot take what a 'paged' cache"),
    (dict(cache="paper"), "unknown cache 'paper'"),
    (
      dict(cache="contiguous", capacity=6),
      "row 0: a stored row of .* does not fit a cache of 2; give a larger capacity",
    ),
    (dict(capacity=5), "row 0: capacity=5 slots a head are too few pages"),
  ):
    with refused(message):
      dms_jax.load_conversation(saved, model, **options)
  assert dms_jax.load_conversation(saved, model, policy=policies.DMS(threshold=2.0)).policy.threshold == 2.0


def rewritten(source, target, change):
  """A copy of a saved cache whose header `change` has changed."""
  target.mkdir()
  header = json.loads((source / HEADER).read_text())
  change(header)
  (target / HEADER).write_text(json.dumps(header))
  (target / ROWS).write_bytes((source / ROWS).read_bytes())
  return target


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("format", 9, "written by dms_jax .*, schema 9; this version reads up to 2: pip install -U .*dms_jax"),
    ("format", True, "format True is no schema"),
    ("slots", "x", "field 'slots' is missing or not int"),
    ("rows", [], "field 'rows' is empty"),
    ("rows", [{"seen": 1}], r"rows\[0\] must have whole numbers"),
    ("archive", "int3", "archive='int3' is no type of numbers"),
    ("archive", "float64", r"array '0.pages' holds float32, expected float64"),
    ("page", 0, "field 'page' must be a positive whole number"),
    ("layers", -1, "field 'layers' is -1, not 0 to"),
    ("policy", {"name": "Nobody", "numbers": {}}, "policy: unknown policy 'Nobody'"),
    ("policy", {"name": "DMS", "numbers": {"treshold": 1}}, "policy: .*treshold"),
  ],
)
def test_a_damaged_header_is_one_line(model, saved, tmp_path, field, value, message):
  path = rewritten(saved, tmp_path / "bad", lambda header: header.update({field: value}))
  with pytest.raises(ValueError, match=message) as error:
    dms_jax.load_conversation(path, model)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_row_of_another_kind_gets_no_advice_on_its_size(model, saved, monkeypatch):
  read = files._read_rows
  shifted = lambda *args, **options: [dataclasses.replace(row, lag=7) for row in read(*args, **options)]
  monkeypatch.setattr(files, "_read_rows", shifted)
  for capacity in (None, 100):
    with pytest.raises(ValueError, match=r"row 0: a stored row with lag 7 does not fit a cache with 1$"):
      dms_jax.load_conversation(saved, model, capacity=capacity)


def test_damaged_arrays_are_one_line(model, saved, tmp_path):
  data = (saved / ROWS).read_bytes()
  at = data.index(b"0.pages.npy") + 300

  def broken(name, content):
    path = rewritten(saved, tmp_path / name, lambda header: None)
    (path / ROWS).write_bytes(content) if content is not None else (path / ROWS).unlink()
    return path

  for path, message in (
    (tmp_path / "nowhere", "no such folder"),
    (broken("missing", None), "rows.npz: no such file"),
    (broken("short", data[: len(data) // 2]), "damaged or cut short"),
    (broken("empty", b""), "damaged or cut short"),
    (broken("flipped", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]), "damaged or cut short .*CRC"),
    (rewritten(saved, tmp_path / "longer", lambda h: h["rows"][0].update(seen=2)), "array '0.kv' has shape"),
    (rewritten(saved, tmp_path / "more", lambda h: h["rows"].append(h["rows"][0])), "array '2.archived' must be int32"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      dms_jax.load_conversation(path, model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
  other = tmp_path / "other"
  other.mkdir()
  (other / HEADER).write_text("{}")
  with zipfile.ZipFile(other / ROWS, "w"), pytest.raises(ValueError, match="field 'format' is missing"):
    dms_jax.load_conversation(other, model)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda h: h.update(slots=10**12), "field 'slots' is 1000000000000, not 0 to"),
    (lambda h: h.update(slots=-3), "field 'slots' is -3"),
    (lambda h: h.update(window=2**40), "field 'window' is 1099511627776"),
    (lambda h: h.update(pages=2**30), "field 'pages' is 1073741824, for"),
    (lambda h: h.update(page=2**20), "field 'page' is 1048576"),
    (lambda h: h["rows"][0].update(seen=2**31), r"rows\[0\]: seen is 2147483648"),
    (lambda h: h["rows"][0].update(pending=10**6), r"rows\[0\]: pending is 1000000, not -1 to"),
    (lambda h: h["rows"][0].update(generated=-1), r"rows\[0\]: generated is -1"),
    (lambda h: h["rows"][0].update(seen=True), r"rows\[0\] must have whole numbers"),
    (lambda h: h.update(layers=True), "field 'layers' is missing or not int"),
    (lambda h: h.update(cache=[]), "field 'cache' is missing or not str"),
  ],
)
def test_edited_counts_allocate_nothing(model, saved, tmp_path, change, message):
  path = rewritten(saved, tmp_path / "edited", change)
  with pytest.raises(ValueError, match=message) as error:
    dms_jax.load_conversation(path, model)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_arrays_that_claim_more_than_the_file(model, saved, tmp_path):
  """A shape of terabytes, or a compressed array, is refused before it is read."""
  for name, write in (("shape", lambda: b"(2, 1099511627776, 16)"), ("compressed", None)):
    path = rewritten(saved, tmp_path / name, lambda header: None)
    with zipfile.ZipFile(saved / ROWS) as old, zipfile.ZipFile(path / ROWS, "w") as new:
      for entry in old.namelist():
        data = old.read(entry)
        if entry == "0.kv.npy" and write is not None:
          start, end = data.index(b"(", 20), data.index(b")", 20) + 1
          data = data[:start] + write() + data[end:].replace(b" " * (22 - (end - start)), b"", 1)
        new.writestr(entry, data, zipfile.ZIP_DEFLATED if write is None else zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match=r"claims .* bytes and has|is compressed") as error:
      dms_jax.load_conversation(path, model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_foreign_files_are_not_replaced(saved, tmp_path, model):
  past = dms_jax.load_conversation(saved, model)
  folder = rewritten(saved, tmp_path / "mine", lambda header: None)
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="not something this program wrote, or holds other files"):
    dms_jax.save_conversation(folder, past)
  assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("seed", [1, 9, 28])
def test_a_budget_gives_up_the_same_of_equal_tokens_however_a_turn_is_read(seed):
  """Equal tokens have equal gate logits in the first layer, but for the rounding of chunks of other sizes."""
  draw = random.Random(seed)
  model = tiny.model(tiny.config(vocab_size=257), tiny.dms(window=3, scale=100.0, offset=5.0))
  text = [draw.randrange(9) for _ in range(40)]
  policy = dms_jax.DMS(budget=12)
  read = lambda ids, past=None, chunk=8, new=0: dms_jax.generate(
    model, [ids], policy=policy, max_new_tokens=new, eos=False, continue_from=past, prefill_chunk=chunk,
    **({} if past else {"cache": "paged"}),
  )  # fmt: skip
  first = read(text[:19])
  found = [read(text, new=6), read(text, chunk=1, new=6), *(read(text[19:], first, chunk, 6) for chunk in (8, 1))]
  assert all(each.tokens == found[0].tokens for each in found)
  for each in found:
    np.testing.assert_allclose(each.logprobs[0], found[0].logprobs[0], atol=3e-5)  # float32 through two layers
