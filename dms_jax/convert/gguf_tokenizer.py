"""Tokenizers of GGUF files: byte-level BPE, and BPE of SentencePiece; others are refused by name."""

from __future__ import annotations

import dataclasses

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from dms_jax.convert.gguf_file import Fields
from dms_jax.json_files import is_number, shown
from dms_jax.tokenizer import LONGEST_WORD, Tokenizer, bpe_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS, _SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# A word that changes from upper to lower case is two.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
  """Rules for one value of `tokenizer.ggml.pre`: how to split text before BPE, and the tokenizer's defaults."""

  split: str | None = None  # None: GPT-2's own pattern
  digits: bool = False  # first, digits are split singly
  nfc: bool = False
  ignore_merges: bool = False
  adds_bos: bool = False

  def build(self):
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.split is None)
    first = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
    if self.split is not None:
      first.append(pre_tokenizers.Split(Regex(self.split), behavior="isolated"))
    return pre_tokenizers.Sequence([*first, own])


_QWEN2 = _PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_REST}", nfc=True)
_CL100K = _PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_REST}")
_LLAMA3 = dataclasses.replace(_CL100K, ignore_merges=True, adds_bos=True)
_O200K = _PreTokenizer(
  rf"{'|'.join(word + _CONTRACTIONS + '?' for word in _CASED)}|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_REST}"
)
_TEKKEN = _PreTokenizer(rf"{'|'.join(_CASED)}|\p{{N}}|{_SIGNS_SLASH}|{_REST}", ignore_merges=True, adds_bos=True)
_PRE_TOKENIZERS = {
  "gpt-2": _PreTokenizer(),
  "olmo": _PreTokenizer(nfc=True),  # GPT-NeoX's and Pythia's
  "mpt": _PreTokenizer(nfc=True),  # the same
  "smollm": _PreTokenizer(digits=True),
  "refact": _PreTokenizer(digits=True),  # Granite's
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,  # as in llama.cpp; these files ask for BOS themselves
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "smaug-bpe": _CL100K,  # SmolLM3's, among others
  "dbrx": _CL100K,  # Phi-4's, OLMo 2's and OLMo 3's
  "gpt-4o": _O200K,  # gpt-oss's
  "tekken": _TEKKEN,  # Mistral's since Nemo
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types
_SPACE = "▁"  # a space inside SentencePiece's tokens


def read(fields: Fields) -> Tokenizer:
  """The tokenizer of a file.

  Raises:
    ValueError: it is damaged or not supported.
  """
  kind, pre = fields.get("tokenizer.ggml.model", str), fields.get("tokenizer.ggml.pre", str, "default")
  if kind != "llama" and (kind != "gpt2" or pre not in _PRE_TOKENIZERS):
    known = f" (there are llama, and gpt2 with {', '.join(_PRE_TOKENIZERS)})"
    raise _unsupported(fields, f"tokenizer {kind!r} with pre-tokenizer {pre!r}", known)
  tokens = _texts(fields, "tokens")
  types = fields.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
  if len(set(tokens)) != len(tokens):
    raise ValueError(f"{fields.path}: {len(tokens) - len(set(tokens))} tokens are there twice; the file is damaged")
  if len(types) != len(tokens):
    raise ValueError(f"{fields.path}: {len(types)} token types for {len(tokens)} tokens; the file is damaged")
  if kind == "llama":
    backend, adds_bos = _sentencepiece(fields, tokens, types), True
  else:
    backend, adds_bos = _byte_level(fields, tokens, _PRE_TOKENIZERS[pre]), _PRE_TOKENIZERS[pre].adds_bos
  for wanted, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, type_ in zip(tokens, types, strict=True) if type_ == wanted]
    backend.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": fields.get("{arch}.context_length", int),
    "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", bool, adds_bos),
  }
  for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
    if (index := fields.token_id(key)) is not None:
      settings[f"{name}_token"] = tokens[index]
  if (template := fields.get("tokenizer.chat_template", str, None)) is not None:
    settings["chat_template"] = template
  tokenizer = Tokenizer(backend, settings)
  if tokenizer.adds_bos:  # for other readers of tokenizer.json
    bos = settings["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
  elif kind == "gpt2":
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def _unsupported(fields: Fields, what: str, known: str = "") -> ValueError:
  advice = "pass the model's own with --tokenizer=FOLDER_OR_HUB_ID"
  return ValueError(f"{fields.path}: {what} is not supported from GGUF{known}; {advice}")


def _texts(fields: Fields, name: str) -> list[str]:
  texts = fields.get(f"tokenizer.ggml.{name}", list)
  if not all(isinstance(text, str) for text in texts):
    raise ValueError(f"{fields.path}: tokenizer.ggml.{name} are no texts; the file is damaged")
  return texts


def _byte_level(fields: Fields, tokens: list[str], rules: _PreTokenizer) -> tokenizers.Tokenizer:
  """GPT-2's kind: tokens in its alphabet of bytes, and merges."""
  merges = [tuple(merge.split(" ", 1)) for merge in _texts(fields, "merges")]
  try:
    vocab = {token: index for index, token in enumerate(tokens)}
    normalizer = normalizers.NFC() if rules.nfc else None
    return bpe_tokenizer(vocab, merges, rules.build(), normalizer=normalizer, ignore_merges=rules.ignore_merges)
  except Exception as error:  # the library raises plain Exception
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{fields.path}: vocabulary and merges do not fit ({reason}); the file is damaged") from None


def _sentencepiece(fields: Fields, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
  """SentencePiece's BPE, as of Llama 2, Mistral and Gemma: it joins the pair that makes the token of the highest score.

  Scores become the order of merges. Characters without a token become byte tokens.
  """
  scores = fields.get("tokenizer.ggml.scores", list)
  if len(scores) != len(tokens) or not all(is_number(score) for score in scores):
    raise ValueError(f"{fields.path}: {len(scores)} scores for {len(tokens)} tokens; the file is damaged")
  if fields.get("tokenizer.ggml.precompiled_charsmap", list, []):
    raise _unsupported(fields, "a SentencePiece tokenizer that rewrites characters (precompiled_charsmap)")
  normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
  bad = next((token for token, score in normal.items() if score != int(score)), None)  # a log-probability
  if bad is not None:
    raise _unsupported(fields, f"SentencePiece's unigram model (the score of {shown(bad)} is {normal[bad]:g})")
  if (longest := max(map(len, normal), default=0)) > LONGEST_WORD:
    raise ValueError(f"{fields.path}: a token of {longest} characters; the file is damaged")
  merges = []  # (score, start, end): pairs of one token in the order of their cut
  for token, score in normal.items():
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    merges += [(score, *pair) for pair in cuts if pair[0] in normal and pair[1] in normal]
    if len(token) > 1 and (odd := next((one for one in token if one not in normal), None)):
      raise _unsupported(fields, f"a SentencePiece tokenizer with {shown(token)} and without {shown(odd)}")
  made = {(score, first + last) for score, first, last in merges}
  if len(made) != len({score for score, _ in made}):
    raise _unsupported(fields, "a SentencePiece tokenizer in which tokens have the same score")
  merges.sort(key=lambda merge: -merge[0])
  unknown = fields.token_id("unknown")
  if unknown is None:
    unknown = next((index for index, kind in enumerate(types) if kind == _UNKNOWN), None)
  prefixed = fields.get("tokenizer.ggml.add_space_prefix", bool, True)
  own = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: index for index, token in enumerate(tokens)},
      merges=[(first, last) for _, first, last in merges],
      unk_token=None if unknown is None else tokens[unknown],
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  spaces = normalizers.Replace(" ", _SPACE)
  own.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
  steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  own.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
  return own
