"""Text to token ids and back, and chat templates, based on Hugging Face's `tokenizers`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dms_jax import chat
from dms_jax.json_files import HALF_PAIR, damage, has_half_pair, read_file, read_json, shown

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"  # newer checkpoints; older ones have the template in the settings
LONG = 1 << 16  # characters, which take about 0.2 s
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True, eq=False)  # identity: a model carries it as a static field
class Tokenizer:
  """A `tokenizers.Tokenizer` and the content of tokenizer_config.json (special tokens, chat template)."""

  backend: tokenizers.Tokenizer
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def load(cls, path: str | Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint or Hugging Face directory, as transformers' class of any fast tokenizer does.

    A special or added token that only the files beside tokenizer.json name is added to the vocabulary.

    Raises:
      ValueError: there is no tokenizer, or a file is damaged or holds a value of another type.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE
    if not file.is_file():
      raise ValueError(
        f"{path}: no {TOKENIZER_FILE} there, so text cannot be tokenized; convert the model with its own"
      )
    content = read_file(file)
    with _clear_errors(f"{file}: not a tokenizer", damage(content)):
      backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    _check_bounds(file, backend)
    settings = read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}
    beside = path / (SETTINGS_FILE if settings else TOKENIZER_FILE)
    _check_settings(beside, settings)
    added = settings.get("added_tokens_decoder")
    if added is None:  # older directories have files of their own, which then decide
      if (path / SPECIAL_FILE).exists():
        special = read_json(path / SPECIAL_FILE)
        beside = path / SPECIAL_FILE
        _check_settings(beside, special)
        settings = {**settings, **special}
      added = _older_added(path / ADDED_FILE, settings) if (path / ADDED_FILE).exists() else {}
    if (path / TEMPLATE_FILE).exists():
      try:
        settings["chat_template"] = read_file(path / TEMPLATE_FILE).decode("utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"{path / TEMPLATE_FILE}: not UTF-8 text ({error})") from None
    for name in ("add_bos_token", "add_eos_token"):
      settings.pop(name, None)
    if backend.padding is not None:
      settings.setdefault("pad_token", backend.padding["pad_token"])
    backend.no_truncation()  # both are for batches of fixed length; prompts are whole and have no padding
    backend.no_padding()
    _add_tokens(beside, backend, settings, added)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    tokenizer = cls(backend, settings)
    with _clear_errors(f"{file}: no text can be tokenized", "the file is damaged"):
      backend.decode(tokenizer.encode(" a"))
    return tokenizer

  def save(self, path: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (template included) into directory `path`."""
    path = Path(path)
    # The library cannot save where the locale has no name for the path.
    (path / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(self.settings, indent=2, ensure_ascii=False)
    (path / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

  def encode(self, text: str, continues: bool = False) -> list[int]:
    """The token ids of a text, after the tokens that the tokenizer puts before texts, such as BOS.

    They are not doubled if the text itself starts with them. The text of a special token becomes that token. No end
    token is added. A text that `continues` another gets no BOS.

    Raises:
      ValueError: it is no text, or holds half of a surrogate pair, which is no character.
    """
    try:
      with _clear_errors("the tokenizer fails on this text"):
        if (
          isinstance(text, str) and len(text) > LONG
        ):  # `encode` holds Python's lock: no thread runs, no Ctrl-C is seen
          ids = self.backend.encode_batch([text], add_special_tokens=False)[0].ids
        else:
          ids = self.backend.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError):
      raise ValueError(_no_text(text)) from None
    first = [] if continues else self.prefix_ids
    return ids if ids[: len(first)] == first else [*first, *ids]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text of `ids`. `skip_special` leaves out special tokens. Bytes that are not UTF-8 become U+FFFD.

    Raises:
      ValueError: an id is negative or beyond 32 bits. Other ids outside the vocabulary have no text.
    """
    text = self.raw_text(ids, skip_special)
    return clean(text) if self.cleans else text

  def raw_text(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text of `ids` before `clean`."""
    try:
      return self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special)
    except OverflowError:
      raise ValueError(f"ids: {min(ids)} to {max(ids)} must lie in 0..{self.vocab_size - 1}") from None

  def chat(self, messages: list[dict], add_generation_prompt: bool = True, **arguments: Any) -> str:
    """The text of a conversation in the model's chat template; a message is {"role": ..., "content": ...}.

    Args:
      arguments: variables of the template, such as `enable_thinking=False` for Qwen3, `tools` or `documents`.

    Raises:
      ValueError: the tokenizer has no template, or the template refuses the messages, fails, or does not end.
    """
    if (template := self._template) is None:
      raise ValueError("this tokenizer has no chat template: it belongs to a base model; pass plain text instead")
    if not isinstance(messages, list | tuple):
      raise ValueError(f"messages={messages!r:.80} must be a list of messages")
    tokens = {name: self._special(name) for name in self.settings if name.endswith("_token")}
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    return chat.render(template, {**given, **{n: text for n, text in tokens.items() if text is not None}, **arguments})

  def token_bytes(self) -> list[bytes]:
    """The bytes of each token id. A special token has the bytes of its name; an unused id has none.

    A SentencePiece model or a vocabulary of whole words also drops the first space of a whole text, which belongs to no
    token.
    """
    pieces = [b""] * self.vocab_size
    added = self.backend.get_added_tokens_decoder()
    decoder = _decoder(self.backend)
    byte_level = _uses_byte_level(self.backend)
    for piece, index in self.backend.get_vocab(with_added_tokens=True).items():
      if index in added and (added[index].special or not byte_level):
        pieces[index] = added[index].content.encode()
      elif byte_level:
        pieces[index] = _bytes_of_chars(piece)
      elif _is_byte(piece):
        pieces[index] = bytes([int(piece[3:5], 16)])
      else:
        pieces[index] = _spaced(piece, decoder).encode()
    return pieces

  @functools.cached_property
  def byte_pieces(self) -> list[bytes] | None:
    """The bytes that each id adds to a text, none for special tokens; None if texts are not just bytes joined.

    The text of ids is then that of their bytes, as UTF-8.
    """
    if self.cleans or _settings(self.backend.decoder).get("type") != "ByteLevel":
      return None
    pieces = self.token_bytes()
    for index in self.hidden_ids:
      pieces[index] = b""
    return pieces

  @functools.cached_property
  def hidden_ids(self) -> frozenset[int]:
    """Ids of special tokens, which `decode` leaves out."""
    return frozenset(index for index, token in self.backend.get_added_tokens_decoder().items() if token.special)

  @property
  def cleans(self) -> bool:
    """Whether `decode` ends with `clean`. The settings decide; for a BPE model they must do so explicitly."""
    bpe = isinstance(self.backend.model, models.BPE)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return bool(self.settings.get("clean_up_tokenization_spaces")) and (not bpe or bool(self.settings.get(forced)))

  @functools.cached_property
  def fallback_ids(self) -> frozenset[int]:
    """Ids of byte tokens such as `<0x0A>` and of special tokens: later tokens may change the text of a run of them.

    A run of byte tokens decodes to characters only if the whole run is valid UTF-8; special tokens do not end a run.
    The set is empty if the vocabulary has no byte tokens. In a byte-level vocabulary every token has bytes of its own.
    """
    added = self.backend.get_added_tokens_decoder()
    vocab = {} if _uses_byte_level(self.backend) else self.backend.get_vocab(with_added_tokens=True)
    single = {index for piece, index in vocab.items() if index not in added and _is_byte(piece)}
    return self.hidden_ids | single if single else frozenset()

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id in use; a model's embedding may have more rows, as padding."""
    return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  @functools.cached_property
  def eos_token_ids(self) -> tuple[int, ...]:
    """The tokenizer's end token, if any. The model's config may name more tokens that end a generated row."""
    token = self._special("eos_token")
    index = None if token is None else self.backend.token_to_id(token)
    return () if index is None else (index,)

  @functools.cached_property
  def bos_token_id(self) -> int | None:
    """The beginning-of-text token, whether or not `encode` adds it."""
    token = self._special("bos_token")
    return None if token is None else self.backend.token_to_id(token)

  @functools.cached_property
  def adds_bos(self) -> bool:
    """Whether texts start with BOS."""
    return self.bos_token_id is not None and self.prefix_ids[:1] == [self.bos_token_id]

  @functools.cached_property
  def prefix_ids(self) -> list[int]:
    """The tokens before each text: those of the post-processor, unless the settings hold `add_bos_token`.

    Beside a tokenizer.json that setting counts for nothing, and `load` drops it.
    """
    if (wanted := self.settings.get("add_bos_token")) is not None:
      return [self.bos_token_id] if wanted and self.bos_token_id is not None else []
    if self.backend.post_processor is None:
      return []
    whole = self.backend.encode(" a", add_special_tokens=True)
    if all(owner is None for owner in whole.sequence_ids):  # a vocabulary without these characters
      whole = self.backend.encode(next(iter(self.backend.get_vocab(with_added_tokens=False)), ""))
    first = next((i for i, owner in enumerate(whole.sequence_ids) if owner is not None), 0)
    return whole.ids[:first]

  @property
  def _template(self) -> str | None:
    template = self.settings.get("chat_template")
    if isinstance(template, list):  # named templates; "default" is for plain chats
      template = {t["name"]: t["template"] for t in template}
    if isinstance(template, dict):
      if "default" not in template and len(template) > 1:
        raise ValueError(f"this tokenizer has chat templates {sorted(template)} and none of them is called 'default'")
      template = template.get("default", next(iter(template.values()), None))
    return template

  def _special(self, name: str) -> str | None:
    """The text of a special token, which the settings hold as text or as {"content": text, ...}."""
    value = self.settings.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


