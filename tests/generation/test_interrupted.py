"""Generator: errors and interrupts at any of its calls lose no token, no text and no page."""

from __future__ import annotations

import jax
import pytest

from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.generation import decode as decoding
from dms_jax.generation import recording
from dms_jax.generation.batching import Generator
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import check_pages

SIZES = dict(width=4, page_size=4, prefill_chunk=8, decode_block=4, max_length=64, temperature=0.9, prefill_rows=2)
PAGES = dict(pages=200)
FEW = 34  # pages, in which not all requests begin together


class Boom(Exception):
  """What a callback raises."""


class Failing:
  """The byte tokenizer without its bytes: texts come from `decode`, whose call number `at` raises `error`."""

  def __init__(self, at=0, error=Boom, bad=None):
    inner = byte_tokenizer()
    self.encode, self.token_bytes, self.eos_token_ids = inner.encode, inner.token_bytes, ()
    self.inner, self.at, self.error, self.bad, self.calls = inner, at, error, bad, 0

  def decode(self, ids):
    self.calls += 1
    if self.calls == self.at or (self.bad is not None and self.bad in list(ids)):
      raise self.error("decode")
    return self.inner.decode(ids)


@pytest.fixture(scope="module")
def model():
  return tiny.model(tiny.config(vocab_size=257, num_layers=1), DMSConfig(window=3))


def served(model, tokenizer, disturb=lambda generator: None, pages=PAGES, stream=True):
  """(generator, news, errors) of six requests, three of which come late; after an error the loop steps on."""
  if "budget" in pages:
    empty = Generator(model, **SIZES).cache
    pages = {"budget": empty.fixed_bytes + pages["budget"] * empty.page_bytes}
  generator = Generator(model, tokenizer=tokenizer, stop=["e", "zq"], stream=stream, **SIZES, **pages)
  disturb(generator)
  news, errors = [], []
  for place in range(6):
    generator.submit([5 + place] * (3 + 4 * place), max_new_tokens=1 if place == 4 else 6 + place,
                     chains=1 + (place == 1), key=jax.random.key(place), keep=place == 2)  # fmt: skip
    if place == 2:
      step(generator, news, errors)
  for _ in range(400):
    if not generator.busy:
      break
    step(generator, news, errors)
    check_pages(generator.cache)
  assert not generator.busy and int(generator.cache.table.pool.count) == generator.cache.pages
  return generator, news, errors


def step(generator, news, errors):
  try:
    news += generator.step()
  except (Boom, KeyboardInterrupt) as error:
    errors.append(error)


def found(generator, news):
  """All that was recorded; what was streamed adds up to it."""
  results = {}
  for ticket, result in generator.results.items():
    for chain, tokens in enumerate(result.tokens):
      own = [(new, text) for t, c, new, text in news if (t, c) == (ticket, chain)]
      assert [token for new, _ in own for token in new] == tokens
      assert "".join(text for _, text in own) == result.text[chain]
      usage = result.usage[chain]
      counts = [usage.until(n) for n in range(len(tokens) + 1)], usage.prompt_reads
      results[ticket, chain] = tokens, result.logprobs[chain], result.text[chain], result.finish_reason[chain], counts
  return results


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_error_of_the_tokenizer_loses_nothing(model, error, stream):
  """Raised once, at each call in turn: the next step goes on, and all is as if nothing had happened."""
  tokenizer = Failing()
  expected = found(*served(model, tokenizer, stream=stream)[:2])
  for at in range(1, tokenizer.calls + 1, max(tokenizer.calls // 6, 1)):
    generator, news, errors = served(model, Failing(at, error), stream=stream)
    assert len(errors) == 1 and type(errors[0]) is error
    assert found(generator, news) == expected


# Calls on the way of a block: of an object of the generator, or of a module.
CALLS = {
  "decode_block": lambda generator: (decoding, "decode_block"),
  "settle": lambda generator: (generator.memory, "settle"),
  "free": lambda generator: (generator.memory, "free"),
  "offload": lambda generator: (generator.memory, "offload"),
  "fork_all": lambda generator: (generator.memory, "fork_all"),
  "read": lambda generator: (generator.reader, "_call"),
  "place": lambda generator: (generator.rows, "place"),
  "first_tokens": lambda generator: (generator.rows, "first_tokens"),
  "account": lambda generator: (recording, "account"),
  "made": lambda generator: (recording.Flight, "_made"),
  "write": lambda generator: (recording.Entry, "record"),
}


@pytest.mark.parametrize("pages", [PAGES, dict(budget=FEW)], ids=["many", "few"])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_loses_nothing(model, name, pages, monkeypatch):
  """Before some of the calls of each kind."""
  calls = [0]

  def interrupted(at):
    def disturb(generator):
      owner, attribute = CALLS[name](generator)
      call = getattr(owner, attribute)
      calls[0] = 0

      def raising(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
          raise KeyboardInterrupt
        return call(*args, **kwargs)

      patch.setattr(owner, attribute, raising)

    return disturb

  with monkeypatch.context() as patch:
    generator, news, _ = served(model, byte_tokenizer(), interrupted(0), pages)
  expected, total = found(generator, news), calls[0]
  assert total or (name, pages) == ("fork_all", dict(budget=FEW))
  for at in range(1, total + 1, max(total // 3, 1)):
    with monkeypatch.context() as patch:
      generator, news, errors = served(model, byte_tokenizer(), interrupted(at), pages)
    assert len(errors) == 1
    assert found(generator, news) == expected


def test_a_text_that_cannot_be_made_names_its_ticket(model):
  """The others' news come all the same; `cancel` lets them go on."""
  calm = served(model, byte_tokenizer())[0]
  token = calm.results[1].tokens[0][1]
  only = [n for n, result in calm.results.items() if not any(token in own for own in result.tokens)]
  generator = Generator(model, tokenizer=Failing(bad=token), **SIZES, **PAGES)
  with pytest.raises(Boom) as caught:
    generator.submit([6] * 7, max_new_tokens=7, chains=2, key=jax.random.key(1))
    generator.submit([5 + only[0]] * (3 + 4 * only[0]), max_new_tokens=6 + only[0], key=jax.random.key(only[0]))
    list(generator.run())
  assert any("ticket 0, chain" in note and "cancel(0)" in note for note in caught.value.__notes__)
  with pytest.raises(Boom):  # and again, until it is cancelled
    while generator.busy:
      generator.step()
  generator.cancel(0)
  list(generator.run())
  assert generator.results[0].finish_reason[0] == "cancelled" and token in generator.results[0].tokens[0]
  assert not generator.busy and generator.results[1].finish_reason == ["length"]
  assert int(generator.cache.table.pool.count) == generator.cache.pages


def test_a_loop_that_is_left_goes_on_in_the_next(model):
  """`run` after a loop that stopped, or whose body raised, yields what the first did not take."""
  generator, news = Generator(model, tokenizer=byte_tokenizer(), **SIZES, **PAGES), []
  for place in range(3):
    generator.submit([5 + place] * 4, max_new_tokens=9, key=jax.random.key(place))
  while generator.busy:
    try:
      for one in generator.run():
        news.append(one)
        if len(news) % 2:
          raise Boom
    except Boom:
      pass
  assert len(found(generator, news)) == 3
