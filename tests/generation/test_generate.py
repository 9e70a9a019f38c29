"""generate: every cache against the mask, independent rows, turns, stops, growth, refusals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import testing as tiny
from dms_jax.cache import ContiguousCache, PagedCache, base
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.policies import DMS, Vanilla
from tests.programs import read

WINDOW, NEW = 5, 20
SMALL = dict(prefill_chunk=8, decode_block=8, capacity=64)  # one shape for most tests: compiling is what takes time
SLOTS = {**SMALL, "cache": "contiguous"}  # every head has the room that is asked about
GROWING = {**SLOTS, "capacity": None}


@dataclasses.dataclass(frozen=True, eq=False)
class Letters:
  """A tokenizer of many-letter pieces: id i is a word over "abcd", the last id is the end."""

  pieces: tuple[bytes, ...]
  adds_bos = False

  @classmethod
  def create(cls, vocab: int) -> Letters:
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("abcd"), rng.integers(1, 4))) for _ in range(vocab - 1)]
    return cls((*(w.encode() for w in words), b""))

  eos_token_ids = property(lambda self: (len(self.pieces) - 1,))
  decode = lambda self, ids: b"".join(self.pieces[i] for i in ids).decode()
  token_bytes = lambda self: list(self.pieces)
  encode = lambda self, text: [self.pieces.index(ch.encode()) for ch in text]


@pytest.fixture(scope="module")
def model():
  return fastest_form(tiny.model(gates=tiny.dms(window=WINDOW)))


@pytest.fixture(scope="module")
def shallow():
  """One layer, for what does not depend on how many there are."""
  return fastest_form(tiny.model(tiny.config(num_layers=1), tiny.dms(window=WINDOW)))


def prompt(length: int, seed: int = 0) -> list[int]:
  return tiny.tokens(tiny.config(), 1, length, seed).tolist()[0]


def oracle(model, ids: list[int], new: int, threshold: float | None = 0.0):
  """Logits after each of the last `new` tokens, the whole text under the mask at once; None evicts nothing."""
  return read(model, [ids], threshold)[0][0, len(ids) - new :]


def log_softmax(x):
  x = x.astype(np.float64)
  return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["contiguous", "masked", "paged"])
@pytest.mark.parametrize("policy", [DMS(), DMS(threshold=-3.0), Vanilla(window=WINDOW)], ids=["dms", "lower", "dense"])
def test_equals_the_mask(model, kind, policy):
  prompts = [prompt(n, seed=n) for n in (1, 19, 8)]
  out = dms_jax.generate(model, prompts, policy=policy, max_new_tokens=NEW, eos=False, cache=kind, **SMALL)
  threshold = policy.threshold if isinstance(policy, DMS) else None
  for ids, tokens, logprobs in zip(prompts, out.tokens, out.logprobs, strict=True):
    assert len(tokens) == len(logprobs) == NEW
    want = oracle(model, ids + tokens[:-1], NEW, threshold)
    assert want.argmax(-1).tolist() == tokens
    # float32 through two layers; the sums run in another order
    np.testing.assert_allclose(logprobs, log_softmax(want)[np.arange(NEW), tokens], atol=2e-5)
  assert out.finish_reason == ["length"] * 3 and out.text is None


def test_bfloat16_follows_the_mask(model):
  model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
  ids = prompt(19, seed=19)
  prompts = [ids, prompt(3), prompt(4)]
  for kind in ("contiguous", "masked", "paged"):
    out = dms_jax.generate(model, prompts, policy=Vanilla(), max_new_tokens=NEW, eos=False, cache=kind, **SMALL)
    want = log_softmax(oracle(model.replace(dms=None), ids + out.tokens[0][:-1], NEW, None))
    np.testing.assert_allclose(out.logprobs[0], want[np.arange(NEW), out.tokens[0]], atol=0.1)  # 8 bits of mantissa


def test_a_row_is_bit_equal_whatever_its_neighbours_place_or_pauses(model):
  keys = jax.random.split(jax.random.key(1), 6)
  settings = dict(temperature=1.5, top_k=30, top_p=0.9, eos=False, **SMALL)
  mine = prompt(11, seed=1)
  first = dms_jax.generate(model, [mine, prompt(3), prompt(17)], key=keys[:3], max_new_tokens=NEW, **settings)
  other = [prompt(20, seed=8), prompt(1, seed=9), mine]
  moved = dms_jax.generate(model, other, key=jnp.stack([keys[4], keys[5], keys[0]]), max_new_tokens=NEW, **settings)
  assert moved.tokens[2] == first.tokens[0] and moved.logprobs[2] == first.logprobs[0]
  assert len(set(first.tokens[0])) > 10  # sampled indeed

  pieces, part = [[], []], None
  for new in (7, 1, 12):
    prompts = [mine, prompt(9), prompt(2)] if part is None else None
    part = dms_jax.generate(model, prompts, key=keys[:3], max_new_tokens=new, continue_from=part, **settings)
    pieces[0] += part.tokens[0]
    pieces[1] += part.logprobs[0]
  assert pieces[0] == first.tokens[0] and pieces[1] == first.logprobs[0]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_row_does_not_feel_how_large_its_neighbours_make_the_cache(model, kind):
  settings = dict(max_new_tokens=9, eos=False, prefill_chunk=64, decode_block=8, cache=kind)
  alone = dms_jax.generate(model, [prompt(70), prompt(1)], **settings)
  beside = dms_jax.generate(model, [prompt(70), prompt(400, seed=4)], **settings)
  assert beside.conversation.cache.nbytes > alone.conversation.cache.nbytes
  assert beside.tokens[0] == alone.tokens[0] and beside.logprobs[0] == alone.logprobs[0]


def test_pages_are_the_default_where_heads_may_differ(shallow):
  of = lambda policy: type(
    dms_jax.generate(shallow, [prompt(8)], policy=policy, max_new_tokens=0, prefill_chunk=8).conversation.cache
  )
  assert of(None) is of(dms_jax.DMS()) is PagedCache
  assert of(dms_jax.Vanilla()) is of(dms_jax.StreamingLLM(budget=8)) is ContiguousCache


def test_one_key_gives_each_row_its_own(model):
  out = dms_jax.generate(model, [prompt(5)] * 3, key=jax.random.key(0), temperature=2.0, max_new_tokens=9, **SMALL)
  assert len({tuple(t) for t in out.tokens}) == 3


def test_padded_matrix_equals_lists(model):
  rows = [prompt(3), prompt(10, seed=2), prompt(6, seed=3)]
  want = dms_jax.generate(model, rows, max_new_tokens=6, eos=False, **SMALL)
  for side in ("left", "right"):
    ids, mask = np.full((3, 10), 96), np.zeros((3, 10), bool)
    for b, row in enumerate(rows):
      where = slice(10 - len(row), None) if side == "left" else slice(len(row))
      ids[b, where], mask[b, where] = row, True
    got = dms_jax.generate(model, ids, mask=mask, max_new_tokens=6, eos=False, **SMALL)
    assert got.tokens == want.tokens and got.logprobs == want.logprobs
  full = dms_jax.generate(model, np.array([rows[1]]), max_new_tokens=6, eos=False, **SMALL)
  assert full.tokens == dms_jax.generate(model, rows[1], max_new_tokens=6, eos=False, **SMALL).tokens  # one row of ids


@pytest.mark.parametrize("kind", ["contiguous", "masked", "paged"])
def test_turns_equal_one_long_text(model, kind):
  turns = [[prompt(n, seed=n) for n in lengths] for lengths in ((9, 2, 1), (4, 12, 1), (1, 1, 9))]
  past, texts = None, [[], [], []]
  for turn in turns:
    kept = None if past is None else jax.device_get(past.conversation)
    out = dms_jax.generate(model, turn, continue_from=past, max_new_tokens=7, eos=False, cache=kind, **SMALL)
    if past is not None:  # copied, not consumed
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(past.conversation), kept)
    for b in range(3):
      texts[b] += turn[b] + out.tokens[b]
    past = out
  np.testing.assert_array_equal(out.metrics.seen, [len(t) - 1 for t in texts])
  for b in range(3):
    want = oracle(model, texts[b][:-1], 7)
    assert want.argmax(-1).tolist() == out.tokens[b]
    np.testing.assert_allclose(out.logprobs[b], log_softmax(want)[np.arange(7), out.tokens[b]], atol=2e-5)
  long = dms_jax.generate(model, [t[:-7] for t in texts], max_new_tokens=7, eos=False, cache=kind, **SMALL)
  assert long.tokens == out.tokens
  np.testing.assert_array_equal(long.metrics.live, out.metrics.live)


def test_reading_first_and_asking_later(model):
  ids = prompt(14)
  read = dms_jax.generate(model, [ids[:9]], max_new_tokens=0, **SMALL)
  assert read.tokens == [[]] and read.metrics.seen.tolist() == [9] and read.metrics.kv_reads == 0
  asked = dms_jax.generate(model, [ids[9:]], continue_from=read, max_new_tokens=5, eos=False, **SMALL)
  assert asked.tokens == dms_jax.generate(model, [ids], max_new_tokens=5, eos=False, **SMALL).tokens
  with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
    dms_jax.generate(model, continue_from=read, **SMALL)


def test_growing_changes_nothing(shallow, monkeypatch):
  prompts = [prompt(30), prompt(7, seed=1), prompt(1)]
  fixed = dms_jax.generate(shallow, prompts, max_new_tokens=NEW, eos=False, **SLOTS)
  grown = []
  original = ContiguousCache.grow
  monkeypatch.setattr(base, "SLOTS", 4)
  monkeypatch.setattr(base, "GROWTH", 1.1)
  monkeypatch.setattr(ContiguousCache, "grow", lambda self, slots: grown.append(slots) or original(self, slots))
  out = dms_jax.generate(shallow, prompts, max_new_tokens=NEW, eos=False, **GROWING)
  assert len(grown) >= 2 and grown == sorted(grown) and grown[-1] <= 52  # 30 + 20 - 1 tokens, a multiple of 4
  assert out.tokens == fixed.tokens
  np.testing.assert_allclose(out.logprobs, fixed.logprobs, atol=2e-5)
  np.testing.assert_array_equal(out.metrics.live, fixed.metrics.live)
  assert out.conversation.cache.kv.shape[3] == grown[-1]


def test_a_full_fixed_cache_loses_nothing(shallow):
  prompts = [prompt(12), prompt(4, seed=1)]
  whole = dms_jax.generate(shallow, prompts, max_new_tokens=40, eos=False, **SLOTS)
  most = int(whole.metrics.live.max(axis=(0, 2))[0])
  out = dms_jax.generate(shallow, prompts, max_new_tokens=40, eos=False, **{**SLOTS, "capacity": most - 4})
  assert out.finish_reason[0] == "capacity" and 0 < len(out.tokens[0]) < 40
  np.testing.assert_array_equal(out.metrics.seen, np.array([12, 4]) + [len(t) - 1 for t in out.tokens])
  assert all(w[: len(t)] == t for w, t in zip(whole.tokens, out.tokens, strict=True))
  row = 40 - len(out.tokens[0])
  more = dms_jax.generate(shallow, continue_from=out, max_new_tokens=row, eos=False, **SLOTS)
  assert out.tokens[0] + more.tokens[0] == whole.tokens[0]
  # A conversation is copied, not consumed, also where its copy grows: it can be continued again.
  larger = dms_jax.generate(
    shallow, continue_from=out, max_new_tokens=row, eos=False, **{**SLOTS, "capacity": most + 8}
  )
  again = dms_jax.generate(shallow, continue_from=out, max_new_tokens=row, eos=False, **SLOTS)
  assert larger.tokens[0] == again.tokens[0] == more.tokens[0]


def test_a_prompt_that_is_compressed_fits_a_small_cache_by_single_tokens(shallow):
  ids = prompt(40)
  whole = dms_jax.generate(shallow, [ids], max_new_tokens=1, **SLOTS)
  slots = int(whole.metrics.live.max())
  assert slots < 40
  tight = dms_jax.generate(shallow, [ids], max_new_tokens=1, **{**SLOTS, "capacity": slots})
  assert tight.tokens == whole.tokens
  np.testing.assert_array_equal(tight.metrics.live, whole.metrics.live)
  with pytest.raises(ValueError, match=rf"prompts\[0\]: \d+ of 40 tokens fill capacity={slots - 1}"):
    dms_jax.generate(shallow, [ids], max_new_tokens=1, **{**SLOTS, "capacity": slots - 1})


@functools.cache  # one model for all: programs are traced once for a tokenizer
def with_letters():
  cfg = tiny.config(num_layers=1)
  return fastest_form(tiny.model(cfg, tiny.dms()).replace(tokenizer=Letters.create(cfg.vocab_size)))


def test_stop_strings_end_at_the_right_token():
  model, key = with_letters(), jax.random.key(2)
  settings = dict(key=key, temperature=1.5, max_new_tokens=24, **SMALL)
  prompts = [prompt(6), prompt(13, seed=1), prompt(2, seed=2)]
  free = dms_jax.generate(model, prompts, eos=False, **settings)
  stop = [free.text[0][17:21], free.text[2][9:14]]  # begin and end anywhere in tokens
  out = dms_jax.generate(model, prompts, eos=False, stop=stop, **settings)
  assert "stop" in out.finish_reason
  for b, tokens in enumerate(free.tokens):
    texts = [model.tokenizer.decode(tokens[: n + 1]) for n in range(len(tokens))]
    end = next((n for n, t in enumerate(texts) if any(s in t for s in stop)), None)
    assert out.tokens[b] == tokens[: None if end is None else end + 1]
    assert out.logprobs[b] == free.logprobs[b][: len(out.tokens[b])]
    assert out.finish_reason[b] == ("length" if end is None else "stop")
    assert out.metrics.seen[b] == len(prompts[b]) + len(out.tokens[b]) - 1  # nothing past the stop was fed
    assert not any(s in out.text[b] for s in stop)
    if end is not None:
      rest = texts[end][len(out.text[b]) :]
      assert texts[end].startswith(out.text[b]) and rest.startswith(tuple(stop))
  single = dms_jax.generate(model, prompts, eos=False, stop=stop[0], **settings)
  assert single.finish_reason[0] == "stop"


def test_end_of_text():
  """Ids that are given, and those of the model's config; the rows and settings of the test above."""
  model = with_letters()
  settings = dict(key=jax.random.key(2), temperature=1.5, max_new_tokens=24, **SMALL)
  prompts = [prompt(6), prompt(13, seed=1), prompt(2, seed=2)]
  free = dms_jax.generate(model, prompts, eos=False, **settings)
  ids = free.tokens[0][9], free.tokens[1][5]
  named = model.replace(config=dataclasses.replace(model.config, eos_token_ids=ids))
  for eos, changed in ((list(ids), model), (True, named)):
    out = dms_jax.generate(changed, prompts, eos=eos, **settings)
    assert out.finish_reason[:2] == ["eos", "eos"]
    for whole, tokens, reason in zip(free.tokens, out.tokens, out.finish_reason, strict=True):
      end = next((n for n, token in enumerate(whole) if token in ids), None)
      assert tokens == whole[: None if end is None else end + 1]
      assert reason == ("length" if end is None else "eos")