@contextlib.contextmanager
def _clear_errors(what: str, advice: str = "") -> Iterator[None]:
  """Turns what the library raises, plain exceptions and panics, into a ValueError of one line."""
  try:
    yield
  except (TypeError, UnicodeEncodeError, MemoryError):  # of what was asked of it
    raise
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"{what} ({' '.join(str(error).split())[:200]})" + (advice and f"; {advice}")) from None


def _no_text(value: Any) -> str:
  """What is wrong with something that cannot be encoded."""
  if not isinstance(value, str):
    return f"{value!r:.80} is no text"
  index = next((i for i, ch in enumerate(value) if "\ud800" <= ch <= "\udfff"), 0)
  return f"character {index} of the text is half of a surrogate pair ({value[index]!r}), which is no character"


def clean(text: str) -> str:
  """A text without the spaces that a tokenizer of words puts before punctuation and contractions."""
  for spaced in (" .", " ?", " !", " ,"):
    text = text.replace(spaced, spaced[1])
  text = text.replace(" ' ", "'")
  for spaced in (" n't", " 'm", " 's", " 've", " 're"):
    text = text.replace(spaced, spaced[1:])
  return text


# Files beside tokenizer.json ------------------------------------------------------------------------------------------


def _older_added(file: Path, settings: dict[str, Any]) -> dict[int, dict]:
  """The tokens of added_tokens.json, {text: id}, as `added_tokens_decoder` lists them."""
  special = {_content(settings.get(name)) for name in _TEMPLATE_TOKENS}
  more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
  special |= {_content(token) for token in more} if isinstance(more, list) else set()
  values = read_json(file)
  for text, index in values.items():
    if type(index) is not int or not text or has_half_pair(text):
      raise ValueError(f"{file}: {shown(text)} with the id {shown(index)} is no token, a text with a whole number")
  return {
    index: {"content": text, "normalized": text not in special, "special": text in special}
    for text, index in values.items()
  }


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
  """Raises ValueError where a value of the settings has another type than its readers expect."""
  for name, value in settings.items():
    if name.endswith("_token") and not name.startswith("add_") and not isinstance(_content(value), str | None):
      raise ValueError(f"{file}: {name}={value!r:.80} must be a text or an object with content")
    if name in ("extra_special_tokens", "additional_special_tokens") and not (
      isinstance(value, list | dict | None) and all(isinstance(_content(token), str) for token in _extra({name: value}))
    ):
      raise ValueError(f"{file}: {name}={value!r:.80} must be a list of tokens")
  template = settings.get("chat_template")
  named = isinstance(template, list) and all(
    isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in template
  )
  of_texts = isinstance(template, dict) and all(isinstance(text, str) for text in template.values())
  if not (template is None or isinstance(template, str) or named or of_texts):
    raise ValueError(f"{file}: chat_template must be a text, or a list of objects with name and template")
  if has_half_pair(settings):
    raise ValueError(f"{file}: {HALF_PAIR}")


