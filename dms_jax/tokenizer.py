"""Text to token ids and back, and chat templates, based on Hugging Face's `tokenizers`."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dms_jax.config import read_json

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"  # newer checkpoints; older ones have the template in the settings
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True, eq=False)  # identity: a model carries it as a static field
class Tokenizer:
  """A `tokenizers.Tokenizer` and the content of tokenizer_config.json (special tokens, chat template)."""

  backend: tokenizers.Tokenizer
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def load(cls, path: str | Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint or Hugging Face directory.

    Raises:
      ValueError: there is no tokenizer, or a file is damaged.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE
    if not file.is_file():
      raise ValueError(
        f"{path}: no {TOKENIZER_FILE} there, so text cannot be tokenized; convert the model with its own"
      )
    try:
      backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
      raise ValueError(f"{file}: not a tokenizer ({error}); the file is damaged or was cut short") from None
    settings = read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}
    if (path / SPECIAL_FILE).exists():  # older directories name special tokens only here
      settings = {**read_json(path / SPECIAL_FILE), **settings}
    if (path / TEMPLATE_FILE).exists():
      settings["chat_template"] = (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    return cls(backend, settings)

  def save(self, path: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (template included) into directory `path`."""
    path = Path(path)
    self.backend.save(str(path / TOKENIZER_FILE))
    text = json.dumps(self.settings, indent=2, ensure_ascii=False)
    (path / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

  def encode(self, text: str, continues: bool = False) -> list[int]:
    """The token ids of a text, after BOS if the tokenizer adds BOS and the text does not already start with it.

    The text of a special token becomes that token. No end token is added. A text that `continues` another gets no BOS.
    """
    ids = self.backend.encode(text, add_special_tokens=False).ids
    if self.adds_bos and not continues and ids[:1] != [self.bos_token_id]:
      ids = [self.bos_token_id, *ids]
    return ids

  def decode(self, ids: list[int], skip_special: bool = True) -> str:
    """The text of `ids`. `skip_special` leaves out special tokens. Bytes that are not UTF-8 become U+FFFD."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
    """The text of a conversation in the model's chat template; a message is {"role": ..., "content": ...}.

    Raises:
      ValueError: the tokenizer has no template, or the template refuses the messages.
    """
    if (template := self._template) is None:
      raise ValueError("this tokenizer has no chat template: it belongs to a base model; pass plain text instead")
    tokens = {name: text for name in _TEMPLATE_TOKENS if (text := self._special(name)) is not None}
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    return _render(template, {**given, **tokens})

  def token_bytes(self) -> list[bytes]:
    """The bytes of each token id. A special token has the bytes of its name; an unused id has none.

    A SentencePiece model or a vocabulary of whole words also drops the first space of a whole text, which belongs to no
    token.
    """
    pieces = [b""] * self.vocab_size
    added = self.backend.get_added_tokens_decoder()
    byte_level = _uses_byte_level(self.backend)
    space = b" " if self.backend.decoder is None else b""  # without a decoder, words are joined by spaces
    for piece, index in self.backend.get_vocab(with_added_tokens=True).items():
      if index in added:
        pieces[index] = added[index].content.encode()
      elif byte_level:
        pieces[index] = b"".join(_byte_of_char().get(ch) or ch.encode() for ch in piece)
      elif _is_byte(piece):
        pieces[index] = bytes([int(piece[3:5], 16)])
      else:
        pieces[index] = space + piece.replace("▁", " ").encode()
    return pieces

  @functools.cached_property
  def fallback_ids(self) -> frozenset[int]:
    """Ids of byte tokens such as `<0x0A>` and of special tokens: later tokens may change the text of a run of them.

    A run of byte tokens decodes to characters only if the whole run is valid UTF-8; special tokens do not end a run.
    The set is empty if the vocabulary has no byte tokens. In a byte-level vocabulary every token has bytes of its own.
    """
    added = self.backend.get_added_tokens_decoder()
    vocab = {} if _uses_byte_level(self.backend) else self.backend.get_vocab(with_added_tokens=True)
    single = {index for piece, index in vocab.items() if index not in added and _is_byte(piece)}
    special = {index for index, token in added.items() if token.special}
    return frozenset(single | special) if single else frozenset()

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
    """Whether texts start with BOS. The settings decide; if they do not say, the tokenizer's post-processor does."""
    if self.bos_token_id is None:
      return False
    if (wanted := self.settings.get("add_bos_token")) is not None:
      return bool(wanted)
    return self.backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_token_id]

  @property
  def _template(self) -> str | None:
    template = self.settings.get("chat_template")
    if isinstance(template, list):  # named templates; "default" is for plain chats
      named = {t["name"]: t["template"] for t in template}
      template = named.get("default", next(iter(named.values()), None))
    return template

  def _special(self, name: str) -> str | None:
    """The text of a special token, which the settings hold as text or as {"content": text, ...}."""
    value = self.settings.get(name)
    return value.get("content") if isinstance(value, dict) else value


def _render(template: str, values: dict) -> str:
  try:
    import jinja2
  except ImportError:
    raise ValueError("chat templates need jinja2: pip install jinja2") from None
  try:
    compiled = _compile(template)
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template is not valid: {error}") from None
  try:
    return compiled.render(values)
  except (jinja2.TemplateError, TypeError) as error:
    raise ValueError(f"the chat template refuses these messages: {error}") from None


@functools.lru_cache(maxsize=8)
def _compile(template: str):
  """A chat template compiled in a sandbox, with the filters and functions that Hugging Face provides."""
  import jinja2.ext
  import jinja2.sandbox

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)


@functools.lru_cache(maxsize=1)
def _char_of_byte() -> tuple[str, ...]:
  """GPT-2's character for each byte: the byte itself if printable, otherwise the next unused character from U+0100."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  hidden = [b for b in range(256) if b not in printable]
  return tuple(chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256))


@functools.lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, bytes]:
  return {ch: bytes([b]) for b, ch in enumerate(_char_of_byte())}


def _is_byte(piece: str) -> bool:
  """Whether a piece of a vocabulary is a byte token, such as `<0x0A>`."""
  return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _uses_byte_level(backend: tokenizers.Tokenizer) -> bool:
  """Whether the vocabulary is written in GPT-2's byte alphabet."""
  decoder = json.loads(backend.to_str()).get("decoder") or {}
  kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", ()))}
  return "ByteLevel" in kinds


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
