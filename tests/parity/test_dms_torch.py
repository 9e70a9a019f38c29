"""The code of the layout dms_torch against the float64 oracle, dms_jax and NVIDIA's outputs.

Token by token and chunk by chunk, with padding, through `model.generate`, over turns; and what it refuses.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig, RopeScaling
from dms_jax.convert import convert, export, layouts
from dms_jax.params import flatten
from dms_jax.tokenizer import byte_tokenizer
from experiments import bench_dms_torch
from experiments.common import program
from tests import oracle
from tests.helpers import GATES, load_golden

# Float32 against float64 through two layers whose attention is peaked; logits are of size 1.
LOGITS = 2e-5
FAMILIES = {
  "llama": tiny.config(num_heads=8, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, tie_embeddings=False),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, head_dim=24, rms_norm_eps=1e-6),
}
# Gates whose logits lie on both sides of the threshold, far from it.
GATE = dict(scale=4.0, offset=0.1)


def dms_model(family="llama", lora=None, **gates):
  return tiny.model(FAMILIES[family], tiny.dms(**{**GATE, **gates}), lora)


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch):
  """Threads that wait for each other cost more than these models."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope="session")
def code(transformers, tmp_path_factory):
  """modeling_dms.py, imported from an exported folder as a user would."""
  path = export(tmp_path_factory.mktemp("code") / "hf", dms_model(), layout="dms_torch")
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(path)
    return importlib.import_module("modeling_dms")


@pytest.fixture
def load(code, tmp_path):
  """(export a model and load it in torch)."""

  def load(model, **options):
    export(tmp_path / "hf", model, layout="dms_torch", overwrite=True)
    name = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"][0]
    return getattr(code, name).from_pretrained(tmp_path / "hf", **options).eval()

  return load


def ids(tokens):
  import torch

  return torch.from_numpy(np.array(tokens)).long()


def padded(rows, value=0):
  """Rows of token ids, padded on the left: ids and mask [B, T], torch."""
  longest = max(map(len, rows))
  pad = lambda row, fill: [fill] * (longest - len(row)) + [*row]
  return ids([pad(row, value) for row in rows]), ids([pad([1] * len(row), 0) for row in rows])


# Against the formula --------------------------------------------------------------------------------------------------

LENGTHS = (23, 40, 31)


def expected(model, rows, **options):
  """The oracle's (logits [T, V], keys that each query sees [L, K, T]) of each row."""
  model = model.merged()
  weights, results = flatten(model.params), []
  for row in rows:
    logits, _, seen = oracle.forward(weights, model.config, model.dms, row, **options)
    results.append((logits, seen.sum(-1)))
  return results


def check_chunks(torch, model, theirs, rows, chunks, **options):
  """Feeds left-padded rows in chunks; logits and the tokens held after each chunk are the oracle's."""
  tokens, mask = padded(rows)
  results = expected(model, rows, window=model.dms.window, **options)
  cache, start = None, 0
  for count in chunks:
    end = start + count
    with torch.no_grad():
      out = theirs(tokens[:, start:end], attention_mask=mask[:, :end], **({} if cache is None else {"cache": cache}))
    cache = out.cache
    live = cache.live().numpy()
    for row, (logits, seen) in enumerate(results):
      pads = tokens.shape[1] - len(rows[row])
      first, last = max(start - pads, 0), end - pads
      np.testing.assert_allclose(
        out.logits[row, first + pads - start :].numpy(), logits[first : max(last, 0)], atol=LOGITS
      )
      np.testing.assert_array_equal(live[:, row], seen[..., last - 1] if last > 0 else 0)
    start = end
  assert start == tokens.shape[1]
  assert cache.get_seq_length() == start and cache.seen.tolist() == [len(row) for row in rows]
  return results