@pytest.mark.parametrize("stop", [(), ("ab", "cda", "bbbb")])
def test_streaming_adds_up(stop):
  model = with_letters()
  got = {b: ([], "") for b in range(3)}

  def stream(row, tokens, text):
    assert tokens or text
    got[row] = (got[row][0] + tokens, got[row][1] + text)

  out = dms_jax.generate(
    model, [prompt(6), prompt(13, seed=1), prompt(2, seed=2)], stop=stop, key=jax.random.key(5), temperature=1.5,
    max_new_tokens=20, eos=False, stream=stream, **{**SMALL, "decode_block": 2},
  )  # fmt: skip
  assert [got[b][0] for b in range(3)] == out.tokens
  assert [got[b][1] for b in range(3)] == out.text


def test_characters_cut_by_tokens_are_streamed_whole():
  from dms_jax.tokenizer import byte_tokenizer

  cfg = tiny.config(num_layers=1, vocab_size=257)
  model = tiny.model(cfg).replace(tokenizer=byte_tokenizer())
  pieces = []
  out = dms_jax.generate(
    model, ["né", "…"], max_new_tokens=30, key=jax.random.key(0), temperature=3.0, eos=False,
    stream=lambda row, tokens, text: pieces.append((row, text)), prefill_chunk=8, decode_block=4,
  )  # fmt: skip
  for row in range(2):
    assert "".join(t for r, t in pieces if r == row) == out.text[row]