GROWTH = 1000  # most times its length that a text may have after the tokenizer's replacements; spaces grow threefold
LONGEST_WORD = 1000  # characters of a word that a vocabulary of word pieces is searched for, in quadratic time
HOLES = 2**16  # ids without a token


def _check_bounds(file: Path, backend: tokenizers.Tokenizer) -> None:
  """Raises ValueError where a small file would take endless memory or time of the library.

  The library itself bounds how long it searches a text for a regular expression.
  """
  vocab = backend.get_vocab(with_added_tokens=True)
  if (largest := max(vocab.values(), default=0)) > 4 * len(vocab) + HOLES:
    raise ValueError(f"{file}: id {largest} in a vocabulary of {len(vocab)} tokens; the file is damaged")
  for name, part in (("normalizer", backend.normalizer), ("decoder", backend.decoder)):
    if _growth(_settings(part)) > GROWTH:
      raise ValueError(f"{file}: its {name} makes texts more than {GROWTH} times longer; the file is damaged")
  if (longest := getattr(backend.model, "max_input_chars_per_word", 0)) > LONGEST_WORD:
    raise ValueError(f"{file}: max_input_chars_per_word={longest} is more than {LONGEST_WORD}; the file is damaged")


def _growth(step: dict[str, Any]) -> int:
  """Times its length that a normalizer or decoder, as tokenizer.json has it, may make of a text of one character."""
  if "normalizers" in step or "decoders" in step:
    return math.prod(map(_growth, step.get("normalizers", step.get("decoders"))))
  return max(len(step.get("content") or ""), 1) if step.get("type") == "Replace" else 1 + len(step.get("prepend", ""))