CHUNKS = {"whole": [40], "steps": [1] * 40, "mixed": [3, 1, 14, 1, 1, 7, 13]}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("gate", ["adapter", "neuron"])
def test_formula(torch, load, gate, granularity, window, shift):
  for family in FAMILIES:
    model = dms_model(family, gate=gate, granularity=granularity, window=window, shift=shift)
    theirs = load(model)
    rows = [np.asarray(tiny.tokens(model.config, 1, n, seed=n))[0].tolist() for n in LENGTHS]
    for chunks in CHUNKS.values() if family == "llama" else [CHUNKS["mixed"]]:
      results = check_chunks(torch, model, theirs, rows, chunks)
    held = np.mean([seen[..., -1] / len(row) for row, (_, seen) in zip(rows, results, strict=True)])
    assert 0.2 < held < 0.8  # it evicts, and not all


def test_threshold(torch, load):
  model = dms_model(window=2)
  theirs = load(model)
  rows = [np.asarray(tiny.tokens(model.config, 1, n, seed=n))[0].tolist() for n in LENGTHS]
  held = []
  for threshold in (-0.7, 0.6):
    theirs.config.dms_threshold = threshold
    results = check_chunks(torch, model, theirs, rows, CHUNKS["mixed"], threshold=threshold)
    held.append(sum(seen[..., -1].sum() for _, seen in results))
  assert held[0] < held[1]
  assert load(model, dms_threshold=0.6).config.dms_threshold == 0.6
  theirs.config.dms_disable_eviction = True
  check_chunks(torch, model, theirs, rows, CHUNKS["mixed"], evict=False)


def test_without_cache(torch, load, code, monkeypatch):
  """Scoring of a whole text, padded on the right, in blocks of few queries; its loss has a gradient."""
  monkeypatch.setattr(code, "QUERIES", 7)
  model = dms_model("qwen3", gate="neuron", window=3)
  theirs = load(model)
  rows = [np.asarray(tiny.tokens(model.config, 1, n, seed=n))[0].tolist() for n in LENGTHS]
  tokens = ids([row + [0] * (40 - len(row)) for row in rows])
  mask = ids([[1] * len(row) + [0] * (40 - len(row)) for row in rows])
  out = theirs(tokens, attention_mask=mask, use_cache=False, labels=tokens.masked_fill(mask == 0, -100))
  for row, (logits, _) in enumerate(expected(model, rows, window=3)):
    np.testing.assert_allclose(out.logits[row, : len(rows[row])].detach().numpy(), logits, atol=LOGITS)
  out.loss.backward()
  assert all(torch.isfinite(p.grad).all() for p in theirs.parameters() if p.grad is not None)


def test_gates_in_half_precision(torch, load, code):
  """Weights are rounded; gate logits are float32 and, from the same inputs, those of float32 weights rounded alike."""
  for family, gate in (("llama", "adapter"), ("qwen2", "neuron"), ("qwen3", "neuron")):
    model = dms_model(family, gate=gate)
    theirs = load(model, dtype=torch.bfloat16)
    kept = [n for n, p in theirs.named_parameters() if p.dtype == torch.float32]
    assert len(kept) == (4 if gate == "adapter" else 0) and theirs.lm_head.weight.dtype == torch.bfloat16
    settings, attention = code.Settings.of(theirs.config), theirs.model.layers[0].self_attn
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
      half = attention.gate_logits(settings, x, x)
    assert half.dtype == torch.float32
    whole = attention.float().gate_logits(settings, x.float(), x.float())
    np.testing.assert_allclose(half.detach().numpy(), whole.detach().numpy(), atol=1e-5)


# Against dms_jax, through `generate` ----------------------------------------------------------------------------------


class Recorded:
  """Tokens held after each forward pass, [L, B, K]."""

  def __init__(self, monkeypatch, code):
    self.live, advance = [], code.DMSCache.advance

    def record(cache, chunk):
      advance(cache, chunk)
      self.live.append(cache.live().numpy())

    monkeypatch.setattr(code.DMSCache, "advance", record)