def test_strings_and_later_turns():
  model = with_letters()
  tokenizer = model.tokenizer
  ids = tokenizer.encode("abca")
  assert dms_jax.generate(model, "abca", max_new_tokens=4, **SMALL).tokens == (
    dms_jax.generate(model, [ids], max_new_tokens=4, **SMALL).tokens
  )
  bare = model.replace(tokenizer=None)
  named = dms_jax.generate(bare, ["abca", "d"], tokenizer=tokenizer, max_new_tokens=4, **SMALL)
  assert named.text == [tokenizer.decode(t) for t in named.tokens]


def test_decode_is_traced_once_a_shape(shallow, monkeypatch):
  traces = []
  original = decoding.cached_forward

  def counted(model, policy, cache, tokens, lengths, **rest):
    traces.append(tokens.shape)
    return original(model, policy, cache, tokens, lengths, **rest)

  monkeypatch.setattr(decoding, "cached_forward", counted)
  settings = dict(
    max_new_tokens=11, eos=False, capacity=40, prefill_chunk=7, decode_block=3
  )  # shapes of this test alone
  for threshold in (0.0, 1.0, -2.0):
    out = dms_jax.generate(shallow, [prompt(9), prompt(5)], policy=DMS(threshold=threshold), **settings)
  dms_jax.generate(shallow, continue_from=out, **settings)
  assert traces == [(2, 7), (2, 1)]
  for temperature in (0.5, 0.7):
    dms_jax.generate(shallow, [prompt(9), prompt(5)], temperature=temperature, key=jax.random.key(0), **settings)
  assert traces == [(2, 7), (2, 1), (2, 1)]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_texts_of_about_one_length_share_what_is_compiled(shallow, monkeypatch, kind):
  traces, original = [], decoding.cached_forward
  monkeypatch.setattr(
    decoding, "cached_forward", lambda *args, **rest: traces.append(args[3].shape) or original(*args, **rest)
  )
  settings = dict(eos=False, prefill_chunk=6, decode_block=5, cache=kind)  # shapes of this test alone
  dms_jax.generate(shallow, [prompt(100), prompt(5)], max_new_tokens=30, **settings)
  first = list(traces)
  dms_jax.generate(shallow, [prompt(70), prompt(33)], max_new_tokens=41, **settings)
  assert first and traces == first


