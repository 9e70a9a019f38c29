"""Made-up documents whose end asks for what their middle said, to train on beside other text.

Ordinary text seldom needs a token from thousands of tokens ago, so gates that were trained on it alone may evict facts
that a later question needs. These documents hide facts in filler and end with questions and their answers, so that the
loss reaches the decisions about the facts:

| kind      | facts                                        | the end asks for                                |
| --------- | -------------------------------------------- | ----------------------------------------------- |
| `facts`   | "The amber kettle weighs 4,731 grams."       | some of the values, in another order            |
| `aliases` | names, cells or letters that copy another    | every name that holds one value                 |
| `records` | a table, as CSV, JSON lines or prose         | fields of some rows                             |
| `events`  | a log with times                             | who did something, and what came last           |
| `quotes`  | lines under a label                          | one of them, word by word                       |
| `dialogue`| what a user said about themselves, in turns  | some of it, in a later turn of the chat         |
| `code`    | constants and functions of a Python module   | values of theirs, in a session; see `code`      |

Wordings, names and fillers are this module's own; none is a benchmark's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dms_jax.disk import write_text
from dms_jax.retrofit.config import RecallTextConfig
from dms_jax.tokenizer import Tokenizer

COLOURS = (
  "amber azure beige black blue bronze brown copper coral crimson cream green grey indigo ivory jade lilac"
).split()
OBJECTS = (
  "almanac atlas barrel bell blanket bottle bowl brush bucket candle carpet chest clock compass crate drum engine "
  "flask flute globe hammer kettle ladder lantern lens locket magnet mirror needle oar pendulum plough prism quilt "
  "raft rope saddle scale shield sieve sledge spade statue teapot telescope trunk vase violin wagon wheel whistle"
).split()
NAMES = (
  "Adaeze Agnes Amir Anouk Bao Benita Caspian Chidi Dalia Darius Edda Emeka Farah Felix Greta Hana Idris Imke Jaro "
  "Jun Kaito Katja Lamar Leila Mateo Mirren Nadia Nils Oona Oskar Paola Pavel Quentin Rania Rasmus Sanna Selim "
  "Tariq Thea Ulla Viggo Wanda Xenia Yara Yusuf Zora"
).split()
PLACES = (
  "Aldbury Brenwick Calder Dunmore Eastmere Farley Glenrock Harrow Islay Jorvik Kelso Lorne Marden Norwell Oakham "
  "Penrith Quarley Rothes Selby Tarbet Ulverton Varnish Welby Yarrow"
).split()
VERBS = (
  "carried cleaned counted drew found fixed hid lent lost measured moved painted sold stored traded washed weighed"
).split()
TIMES = ("before dawn", "after lunch", "on Monday", "in the rain", "last spring", "at noon", "without a word", "twice")
MEASURES = {
  "weighs {} grams": "weight in grams of the {}", "costs {} crowns": "price in crowns of the {}",
  "has the serial number {}": "serial number of the {}", "was made in batch {}": "batch of the {}",
  "is kept on shelf {}": "shelf of the {}", "opens with code {}": "code of the {}",
}  # fmt: skip
PARAMETERS = "base cost depth first height last length limit offset rate size step total width".split()
TRAITS = {
  "favourite colour": COLOURS, "home town": PLACES, "sister's name": NAMES, "most treasured object": OBJECTS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recall:
  """A document before filler: `facts` in the order in which they appear, and its end.

  `messages` are instead turns of a chat, (role, text), whose filler goes between the first two and the last two. With
  `code` the filler is code, and lines of other texts are comments.
  """

  facts: tuple[str, ...] = ()
  end: str = ""
  messages: tuple[tuple[str, str], ...] = ()
  code: bool = False


def _sentence(rng: random.Random) -> str:
  """A sentence of filler."""
  who, what, where = rng.choice(NAMES), f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}", rng.choice(PLACES)
  did, when, article = rng.choice(VERBS), rng.choice(TIMES), "An" if what[0] in "aeiou" else "A"
  return rng.choice((
    f"{who} {did} the {what} {when}.", f"{when[0].upper()}{when[1:]}, someone in {where} {did} an old {what}.",
    f"There was no {what} left in {where}, or so {who} said.", f"Nobody in {where} remembers when {who} {did} it.",
    f"{article} {what} stood by the road to {where}.",
  ))  # fmt: skip


def _things(rng: random.Random, count: int) -> list[str]:
  pairs = rng.sample(range(len(COLOURS) * len(OBJECTS)), count)
  return [f"{COLOURS[i % len(COLOURS)]} {OBJECTS[i // len(COLOURS)]}" for i in pairs]


def facts(rng: random.Random) -> Recall:
  """Measures of made-up things, one of which is asked for."""
  count = rng.randint(2, 12)
  said, asked = zip(*rng.choices(list(MEASURES.items()), k=count), strict=True)
  things, values = _things(rng, count), [f"{n:{rng.choice(('', ','))}}" for n in rng.sample(range(100, 10**6), count)]
  told = [f"The {thing} {form.format(value)}." for thing, form, value in zip(things, said, values, strict=True)]
  order = rng.sample(range(count), rng.randint(1, min(count, 6)))
  pattern = rng.choice(("Q: What is the {}?\nA: {}\n", "{} = {}\n", "- {}: {}\n", "The {} is {}. "))
  return Recall(tuple(told), "\n" + "".join(pattern.format(asked[i].format(things[i]), values[i]) for i in order))


ALIASES = {  # the first of a chain, and each later one
  "let": ("let {} be {}.", "{} is the same as {}."), "code": ("{} = {}", "{} = {}"),
  "cell": ("Cell {} holds {}.", "Cell {} copies cell {}."),
  "house": ("{} chose the number {}.", "{} chose the same as {}."), "letters": ("{} := {}", "{} := {}"),
}  # fmt: skip
ANSWERS = ("All that equal {}: {}\n", "# value {}: {}\n", "Which have {}? {}.\n")


def aliases(rng: random.Random) -> Recall:
  """Chains of names, each of which copies the one before it; chains are mixed, the order within each stays.

  Half of the documents begin with a smaller example that is answered at once.
  """
  kind, pattern = rng.choice(list(ALIASES)), rng.choice(ANSWERS)
  made = _chains(rng, kind, pattern, rng.randint(1, 4), rng.randint(2, 7))
  if rng.random() < 0.5:
    example = _chains(rng, kind, pattern, 1, rng.randint(2, 5))
    return Recall(("\n".join(example.facts) + example.end, *made.facts), made.end)
  return made


def _chains(rng: random.Random, kind: str, pattern: str, chains: int, longest: int) -> Recall:
  """`chains` chains of `longest` names, some of them asked for."""
  count = chains * longest
  if kind == "cell":
    names = [f"{chr(65 + i % 26)}{i // 26 + 1}" for i in rng.sample(range(26 * 40), count)]
  elif kind == "house":
    names = rng.sample(NAMES, count)
  elif kind == "letters":  # of several tokens that belong to no word
    letters, size = rng.choice((string.ascii_lowercase, string.ascii_uppercase)), rng.randint(3, 6)
    names = list({"".join(rng.choices(letters, k=size)): None for _ in range(2 * count)})[:count]
  else:
    names = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}_{i // 676}" for i in rng.sample(range(26 * 26 * 30), count)]
  own = [names[i * longest : (i + 1) * longest] for i in range(chains)]
  values = rng.sample(range(10, 10**5), chains)
  first, later = ALIASES[kind]
  told = [
    [first.format(chain[0], value), *(later.format(new, old) for old, new in itertools.pairwise(chain))]
    for chain, value in zip(own, values, strict=True)
  ]
  left, mixed = [list(lines) for lines in told], []
  while any(left):
    mixed.append(rng.choice([lines for lines in left if lines]).pop(0))
  asked = rng.sample(range(chains), rng.randint(1, chains))
  return Recall(tuple(mixed), "\n" + "".join(pattern.format(values[i], ", ".join(own[i])) for i in asked))


def records(rng: random.Random) -> Recall:
  """A table of records; a field of one of them is asked for."""
  count, fields = rng.randint(4, 24), ["name", "town", "object", "number"]
  rows = [
    dict(name=name, town=rng.choice(PLACES), object=thing, number=str(rng.randint(100, 99999)))
    for name, thing in zip(rng.sample(NAMES, count), _things(rng, count), strict=True)
  ]
  form = rng.choice(("csv", "json", "prose"))
  if form == "csv":
    lines = [",".join(fields) + "\n" + ",".join(rows[0].values()), *(",".join(row.values()) for row in rows[1:])]
  elif form == "json":
    lines = [json.dumps(row) for row in rows]
  else:
    lines = [f"{r['name']} of {r['town']} owns the {r['object']} with the number {r['number']}." for r in rows]
  asked = [(row, rng.choice(fields[1:])) for row in rng.sample(rows, rng.randint(1, min(count, 5)))]
  return Recall(tuple(lines), "\n" + "".join(f"{field} of {row['name']}: {row[field]}\n" for row, field in asked))


def events(rng: random.Random) -> Recall:
  """A log of events with their times; the time of one is asked for."""
  count, minute = rng.randint(4, 20), rng.randint(0, 300)
  log = []
  for thing in _things(rng, count):
    minute += rng.randint(1, 50)
    log.append((f"{minute // 60:02d}:{minute % 60:02d}", rng.choice(NAMES), rng.choice(VERBS), thing))
  asked = rng.sample(log, rng.randint(1, 4))
  end = "".join(f"Who {verb} the {thing}? {who}, at {time}.\n" for time, who, verb, thing in asked)
  return Recall(tuple(f"[{time}] {who} {verb} the {thing}." for time, who, verb, thing in log),
                f"\n{end}The first entry was at {log[0][0]}, the last was by {log[-1][1]}.\n")  # fmt: skip


def quotes(rng: random.Random) -> Recall:
  """Letters from places; one of them is asked for word by word."""
  count = rng.randint(1, 4)
  quoted = {label: " ".join(_sentence(rng) for _ in range(rng.randint(1, 4))) for label in rng.sample(PLACES, count)}
  label = rng.choice(list(quoted))
  return Recall(tuple(f'The letter from {place} reads: "{text}"' for place, text in quoted.items()),
                f'\nTo repeat the letter from {label}: "{quoted[label]}"\n')  # fmt: skip


def dialogue(rng: random.Random) -> Recall:
  """A talk in which somebody tells traits of theirs; one is asked for."""
  traits = rng.sample(list(TRAITS), rng.randint(1, len(TRAITS)))
  values = {trait: rng.choice(TRAITS[trait]) for trait in traits}
  trait = rng.choice(traits)
  told = " ".join(f"My {name} is {value}." for name, value in values.items())
  return Recall(messages=(
    ("user", f"Please remember this. {told}"), ("assistant", "I will remember that."),
    ("user", f"What did I say my {trait} was?"), ("assistant", f"You said that your {trait} is {values[trait]}."),
  ))  # fmt: skip


def code(rng: random.Random) -> Recall:
  """A Python module and a session that reads some of its constants, defaults and parameters; it runs as it stands."""
  told, session = [], []
  for name in _identifiers(rng, rng.randint(2, 8)):
    value = rng.randint(100, 10**5)
    form = rng.choice(("constant", "default", "parameters"))
    if form == "constant":
      told.append(f"{name.upper()} = {value}")
      session.append(f">>> {name.upper()}\n{value}\n")
    elif form == "default":
      parameter = rng.choice(PARAMETERS)
      told.append(f"def {name}({parameter}={value}):\n    return {parameter}")
      session.append(f">>> {name}()\n{value}\n")
    else:
      taken = {parameter: rng.randint(1, 9) for parameter in rng.sample(PARAMETERS, rng.randint(2, 4))}
      told.append(f"def {name}({', '.join(taken)}):\n    return {' + '.join(taken)}")
      session.append(f">>> {name}({', '.join(f'{k}={v}' for k, v in taken.items())})\n{sum(taken.values())}\n")
  asked = rng.sample(session, rng.randint(1, min(len(session), 5)))
  return Recall(tuple(told), "\n" + "".join(asked), code=True)


def _identifiers(rng: random.Random, count: int) -> list[str]:
  return [thing.replace(" ", "_") for thing in _things(rng, count)]


def _function(rng: random.Random) -> str:
  """A function of filler; its name begins with a verb, as no name that `code` asks for does."""
  name, one, other = f"{rng.choice(VERBS)}_{_identifiers(rng, 1)[0]}", *rng.sample(PARAMETERS, 2)
  body = rng.choice((
    f"(items):\n    return [item for item in items if item.{one} > {rng.randint(2, 99)}]",
    f"({one}, {other}):\n    if {one} < {other}:\n        return {one}\n    return {other} - {one}",
    f"({one}):\n    for {other} in range({one}):\n        print({other}, {rng.randint(2, 99)})",
    f"({one}, *, {other}=None):\n    return {{'{one}': {one}, '{other}': {other} or {rng.randint(2, 99)}}}",
  ))  # fmt: skip
  head, colon, rest = body.partition(":\n")
  said = f'    """{_sentence(rng)}"""\n' if rng.random() < 0.5 else ""
  return f"def {name}{head}{colon}{said}{rest}"


KINDS: dict[str, Callable[[random.Random], Recall]] = {
  each.__name__: each for each in (facts, aliases, records, events, quotes, dialogue, code)
}


class Filler:
  """Pieces of text to hide facts in: sentences or functions of this module, or lines of other documents."""

  def __init__(self, texts: Sequence[str] = ()):
    self.lines = [line for text in texts for line in text.splitlines() if len(line.split()) > 3]

  def take(self, rng: random.Random, count: Callable[[str], int], tokens: int, code: bool = False) -> list[str]:
    """Pieces of about `tokens` tokens in all: half of the time neighbouring lines of the texts, if there are any.

    Args:
      code: pieces that may stand between statements of Python.
    """
    pieces: list[str] = []
    start = rng.randrange(len(self.lines)) if self.lines and rng.random() < 0.5 else None
    while tokens > 0:
      if start is not None:
        pieces.append(("# " if code else "") + self.lines[(start + len(pieces)) % len(self.lines)])
      elif code:
        pieces.append(_function(rng))
      else:
        pieces.append(" ".join(_sentence(rng) for _ in range(rng.randint(1, 6))))
      tokens -= count(pieces[-1])
    return pieces


def document(config: RecallTextConfig, tokenizer: Tokenizer, filler: Filler, number: int) -> dict:
  """Document `number` as a record with `text` or `messages`; it depends on the seed and its number alone.

  Its size is log-uniform within `config.tokens`, in tokens and about; what is hidden may need more.
  """
  rng = random.Random(f"{config.seed} {number}")
  size = round(config.tokens[0] * (config.tokens[1] / config.tokens[0]) ** rng.random())
  made = KINDS[config.kinds[number % len(config.kinds)]](rng)
  count = functools.lru_cache(maxsize=None)(lambda text: len(tokenizer.encode(text)))
  own = sum(map(count, made.facts)) + count(made.end) + sum(count(text) for _, text in made.messages)
  pieces = filler.take(rng, count, size - own, made.code)
  if made.messages:
    first, last = made.messages[:2], made.messages[2:]
    between: list[tuple[str, str]] = []
    while pieces:
      size = rng.randint(1, 4)
      taken, pieces = pieces[:size], pieces[size:]
      between += [("user", f"Here is some text. {' '.join(taken)}"), ("assistant", "Thank you, I have read it.")]
    return {"messages": [{"role": role, "content": text} for role, text in (*first, *between, *last)]}
  gaps = range(len(pieces) + 1)
  block = rng.random() < 0.3  # facts in one place, as a table would be
  places = [rng.choice(gaps)] * len(made.facts) if block else sorted(rng.choices(gaps, k=len(made.facts)))
  for before, (place, fact) in enumerate(zip(places, made.facts, strict=True)):
    pieces.insert(place + before, fact)
  return {"text": rng.choice(("\n", "\n\n")).join(pieces) + made.end}


def write(
  tokenizer: Tokenizer, config: RecallTextConfig, path: str | Path, *, filler: Sequence[str] = (),
  progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> None:  # fmt: skip
  """Writes `config.rows` documents to the .jsonl file `path`, atomically.

  Args:
    filler: texts in whose lines half of the documents hide their facts; the others have sentences of this module.

  Raises:
    ValueError: there are no rows, or `dialogue` is among the kinds by name and the tokenizer has no chat template; by
      default it is then left out.
  """
  if not config.rows:
    raise ValueError("recall_text.rows=0: say how many documents to write")
  if "dialogue" in config.kinds and not tokenizer.settings.get("chat_template"):
    if config.kinds != RecallTextConfig().kinds:
      raise ValueError("recall_text.kinds=dialogue needs a tokenizer with a chat template")
    config = dataclasses.replace(config, kinds=tuple(kind for kind in config.kinds if kind != "dialogue"))
  lines = Filler(filler)
  made = (document(config, tokenizer, lines, number) for number in progress(range(config.rows)))
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  write_text(Path(path), "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in made))