def check_conversation(theirs, recorded, model, turns, policy, new, **options):
  """Turns of a batch: greedy tokens and the tokens that each head holds after every step equal dms_jax's."""
  out, past, rows, sequences = None, {}, [[] for _ in turns[0]], None
  for turn in turns:
    out = dms_jax.generate(
      model, turn, policy=policy, max_new_tokens=new, eos=False, history=True, continue_from=out, **options
    )
    added, mask = padded(turn)
    tokens = added if sequences is None else ids(np.concatenate([sequences, added], 1))
    masks = mask if sequences is None else ids(np.concatenate([masks, mask], 1))
    recorded.live.clear()
    theirs_out = theirs.generate(
      tokens, attention_mask=masks, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
      return_dict_in_generate=True, **past,
    )  # fmt: skip
    sequences, past = theirs_out.sequences, {"cache": theirs_out.cache}
    masks = ids(np.concatenate([masks, np.ones((len(rows), new), int)], 1))
    assert sequences[:, tokens.shape[1] :].tolist() == out.tokens
    assert len(recorded.live) == new  # the prompt, and a step for each new token but the last
    np.testing.assert_array_equal(np.stack(recorded.live[1:]), out.metrics.history)
    np.testing.assert_array_equal(past["cache"].seen, out.metrics.seen)
  return out, past["cache"]


@pytest.mark.parametrize(
  ("family", "gates"),
  [
    ("llama", dict(gate="adapter", window=4, shift=1)),
    ("llama", dict(gate="neuron", window=4, shift=0)),
    ("qwen2", dict(gate="neuron", window=0, shift=1, granularity="layer")),
    ("qwen3", dict(gate="adapter", window=0, shift=0)),
  ],
)
def test_generate(load, code, monkeypatch, family, gates):
  """Three turns of four rows of unequal length."""
  model = dms_model(family, LoRAConfig(rank=2), **gates)
  theirs, rng = load(model), np.random.default_rng(0)
  turns = [
    [rng.integers(0, 97, n).tolist() for n in lengths] for lengths in ((30, 5, 17, 1), (4, 9, 1, 2), (1, 1, 12, 3))
  ]
  check_conversation(
    theirs, Recorded(monkeypatch, code), model, turns, dms_jax.DMS(window=gates["window"]), 12,
    prefill_chunk=16, decode_block=16,
  )  # fmt: skip


# What generation offers -----------------------------------------------------------------------------------------------


def generate(theirs, tokens, mask, **options):
  return theirs.generate(
    tokens, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=20, **options
  ).tolist()


def test_ways_to_generate(torch, load, code):
  """In chunks, without a cache, with beams: the same tokens. A second turn may be its new tokens and the whole mask."""
  model = dms_model("llama", window=3)
  theirs = load(model)
  rows = [np.asarray(tiny.tokens(model.config, 1, n, seed=n))[0].tolist() for n in (25, 9)]
  tokens, mask = padded(rows)
  whole = generate(theirs, tokens, mask)
  assert generate(theirs, tokens, mask, prefill_chunk_size=7) == whole
  assert generate(theirs, tokens, mask, use_cache=False) == whole
  turns = []
  for begin in (0, 44):  # all tokens, or those that the cache lacks
    cache = code.DMSCache(theirs.config)
    so_far = ids(generate(theirs, tokens, mask, cache=cache))
    new = torch.cat([so_far, tokens], 1)[:, begin:]
    turns.append(generate(theirs, new, torch.cat([mask, torch.ones(2, 20, dtype=torch.long), mask], 1), cache=cache))
  assert [row[-20:] for row in turns[0]] == [row[-20:] for row in turns[1]]
  beams = dict(num_beams=3, num_return_sequences=2)
  searched = generate(theirs, tokens, mask, **beams)
  assert searched == generate(theirs, tokens, mask, use_cache=False, **beams) and searched[::2] != whole


