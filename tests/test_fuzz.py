"""Damaged files of every kind are refused in one line that names the file, and at once.

`DMS_FUZZ=100000 DMS_FUZZ_SEED=7 python -m pytest tests/test_fuzz.py tests/experiments/test_fuzz.py` runs more inputs,
and others.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFWriter

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.convert import api, convert, export, gguf
from dms_jax.convert.layouts import peft, transformers
from dms_jax.convert.tensors import to_slices
from dms_jax.json_files import to_json
from dms_jax.layers import rope_frequencies
from dms_jax.params import flatten, param_table
from dms_jax.policies import triattention
from dms_jax.retrofit import DataConfig, RetrofitConfig, SelfTextConfig, loop, self_text
from dms_jax.retrofit.data import load_sources
from dms_jax.tokenizer import Tokenizer, byte_tokenizer
from tests.fuzzing import PARTS, Reader, garbled, garbled_header, garbled_json, garbled_lines

# Where Orbax fails, it leaves coroutines that nobody awaits.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
CONFIG = tiny.config(vocab_size=257, num_layers=1, d_model=16, d_ff=16, head_dim=8, num_heads=2, num_kv_heads=1)
TEMPLATE = (
  "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}{% if loop.last and add_generation_prompt %}"
  "{{ '\\n' * 2 }}{% endif %}{% endfor %}{{ '%5d' % 3 }}{% set x = range(3) | join(',') %}{{ x }}"
)


# Readers --------------------------------------------------------------------------------------------------------------


def read_huggingface(path: Path) -> None:
  config, dms, tensors, _ = transformers.read(path)
  ignore = lambda name: transformers.is_ignored(config, name)
  list(to_slices(param_table(config, dms), tensors, np.float32, ignore=ignore))


def read_peft(path: Path) -> None:
  peft.base_name(path)
  peft.read(path, CONFIG)


def convert_whole(path: Path) -> None:
  """A conversion from start to end, which leaves nothing if it is refused."""
  output = path.with_name("converted")
  try:
    convert(str(path), output)
    shutil.rmtree(output)
  finally:
    assert {p.name for p in path.parent.iterdir()} == {path.name}, "left something beside the source"


def read_gguf(path: Path) -> None:
  config, tensors, tokenizer = gguf.read(next(iter(sorted(path.glob("*.gguf")))))
  list(to_slices(gguf.table(config), tensors, np.float32))
  use(tokenizer)


def use(tokenizer: Tokenizer) -> None:
  """All that a program asks of a tokenizer."""
  ids = tokenizer.encode("Hello  wörld 12's\n")
  tokenizer.decode(ids)
  tokenizer.token_bytes()
  for name in ("byte_pieces", "fallback_ids", "bos_token_id", "eos_token_ids", "adds_bos", "vocab_size"):
    getattr(tokenizer, name)
  if tokenizer.settings.get("chat_template"):
    tokenizer.chat([{"role": "user", "content": "hi"}])


def read_tokenizer(path: Path) -> None:
  use(Tokenizer.load(path))


def read_state(path: Path) -> None:
  """What a resumed retrofit reads beside its training state."""
  loop._claim_directory(path, RUN)
  loop.read_log(path / loop.LOG)


def read_text(path: Path, names=("*.jsonl", "*.json", "*.txt")) -> None:
  load_sources(DataConfig(paths=tuple(str(path / name) for name in names)), byte_tokenizer())


RUN = {"retrofit": to_json(RetrofitConfig()), "dms": to_json(tiny.dms()), "data": to_json(DataConfig()), "lora": None}

# Whole files ----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, parts: int = 1) -> None:
  """A tiny Llama in one file, or in two as llama.cpp splits them."""
  config = tiny.config(**{**vars(CONFIG), "vocab_size": 258})
  tensors = {}
  for name, value in flatten(tiny.model(config).params).items():
    label = gguf._NAMES[name]
    matrix = np.asarray(value).reshape(param_table(config)[name].hf_shape).astype(np.float16)
    tensors[f"blk.0.{label}" if name.startswith("layers/") else label] = matrix
  for part in range(parts):
    file = path / ("m.gguf" if parts == 1 else f"m-{part + 1:05}-of-{parts:05}.gguf")
    writer, tokens = GGUFWriter(str(file), "llama"), [*byte_tokenizer().backend.get_vocab()]
    for name, value in dict(
      block_count=1, context_length=64, embedding_length=16, feed_forward_length=16,
      **{"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8},
    ).items() if not part else ():  # fmt: skip
      writer.add_uint32(f"llama.{name}", value)
    if parts > 1:
      writer.add_uint16("split.no", part)
      writer.add_uint16("split.count", parts)
      writer.add_int32("split.tensors.count", len(tensors))
    if not part:
      writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
      writer.add_string("tokenizer.ggml.model", "gpt2")
      writer.add_string("tokenizer.ggml.pre", "smollm")
      writer.add_uint32("tokenizer.ggml.eos_token_id", 256)
      writer.add_token_merges(["a b"])
      writer.add_token_list([*tokens, "ab"])
      writer.add_token_types([1] * 258)
      writer.add_string("tokenizer.chat_template", TEMPLATE)
    for label, matrix in list(tensors.items())[part::parts]:
      writer.add_tensor(label, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizers(root: Path) -> None:
  """A directory with all that newer versions write, one of an older version, and one of words."""
  own = byte_tokenizer()
  backend = json.loads(own.backend.to_str())
  split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|'s|\s+(?!\S)"}, "behavior": "Isolated", "invert": False}
  backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, backend["pre_tokenizer"]]}
  backend["normalizer"] = {
    "type": "Sequence",
    "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": False, "strip_right": False}],
  }
  backend["model"]["vocab"] |= {"ab": 257, "abc": 258}
  backend["model"]["merges"] = [["a", "b"], ["ab", "c"]]
  backend["post_processor"] = {"type": "TemplateProcessing", "pair": []} | {
    "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}},
  }
  pieces = {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
  words = backend | {
    "added_tokens": [], "post_processor": None, "pre_tokenizer": {"type": "Whitespace"},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": pieces | {"vocab": {"x": 0, "##x": 1, "Hello": 2}},
  }  # fmt: skip
  added = {"content": "<eos>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
  settings = {
    "added_tokens_decoder": {"256": added | {"special": True}}, "eos_token": "<eos>", "bos_token": added,
    "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}],
    "clean_up_tokenization_spaces": False, "extra_special_tokens": {"image": "<image>"}, "model_max_length": 1e30,
  }  # fmt: skip
  for name, about in (("tokenizer", backend), ("older", backend), ("words", words)):
    (root / name).mkdir()
    (root / name / "tokenizer.json").write_text(json.dumps(about))
  (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
  (root / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
  older = {"eos_token": "<eos>", "bos_token": "<s>", "add_bos_token": True, "additional_special_tokens": ["<a>"]}
  (root / "older" / "tokenizer_config.json").write_text(json.dumps(older))
  (root / "older" / "special_tokens_map.json").write_text(json.dumps({"eos_token": added, "pad_token": "<pad>"}))
  (root / "older" / "added_tokens.json").write_text(json.dumps({"<a>": 300, "<b>": 301}))


def write_text(root: Path) -> None:
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  records = [{"text": "one"}, {"text": "two", "prompt": "p"}, {"messages": messages}, {"question": "q", "answer": "a"}]
  (root / "text").mkdir()
  (root / "text" / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records if "messages" not in r) + "\n")
  (root / "text" / "b.json").write_text(json.dumps([records[0], records[3]]))
  (root / "text" / "c.txt").write_text("Some text.\nZwei Zeilen äöü.\n", encoding="utf-8")
  (root / "questions").mkdir()
  (root / "questions" / "q.jsonl").write_text("\n".join(json.dumps(r) for r in records[2:]) + "\n")


def files_fit(folder: Path) -> None:
  """config.json of a checkpoint with the checksums of its files as they are."""
  values = json.loads((folder / "config.json").read_text())
  values["files"] = {n: list(entry) for n, entry in checkpoint._fingerprints(folder / "params").items()}
  (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> Iterator[dict[str, Reader]]:
  root = tmp_path_factory.mktemp("whole")
  model, gated = tiny.model(CONFIG), tiny.model(CONFIG, tiny.dms())
  export(root / "hf", model)
  export(root / "shards", model, shard_bytes=4000)
  export(root / "gates", gated)
  export(root / "fastdms", model)
  metadata = {"window_size": 8, "alpha_scale": 100.0, "alpha_offset": 5.0, "config": {"target_cr": 8}}
  (root / "fastdms" / "dms_metadata.json").write_text(json.dumps(metadata))
  export(root / "trained" / "final", model)
  (root / "trained" / "training_log.json").write_text(json.dumps({"config": metadata, "log": [1.0, 2.0]}))
  qwen3 = tiny.model(dataclasses.replace(CONFIG, family="qwen3", qk_norm=True), tiny.dms())
  export(root / "student", qwen3, layout="model_optimizer")
  retrofitted = tiny.model(CONFIG, tiny.dms(), LoRAConfig(rank=2))
  export(root / "peft", retrofitted, layout="peft")
  loop._claim_directory(root / "run", RUN)
  steps = "".join(json.dumps({"step": step, "loss": 1.5, "seconds": 0.1}) + "\n" for step in range(3))
  (root / "run" / loop.LOG).write_text(steps)
  (root / "rows").mkdir()
  (root / "rows" / "0.jsonl").write_text("".join(json.dumps({"text": "one", "sampled": 3}) + "\n" for _ in range(3)))
  for name, parts in (("gguf", 1), ("split", 2)):
    (root / name).mkdir()
    write_gguf(root / name, parts)
  write_tokenizers(root)
  write_text(root)
  checkpoint.save(root / "ours", gated)
  checkpoint.save(root / "retrofit", retrofitted, groups=("gate", "lora"))
  checkpoint.save(root / "base", model)
  convert(str(root / "shards"), root / "converted")
  out = dms_jax.generate(model, [[1, 2, 3]] * 2, policy=dms_jax.Vanilla(window=2), max_new_tokens=5, eos=False)
  dms_jax.save_conversation(root / "cache", out)
  shape = CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim
  tables = jnp.ones(shape), jnp.ones((*shape[:2], shape[2] // 2)), jnp.asarray(rope_frequencies(CONFIG))[None]
  (root / "calibration").mkdir()
  triattention.save(root / "calibration" / "t.npz", triattention.Calibration(*tables), CONFIG)
  values = json.loads((root / "hf" / "config.json").read_text())
  values |= {"layer_types": ["full_attention"], "dms_window_size": 8, "dms_shift": 1, "sliding_window": None}
  values |= {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
  (root / "hf" / "config.json").write_text(json.dumps(values))
  conversation = lambda path: dms_jax.load_conversation(path, model)
  on_base = lambda path: checkpoint.load(root / "base", retrofit=path)
  questions = lambda path: self_text.prompts(
    SelfTextConfig(rows=3, questions=str(path / "q.jsonl")),
    Tokenizer(byte_tokenizer().backend, {"chat_template": TEMPLATE}),
  )
  ours = partial(Reader, whole=root / "ours")
  template = "the chat template"
  yield {
    "safetensors": Reader(50, root / "hf", "model.safetensors", garbled, read_huggingface),
    "safetensors header": Reader(60, root / "hf", "model.safetensors", garbled_header, read_huggingface),
    "config": Reader(90, root / "hf", "config.json", garbled_json, read_huggingface),
    "generation config": Reader(15, root / "hf", "generation_config.json", garbled_json, read_huggingface),
    "index": Reader(20, root / "shards", "model.safetensors.index.json", garbled_json, read_huggingface),
    "gates": Reader(20, root / "gates", "dms_config.json", garbled_json, read_huggingface),
    "gate tensors": Reader(20, root / "gates", "dms_gates.safetensors", garbled, read_huggingface),
    "fastdms": Reader(20, root / "fastdms", "dms_metadata.json", garbled_json, read_huggingface),
    "training log": Reader(
      15, root / "trained", "training_log.json", garbled_json, lambda path: read_huggingface(path / "final"), refuses=0
    ),
    "student": Reader(20, root / "student", "config.json", garbled_json, read_huggingface, refuses=0.2),
    "student's tensors": Reader(15, root / "student", "model.safetensors", garbled_header, read_huggingface),
    "adapter": Reader(20, root / "peft", "adapter_config.json", garbled_json, read_peft, refuses=0.1),
    "adapter's tensors": Reader(15, root / "peft", "adapter_model.safetensors", garbled_header, read_peft),
    "adapter's gates": Reader(10, root / "peft", "dms_config.json", garbled_json, read_peft),
    "conversion": Reader(5, root / "shards", ".", garbled, convert_whole),
    "converted before": Reader(
      10,
      root / "converted",
      "config.json",
      garbled_json,
      lambda path: api.is_finished(str(root / "shards"), path),
      refuses=0,
    ),
    "run": Reader(10, root / "run", loop.RUN, garbled_json, read_state),
    "log": Reader(10, root / "run", loop.LOG, garbled_lines, read_state),
    "sampled rows": Reader(10, root / "rows", "0.jsonl", garbled_lines, lambda p: self_text._finished(p / "0.jsonl")),
    "gguf": Reader(75, root / "gguf", "m.gguf", garbled, read_gguf, said=template),
    "split gguf": Reader(25, root / "split", ".", garbled, read_gguf, said=template),
    "tokenizer": Reader(50, root / "tokenizer", "tokenizer.json", garbled_json, read_tokenizer),
    "words": Reader(20, root / "words", "tokenizer.json", garbled_json, read_tokenizer),
    "tokenizer settings": Reader(30, root / "tokenizer", "tokenizer_config.json", garbled_json, read_tokenizer),
    "older settings": Reader(15, root / "older", "tokenizer_config.json", garbled_json, read_tokenizer),
    "special tokens": Reader(15, root / "older", "special_tokens_map.json", garbled_json, read_tokenizer),
    "added tokens": Reader(15, root / "older", "added_tokens.json", garbled_json, read_tokenizer),
    "template": Reader(
      20, root / "tokenizer", "chat_template.jinja", garbled, read_tokenizer, said=template, refuses=0
    ),
    "own config": ours(30, name="config.json", change=garbled_json, read=checkpoint.read_config),
    "own": ours(5, name="config.json", change=garbled_json, read=checkpoint.load),
    "orbax": ours(5, name="params", change=garbled, read=checkpoint.load, after=files_fit),
    "orbax damaged": ours(5, name="params", change=garbled, read=checkpoint.load),
    "retrofit": Reader(5, root / "retrofit", "config.json", garbled_json, on_base),
    "retrofit's orbax": Reader(5, root / "retrofit", "params", garbled, on_base, after=files_fit),
    "conversation": Reader(10, root / "cache", "cache.json", garbled_json, conversation),
    "rows": Reader(10, root / "cache", "rows.npz", garbled, conversation),
    "calibration": Reader(15, root / "calibration", "t.npz", garbled, lambda p: triattention.load(p / "t.npz", CONFIG)),
    "text lines": Reader(20, root / "text", "a.jsonl", garbled_lines, read_text),
    "text object": Reader(15, root / "text", "b.json", garbled_json, read_text),
    "plain text": Reader(5, root / "text", "c.txt", garbled, read_text, refuses=0),
    "questions": Reader(10, root / "questions", "q.jsonl", garbled_lines, questions, said=template),
  }
  gc.collect()  # here, or Python reports in a test of another file what Orbax has left


NAMES = (
  "safetensors", "safetensors header", "config", "generation config", "index", "gates", "gate tensors", "fastdms",
  "training log", "student", "student's tensors", "adapter", "adapter's tensors", "adapter's gates", "conversion",
  "converted before", "run", "log", "sampled rows", "gguf", "split gguf", "tokenizer", "words", "tokenizer settings",
  "older settings", "special tokens", "added tokens", "template", "own config", "own", "orbax", "orbax damaged",
  "retrofit", "retrofit's orbax", "conversation", "rows", "calibration", "text lines", "text object", "plain text",
  "questions",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_in_one_line(readers, tmp_path, name, part):
  with jax.numpy_dtype_promotion("standard"):
    readers[name].check(tmp_path / "damaged", part)


def test_every_reader_is_named(readers):
  assert tuple(readers) == NAMES