def _content(token: Any) -> Any:
  return token.get("content") if isinstance(token, dict) else token


def _extra(settings: dict[str, Any]) -> list[Any]:
  """The special tokens without a role; newer files name them."""
  extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens")) or []
  return list(extra.values() if isinstance(extra, dict) else extra)


def _add_tokens(file: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any], added: Any) -> None:
  """Adds the tokens that only the settings name, as transformers does: first those with an id, in its order."""
  fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

  def token(value: Any, **more: Any) -> tokenizers.AddedToken:
    try:
      given = {name: value[name] for name in fields if name in value} if isinstance(value, dict) else {"content": value}
      if not given.get("content"):
        raise TypeError
      return tokenizers.AddedToken(**{**more, **given})
    except TypeError:
      raise ValueError(f"{file}: {value!r:.80} is no token; it needs a text as content") from None

  try:
    listed = [value for _, value in sorted((int(index), value) for index, value in added.items())]
  except (AttributeError, TypeError, ValueError):
    raise ValueError(f"{file}: added_tokens_decoder must be an object of ids and tokens") from None
  names = [name for name in settings if name.endswith("_token") and isinstance(_content(settings[name]), str)]
  named = [settings[name] for name in (*_TEMPLATE_TOKENS, *sorted(set(names) - set(_TEMPLATE_TOKENS))) if name in names]
  contents = {_content(value) for value in named}
  there = list(backend.get_added_tokens_decoder().values())
  known, same = {own.content for own in there}, {repr(own) for own in there}
  listed = [token(value) for value in listed]
  if "added_tokens_decoder" not in settings:
    listed = [*there, *(one for one in listed if one.content not in known)]
  for one in listed:
    one.special = one.special or one.content in contents
  new = [one for one in listed if repr(one) not in same]
  known |= {one.content for one in new}
  for value in (*named, *_extra(settings)):
    if _content(value) not in known:
      new.append(token(value, special=True))
      known.add(new[-1].content)
  backend.add_tokens(new)