def test_rows_are_chosen(torch, load, code):
  """A row that is chosen twice goes on as if it had been read twice."""
  theirs = load(dms_model(window=3))
  tokens = ids(np.random.default_rng(0).integers(0, 97, (3, 30)))
  with torch.no_grad():
    cache = theirs(tokens[:, :25]).cache
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_repeat_interleave(2)
    chosen = [2, 2, 0, 0, 2, 2]
    out = theirs(tokens[chosen, 25:], cache=cache)
    again = theirs(tokens[chosen])
  torch.testing.assert_close(out.logits, again.logits[:, 25:], atol=LOGITS, rtol=0)
  np.testing.assert_array_equal(cache.live(), again.cache.live())
  cache.reset()
  with torch.no_grad():
    torch.testing.assert_close(theirs(tokens, cache=cache).logits[0], again.logits[2], atol=LOGITS, rtol=0)


def test_memory_is_freed(torch, load, code):
  """Bytes follow the tokens held, not the tokens seen, and not the head that holds most."""
  theirs = load(dms_model(window=2))
  tokens = ids(np.random.default_rng(0).integers(0, 97, (2, 600)))
  with torch.no_grad():
    cache = theirs(tokens).cache
  live = cache.live().numpy()
  slot = 2 * 16 * 4 + 4 + 1  # key and value in float32, position, eviction
  pages = np.ceil(live / code.PAGE).sum()
  assert cache.nbytes == pages * (code.PAGE * slot + 8)
  assert live.sum() < 0.7 * live.size * 600 and live.max() > 1.3 * live.mean()


# Goldens of NVIDIA's code ---------------------------------------------------------------------------------------------

PROMPT, STEPS, GOLDEN = 61, 49, 1e-4


@pytest.mark.parametrize("kind", GATES)
def test_golden(torch, load, monkeypatch, kind):
  """Logits, decisions, cache lengths at all 50 steps, compression ratio; left padding; eviction off."""
  model, golden = load_golden(kind)
  theirs = load(model)
  attention, decisions = type(theirs.model.layers[0].self_attn), []
  gate_logits = attention.gate_logits

  def record(*args):
    decisions.append(gate_logits(*args))
    return decisions[-1]

  monkeypatch.setattr(attention, "gate_logits", record)
  close = lambda ours, name, where=...: np.testing.assert_allclose(
    ours.numpy()[where], golden[name][where], atol=GOLDEN, rtol=0
  )
  with torch.no_grad():
    out = theirs(ids(golden["input_ids"]))
    close(out.logits, "prefill_logits")
    logits, lengths = [], [out.cache.live().flatten(1).numpy()]
    for step in range(STEPS):
      out = theirs(ids(golden["tokens"][:, step : step + 1]), cache=out.cache)
      logits.append(out.logits)
      lengths.append(out.cache.live().flatten(1).numpy())
    close(torch.cat(logits, 1), "decode_logits")
    np.testing.assert_array_equal(lengths, golden["cache_lengths"])
    np.testing.assert_allclose(1 / np.mean(lengths[-1] / (PROMPT + STEPS)), golden["cr"], rtol=1e-6)
    layers = [torch.cat(decisions[layer :: model.config.num_layers], 2) for layer in range(model.config.num_layers)]
    np.testing.assert_array_equal(torch.stack(layers).numpy() > 0, golden["decisions"] > 0)

    mask = ids(golden["leftpad_mask"])
    positions = ids(golden["leftpad_position_ids"])
    out = theirs(ids(golden["leftpad_ids"]), attention_mask=mask, position_ids=positions)
    close(out.logits, "leftpad_prefill_logits", golden["leftpad_mask"].astype(bool))

    theirs.config.dms_disable_eviction = True
    out = theirs(ids(golden["input_ids"]))
    close(out.logits, "noevict_prefill_logits")
    for step in range(STEPS):
      np.testing.assert_array_equal(out.logits[:, -1].argmax(-1), golden["noevict_tokens"][:, step])
      out = theirs(ids(golden["noevict_tokens"][:, step : step + 1]), cache=out.cache)
      np.testing.assert_allclose(out.logits[:, 0], golden["noevict_decode_logits"][:, step], atol=GOLDEN, rtol=0)


# Files ----------------------------------------------------------------------------------------------------------------