def test_nothing_is_compiled_twice(shallow, caplog):
  placed = jax.device_put(shallow, jax.devices()[0])  # as a checkpoint's weights are
  settings = dict(
    max_new_tokens=11, eos=False, capacity=48, prefill_chunk=7, decode_block=3
  )  # shapes of this test alone
  with jax.log_compiles():
    out = dms_jax.generate(placed, [prompt(19)], **settings)
    dms_jax.generate(placed, [prompt(3)], continue_from=out, **settings)
  compiled = [r.getMessage().split(" with ")[0] for r in caplog.records if r.getMessage().startswith("Compiling")]
  for name in ("prefill_chunk", "decode_block"):
    assert compiled.count(f"Compiling jit({name})") == 1, compiled
  assert compiled.count("Compiling jit(first_token)") <= 1  # its shapes are those of other tests too


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decode_block_needs_no_second_cache(dtype):
  from dms_jax import cache as caches

  model = fastest_form(tiny.model(gates=tiny.dms(), dtype=dtype))
  cache = caches.create("contiguous", model.config, batch=2, capacity=32768, window=5, lag=1, dtype=dtype)
  zeros = jnp.zeros(2, jnp.int32)
  rows = decoding.DecodeState(zeros, None, zeros, zeros + 9, zeros, zeros)
  compiled = decoding.decode_block.lower(
    model,
    DMS(window=5),
    cache,
    rows,
    dms_jax.generation.sampling.Sampling(),
    decoding.StopCriteria(zeros),
    steps=8,
    history=False,
  ).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 0.01 * cache.kv.nbytes
  assert memory.alias_size_in_bytes >= cache.kv.nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_chunk_needs_no_second_cache(kind, dtype):
  """XLA reads a layer's archive out for the chunk's queries, three times over in bfloat16; never that of 32 layers."""
  from dms_jax import cache as caches

  config = tiny.config(num_layers=32)
  model = jax.eval_shape(lambda: tiny.model(config, tiny.dms(), dtype=dtype))
  make = functools.partial(caches.create, kind, config, batch=4, capacity=4096, window=5, lag=1, dtype=dtype)
  cache, row = jax.eval_shape(make), jax.ShapeDtypeStruct((4,), jnp.int32)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  compiled = decoding.prefill_chunk.lower(
    model, DMS(window=5), cache, jax.ShapeDtypeStruct((4, 16), jnp.int32), row, row,
    jax.ShapeDtypeStruct((4, config.vocab_size), jnp.float32),
  ).compile()  # fmt: skip
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 0.2 * size, f"{memory.temp_size_in_bytes:,} bytes beside {size:,}"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(prompts=[]), "there are none"),
    (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
    (dict(prompts=[[1, 97]]), r"prompts\[0\] has token ids outside 0..96"),
    (dict(prompts=[[-1]]), "outside"),
    (dict(prompts="text"), "need a tokenizer"),
    (dict(prompts=None), "nothing to generate from"),
    (dict(stop="x"), "stop strings need a tokenizer"),
    (dict(temperature=1.0), "needs key="),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(prefill_chunk=0), "prefill_chunk=0"),
    (dict(decode_block=0), "decode_block=0"),
    (dict(max_new_tokens=2048, capacity=None), "max_position_embeddings=2048"),
    (dict(capacity=0, max_new_tokens=4), "capacity=0"),
    (dict(cache="masked", capacity=9, max_new_tokens=8), "capacity=9"),
    (dict(policy=Vanilla(), capacity=9, max_new_tokens=8), "capacity=9"),
    (dict(policy=DMS(window=-1)), "window=-1"),
    (dict(cache="paper"), "unknown cache 'paper'"),
    (dict(prompts=np.zeros((2, 3), int), mask=np.ones((2, 2))), "mask"),
  ],
)
def test_refused_before_any_work(model, monkeypatch, arguments, message):
  monkeypatch.setattr(decoding, "prefill_chunk", lambda *args: pytest.fail("work was begun"))
  with pytest.raises(ValueError, match=message):
    dms_jax.generate(model, **{"prompts": [[1, 2]], **SMALL, **arguments})


def test_what_does_not_continue_is_refused(model):
  past = dms_jax.generate(model, [[1, 2, 3]], max_new_tokens=3, **SMALL)
  with pytest.raises(ValueError, match="conversation to continue has 1 rows"):
    dms_jax.generate(model, [[1], [2]], continue_from=past, **SMALL)
  with pytest.raises(ValueError, match="window=3, but the conversation has window=5"):
    dms_jax.generate(model, [[1]], continue_from=past, policy=DMS(window=3), **SMALL)
  with pytest.raises(ValueError, match="capacity=8 is below"):
    dms_jax.generate(model, [[1]], continue_from=past, **{**SMALL, "capacity": 8})
  with pytest.raises(ValueError, match="load a retrofit"):
    dms_jax.generate(tiny.model(), [[1]], policy=DMS(), **SMALL)