# Vocabularies ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _char_of_byte() -> tuple[str, ...]:
  """GPT-2's character for each byte: the byte itself if printable, otherwise the next unused character from U+0100."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  hidden = [b for b in range(256) if b not in printable]
  return tuple(chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256))


@functools.lru_cache(maxsize=1)
def _byte_of_char() -> dict[int, str]:
  """For `str.translate`: characters of GPT-2's alphabet to bytes as Latin-1, and others of Latin-1 to one beyond it."""
  return str.maketrans({chr(b): "\uffff" for b in range(256)} | {ch: chr(b) for b, ch in enumerate(_char_of_byte())})


def _is_byte(piece: str) -> bool:
  """Whether a piece of a vocabulary is a byte token, such as `<0x0A>`."""
  return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _bytes_of_chars(piece: str) -> bytes:
  """A piece in GPT-2's alphabet as bytes; one with other characters is plain text."""
  try:
    return piece.translate(_byte_of_char()).encode("latin-1")
  except UnicodeEncodeError:
    return piece.encode()


def _decoder(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
  """The steps of the decoder, as tokenizer.json has them."""
  decoder = _settings(backend.decoder) or {"type": None}
  return decoder.get("decoders", [decoder])


def _settings(part: Any) -> dict[str, Any]:
  """A part of a tokenizer as tokenizer.json has it, without writing and reading the whole vocabulary; {} for None."""
  return {} if part is None else json.loads(part.__getstate__())


def _uses_byte_level(backend: tokenizers.Tokenizer) -> bool:
  """Whether the vocabulary is written in GPT-2's byte alphabet."""
  return any(step["type"] == "ByteLevel" for step in _decoder(backend))


def _spaced(piece: str, decoder: list[dict[str, Any]]) -> str:
  """A piece with the spaces that the decoder gives it inside a text."""
  for step in decoder:
    kind = step["type"]
    if kind is None:  # without a decoder, words are joined by spaces
      return " " + piece
    if kind == "WordPiece":
      return piece.removeprefix(step["prefix"]) if piece.startswith(step["prefix"]) else " " + piece
    if kind == "BPEDecoder":
      return piece.replace(step["suffix"], " ")
    if kind == "Metaspace":
      piece = piece.replace(step["replacement"], " ")
    if kind == "Replace" and "String" in step["pattern"]:
      piece = piece.replace(step["pattern"]["String"], step["content"])
  return piece


def bpe_tokenizer(
  vocab: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer, *, normalizer=None, ignore_merges: bool = False
) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer from its parts; the caller adds special tokens and settings."""
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
  backend.pre_tokenizer = pre_tokenizer
  backend.decoder = decoders.ByteLevel()
  if normalizer is not None:
    backend.normalizer = normalizer
  return backend


def byte_tokenizer() -> Tokenizer:
  """One token a byte (ids 0-255) and an end token (256): for tests and models without a vocabulary of their own."""
  vocab = {ch: b for b, ch in enumerate(_char_of_byte())}
  backend = bpe_tokenizer(vocab, [], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
  backend.add_special_tokens(["<eos>"])
  return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