def test_auto_class(transformers, load, monkeypatch, tmp_path):
  """transformers finds the code in the folder; untrusted, it loads the dense model; its own save is read by both."""
  model = dms_model("qwen3", shift=0)
  plain = load(model)
  path = tmp_path / "hf"
  monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
  auto = lambda where, trust: transformers.AutoModelForCausalLM.from_pretrained(where, trust_remote_code=trust).eval()
  theirs = auto(path, True)
  assert type(theirs).__name__ == "DMSQwen3ForCausalLM" and type(theirs) is not type(plain)
  tokens = np.asarray(tiny.tokens(model.config, 2, 30))
  logits = lambda m: m(ids(tokens)).logits.detach().numpy()
  np.testing.assert_array_equal(logits(theirs), logits(plain))
  assert type(auto(path, False)).__name__ == "Qwen3ForCausalLM"
  theirs.save_pretrained(tmp_path / "saved")
  np.testing.assert_array_equal(logits(auto(tmp_path / "saved", True)), logits(plain))
  again = checkpoint.load(convert(str(tmp_path / "saved"), tmp_path / "ours"))
  assert again.dms == model.dms
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize("gate", ["adapter", "neuron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_jax(tmp_path, family, gate):
  """The folder converts with its gates and its tokenizer, to the bit; several shards."""
  model = dms_model(family, gate=gate, shift=0, granularity="layer", window=7)
  cfg = dataclasses.replace(model.config, vocab_size=257)
  model = tiny.model(cfg, model.dms)
  path = export(tmp_path / "hf", model, byte_tokenizer(), layout="dms_torch", shard_bytes=20_000)
  assert len(list(path.glob("*.safetensors"))) > 1
  again = checkpoint.load(convert(str(path), tmp_path / "ours"))
  assert (again.config, again.dms) == (model.config, model.dms)
  assert layouts.transformers.gates(path, json.loads((path / "config.json").read_text())).layout == "dms_torch"
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  assert (tmp_path / "ours" / "tokenizer.json").exists()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("gates", "reason"),
  [
    (None, "has no gates"),
    (dict(objective="kvzap"), "objective=kvzap"),
    (dict(gate="mlp"), "dms.gate=mlp"),
    (dict(eviction="immediate"), "dms.eviction=immediate"),
  ],
)
def test_models_that_the_layout_refuses(tmp_path, gates, reason):
  model = tiny.model(tiny.config(), None if gates is None else dms_jax.config.DMSConfig(window=5, hidden=8, **gates))
  with pytest.raises(ValueError, match=f"^--layout=dms_torch cannot hold this model: .*{reason}"):
    export(tmp_path / "hf", model, layout="dms_torch")
  assert not (tmp_path / "hf").exists()


def test_levels_become_thresholds(tmp_path):
  """Gates for a range of ratios: the README names the threshold of each."""
  model = tiny.model(tiny.config(), tiny.dms(elastic=(2.0, 8.0)))
  text = (export(tmp_path / "hf", model, layout="dms_torch") / "README.md").read_text()
  assert "4.39445 for a ratio of 2, 0 for a ratio of 4, -3.38919 for a ratio of 8" in text


def test_calls_that_are_refused(torch, transformers, load, code):
  theirs = load(dms_model(window=3))
  tokens = ids(np.random.default_rng(0).integers(1, 97, (2, 20)))
  mask = torch.ones_like(tokens)

  def refused(match, call, error=ValueError):
    with torch.no_grad(), pytest.raises(error, match=match):
      call()

  long = ids(np.ones((1, 2049), int))
  refused("a row has 2049 tokens, and the model's context is 2048", lambda: theirs(long))
  refused(
    "StaticCache|cache_implementation='static'", lambda: generate(theirs, tokens, mask, cache_implementation="static")
  )
  refused("DynamicCache cannot evict", lambda: theirs(tokens, cache=transformers.DynamicCache()))
  refused("attention weights", lambda: theirs(tokens, output_attentions=True))
  refused(
    "assisted decoding", lambda: generate(theirs, tokens[:1], mask[:1], prompt_lookup_num_tokens=3), NotImplementedError
  )
  stock = transformers.AutoModelForCausalLM.from_pretrained(theirs.name_or_path)
  refused("models of its file alone", lambda: stock(tokens, cache=code.DMSCache(theirs.config)), NotImplementedError)
  refused("position_ids must count", lambda: theirs(tokens, position_ids=torch.arange(5, 25)[None]))
  with torch.no_grad():
    cache = theirs(tokens[:, :10]).cache
  refused("cannot take tokens back", lambda: cache.crop(-1), NotImplementedError)
  refused("3 rows of tokens, and the cache has 2", lambda: theirs(tokens[[0, 0, 1]], cache=cache))
  refused("should be|need", lambda: theirs(tokens[:, 10:], attention_mask=mask[:, 10:], cache=cache))
  hidden = mask.clone()
  hidden[0, 0] = 0
  refused("hides tokens that the cache has read", lambda: theirs(tokens[:, 10:], attention_mask=hidden, cache=cache))


def test_files_that_are_refused(code, monkeypatch, tmp_path):
  """Gates or settings that are missing; versions that the code does not know."""
  from safetensors.numpy import load_file, save_file

  path = export(tmp_path / "hf", dms_model(), layout="dms_torch")
  weights = load_file(path / "model.safetensors")
  missing = {name: w for name, w in weights.items() if "layers.1.self_attn.dms_proj_alpha" not in name}
  save_file(missing, path / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(
    ValueError, match=r"hf: 2 tensors of the gates are missing, such as model\.layers\.1\..*fetch it again"
  ):
    code.DMSLlamaForCausalLM.from_pretrained(path)
  whole = json.loads((path / "config.json").read_text())
  for changes, message in (
    ({"dms_window_size": -1, "dms_alpha_scale": None}, "dms_window_size=-1 should .*; dms_alpha_scale=None should be"),
    ({"dms_window_size": True, "dms_shift": True}, "dms_window_size=True should .*; dms_shift=True should be"),
    ({"dms_threshold": float("nan")}, "dms_threshold=nan should be"),
    ({"dms_alpha_scale": float("inf")}, "dms_alpha_scale=inf should be"),
    ({"dms_disable_eviction": "no"}, "dms_disable_eviction='no' should be true or false"),
  ):
    (path / "config.json").write_text(json.dumps(whole | changes))
    with pytest.raises(ValueError, match=message):
      code.DMSLlamaForCausalLM.from_pretrained(path)
  monkeypatch.syspath_prepend(path)
  monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # transformers replaces its own module
  with pytest.raises(ImportError, match=r"needs transformers 5 and torch 2.4 or newer, found transformers 4\.57\.1"):
    importlib.reload(code)


# The benchmark --------------------------------------------------------------------------------------------------------


def test_benchmark(transformers, capsys, monkeypatch, tmp_path):
  """It runs at tiny shapes, and compares the stock model with the one that evicts."""
  model = tiny.model(tiny.config(vocab_size=257), tiny.dms(window=3, **GATE))
  export(tmp_path / "hf", model, byte_tokenizer(), layout="dms_torch")
  (tmp_path / "text").write_text("A text of some length. " * 20)
  monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
  config = bench_dms_torch.Config(
    tmp_path / "hf", tmp_path / "text", rows=(1, 2), prompt_tokens=40, new_tokens=3, output=tmp_path
  )
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  monkeypatch.setattr(program, "flag_values", lambda changed_only=False: {})
  bench_dms_torch.main()
  results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
  names = [(row["model"], row["rows"]) for row in results]
  assert names == [(name, rows) for name in ("LlamaForCausalLM", "DMSLlamaForCausalLM") for rows in (1, 2)]
  assert results[0]["KV bytes"] == 2 * 2 * 2 * 16 * 4 * 42 and results[0]["tokens held"] == 42
  assert results[2]["achieved CR"] == pytest.approx(42 / results[2]["tokens held"]) and results[2]["tokens held"] < 40
