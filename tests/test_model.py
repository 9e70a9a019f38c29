"""The model against the oracle and itself: whole, cached, chunked, scanned, packed, padded."""

from __future__ import annotations

import dataclasses
import functools
import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dms_jax import cache as caches
from dms_jax import policies, spmd
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, RopeScaling
from dms_jax.decoder import output_head
from dms_jax.gates import step_gate_logits
from dms_jax.model import Eviction, Model, cached_forward, check_policy, embed, forward, last_logits, segment_positions
from dms_jax.params import flatten, param_table
from dms_jax.sharding import make_mesh
from pallas_kernels.common.platform import tracing_for
from tests import oracle
from tests.helpers import close
from tests.programs import step, unembed, whole

NEAR = 1e-3  # of the threshold: float32 may decide differently there (counted, and compared under overridden decisions)
RTOL = 2e-5  # float32, two layers, of the logits' largest value

FAMILIES = {
  "llama": {},
  "llama3": dict(rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32), rope_theta=100.0, tie_embeddings=False),
  "qwen2": dict(family="qwen2", qkv_bias=True, rms_norm_eps=1e-6),
  "qwen3": dict(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=24),
}
step_as_shipped = jax.jit(cached_forward)


def oracle_forward(model: Model, tokens, **kwargs):
  weights = {path: np.asarray(w, np.float64) for path, w in flatten(model.params).items()}
  scale = model.lora.scale if model.lora else 0.0
  return oracle.forward(weights, model.config, model.dms, tokens, lora_scale=scale, **kwargs)


def check_decisions(gates, decisions, threshold=0.0) -> int:
  """Decisions follow float64 logits except within NEAR of the threshold; returns how many differ there."""
  flips = (gates > threshold) != decisions
  assert (np.abs(gates[flips] - threshold) < NEAR).all(), gates[flips]
  return int(flips.sum())


def run_cached(model, policy, cache, tokens, steps, override=None):
  """Feeds tokens [B, T] by `steps` [(width, lengths [B]), ..]; returns per row logits, gate logits, and the cache."""
  batch, length = tokens.shape
  start = np.zeros(batch, int)
  logits = np.full((batch, length, model.config.vocab_size), np.nan)
  gates = np.full((model.config.num_layers, batch, model.config.num_kv_heads, length), np.nan)
  for width, lengths in steps:
    take = np.minimum(start[:, None] + np.arange(width), length - 1)
    part = np.take_along_axis(np.asarray(tokens), take, 1)
    now = None if override is None else np.take_along_axis(np.asarray(override), take[None, :, None], -1)
    out, cache = step(model, policy, cache, part, np.asarray(lengths, np.int32), now)
    assert not np.asarray(out.stalled).any()
    step_logits = np.asarray(unembed(model, out.hidden))
    for b in range(batch):
      now = slice(start[b], start[b] + lengths[b])
      logits[b, now] = step_logits[b, : lengths[b]]
      if out.logits is not None:
        gates[:, b, :, now] = np.asarray(out.logits)[:, b, :, : lengths[b]]
    start = start + lengths
  return logits, gates, cache


def even_steps(batch, length, width):
  return [(width, np.full(batch, min(width, length - s))) for s in range(0, length, width)]


@st.composite
def cases(draw):
  gate = draw(st.sampled_from(["adapter", "neuron"]))
  dms = DMSConfig(
    gate,
    window=draw(st.integers(0, 40)),
    shift=draw(st.integers(0, 1)),
    granularity=draw(st.sampled_from(["head", "layer"])),
  )
  heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  family = draw(st.sampled_from(sorted(FAMILIES)))
  cfg = tiny.config(**{**FAMILIES[family], "num_kv_heads": heads, "num_heads": heads * group})
  return cfg, dms, draw(st.integers(3, 20)), draw(st.integers(20, 50)), draw(st.integers(0, 2**31))


@hypothesis.settings(max_examples=2 if os.environ.get("DMS_QUICK") else 4)
@hypothesis.given(case=cases())
def test_cache_is_mask_is_oracle(case):
  """Whole text, MaskedCache and ContiguousCache by mixed chunks with pauses, and float64 numpy: one result."""
  cfg, dms, chunk, length, seed = case
  model, policy, rng = (
    tiny.model(cfg, dms, seed=seed % 97),
    policies.DMS(window=dms.window),
    np.random.default_rng(seed),
  )
  tokens = tiny.tokens(cfg, 2, length, seed)
  hidden, z = whole(model, tokens, eviction=Eviction(threshold=0.0))
  logits, decisions, flips = np.asarray(unembed(model, hidden)), np.asarray(z) > 0, 0
  for b in range(2):
    expected, gates, _ = oracle_forward(model, tokens[b], window=dms.window, override=decisions[:, b])
    close(logits[b], expected)
    np.testing.assert_allclose(np.asarray(z)[:, b], gates, atol=NEAR, rtol=0)
    flips += check_decisions(gates, decisions[:, b])
  start, steps = np.zeros(2, int), []
  while (start < length).any():
    width = int(rng.choice([1, chunk]))
    steps.append((width, np.minimum(rng.integers(0, width + 1, 2), length - start)))
    start = start + steps[-1][1]
  live = []
  for kind in ("masked", "contiguous"):
    cache = caches.create(kind, cfg, batch=2, capacity=length, window=dms.window, lag=dms.shift)
    cached, gates, cache = run_cached(model, policy, cache, tokens, steps, override=decisions)
    close(cached, logits)
    flips += check_decisions(gates, decisions)
    live.append(np.asarray(cache.live()))
  np.testing.assert_array_equal(live[0], live[1])
  assert flips <= 2  # a near tie is possible, many are a fault


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", [None, "adapter", "neuron"])
def test_families_against_the_oracle(family, gate):
  """Every family, dense and with either gate, eviction on and off, and the soft mask of training."""
  cfg = tiny.config(**FAMILIES[family])
  dms = gate and tiny.dms(gate=gate, window=3)
  model, tokens = tiny.model(cfg, dms), tiny.tokens(cfg, 1, 40)
  hidden, z = whole(model, tokens)
  expected, gates, _ = oracle_forward(model, tokens[0], evict=False)
  close(np.asarray(unembed(model, hidden))[0], expected)
  if not gate:
    assert z is None
    return
  np.testing.assert_allclose(np.asarray(z)[:, 0], gates, atol=NEAR, rtol=0)
  noise = np.random.default_rng(0).logistic(size=z.shape).astype(np.float32)
  for granularity in ("head", "layer"):
    model = model.replace(dms=dataclasses.replace(dms, granularity=granularity))
    hidden, z = whole(model, tokens, eviction=Eviction(noise=jnp.asarray(noise), tau=30.0))
    expected, gates, _ = oracle_forward(model, tokens[0], window=3, noise=noise[:, 0], tau=30.0)
    close(np.asarray(unembed(model, hidden))[0], expected)
    used = noise if granularity == "head" else np.repeat(noise[:, :, :1], 2, axis=2)
    np.testing.assert_allclose(np.asarray(z)[:, 0], (gates + used[:, 0]) / 30, atol=NEAR, rtol=0)


@pytest.mark.parametrize("gate", ["adapter", "neuron"])
def test_eviction_off_is_dense(gate):
  """A threshold above every logit, a window over the whole text, and no eviction at all are the same."""
  cfg = tiny.neuron_config()
  model, tokens = tiny.model(cfg, tiny.dms(gate=gate)), tiny.tokens(cfg, 2, 30)
  off, _ = whole(model, tokens)
  for eviction in (Eviction(threshold=1e9), Eviction(threshold=0.0, window=30)):
    hidden, _ = whole(model, tokens, eviction=eviction)
    np.testing.assert_array_equal(hidden, off)
  on, _ = whole(model, tokens, eviction=Eviction(threshold=0.0))
  assert np.abs(on - off).max() > 1e-3
  for policy in (policies.Vanilla(window=5), policies.DMS(window=5, threshold=1e9)):
    cache = caches.create("contiguous", cfg, batch=2, capacity=30, window=5, lag=1)
    logits, _, cache = run_cached(model, policy, cache, tokens, even_steps(2, 30, 7))
    close(logits, np.asarray(unembed(model, off)))
    assert (cache.live() == 30).all()


def test_a_threshold_decides_and_does_not_recompile():
  """Raising the threshold keeps more, in `forward` and in the cache alike, within one compiled program."""
  model, traces = tiny.model(gates=tiny.dms(window=2)), []
  tokens, held = tiny.tokens(model.config, 1, 40), []

  @functools.partial(jax.jit, compiler_options=tiny.QUICK)
  def counted(*args):
    traces.append(1)
    return cached_forward(*args)

  for threshold in (-1e9, 0.0, 5.0, 1e9):
    cache = caches.create("contiguous", model.config, batch=1, capacity=40, window=2, lag=1)
    out, cache = counted(model, policies.DMS(window=2, threshold=threshold), cache, tokens, jnp.full(1, 40, jnp.int32))
    hidden, _ = whole(model, tokens, eviction=Eviction(threshold=threshold))
    close(out.hidden, np.asarray(hidden))
    held.append(int(cache.live().sum()))
  assert held == sorted(held) and len(set(held)) == 4 and len(traces) == 1


def test_decode_is_traced_once():
  """Forty steps, some with a row pausing, trace one program a shape."""
  model, traces = tiny.model(gates=tiny.dms()), []

  @functools.partial(jax.jit, donate_argnums=2, compiler_options=tiny.QUICK)
  def counted(*args):
    traces.append(args[3].shape)
    return cached_forward(*args)

  cache = caches.create("contiguous", model.config, batch=2, capacity=64, window=5, lag=1)
  tokens = np.asarray(tiny.tokens(model.config, 2, 64))
  for t in range(0, 16, 8):
    _, cache = counted(model, policies.DMS(window=5), cache, tokens[:, t : t + 8], jnp.array([8, 5], jnp.int32))
  for t in range(16, 56):
    _, cache = counted(model, policies.DMS(window=5), cache, tokens[:, t : t + 1], jnp.array([1, t % 2], jnp.int32))
  assert traces == [(2, 8), (2, 1)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scan_is_loop_and_reruns_are_bit_equal(dtype):
  """Stacked and listed layers: the same to rounding; the same program twice: the same to the bit."""
  cfg = tiny.config()
  model, tokens = tiny.model(cfg, tiny.dms(), dtype=dtype), tiny.tokens(cfg, 2, 24)
  loop, override = model.unstacked(), np.random.default_rng(0).random((2, 2, 2, 24)) < 0.5
  assert loop.unstacked() is loop and len(loop.params["layers"]) == 2
  steps = even_steps(2, 18, 9) + even_steps(2, 6, 1)
  results = []
  for m in (model, loop, model, loop):
    cache = caches.create("contiguous", cfg, batch=2, capacity=24, window=5, lag=1, dtype=dtype)
    results.append(run_cached(m, policies.DMS(window=5), cache, tokens, steps, override=override))
  for first, second in ((0, 2), (1, 3)):
    for a, b in zip(jax.tree.leaves(results[first]), jax.tree.leaves(results[second]), strict=True):
      np.testing.assert_array_equal(a, b)
  # bfloat16: XLA fuses, and so rounds, the two forms differently; 2^-8 a rounding, about ten in a row.
  close(results[1][0], results[0][0], RTOL if dtype == jnp.float32 else 0.04)
  np.testing.assert_array_equal(results[1][2].archived, results[0][2].archived)
  if dtype == jnp.float32:
    close(*(np.asarray(unembed(m, whole(m, tokens)[0])) for m in (loop, model)))


def test_layers_on_a_mesh_of_one_device():
  """They keep the sharding of the stack, less its first axis."""
  model = tiny.model(tiny.config(), tiny.dms())
  apart, plain = (
    spmd.place(model, make_mesh(devices=jax.devices()[:1])).unstacked().params["layers"],
    model.unstacked().params["layers"],
  )
  assert all(np.array_equal(layer[name], own[name]) for layer, own in zip(apart, plain, strict=True) for name in own)


@struct.dataclass
class ByPlace(policies.DMS):
  """Decides by everything that a policy is told."""

  def decide(self, logits, layer, position, keys=None):
    return (logits > self.threshold) ^ ((position + layer + jnp.arange(logits.shape[-2])[:, None]) % 3 == 0)


@pytest.mark.parametrize("late, kind, rows, window, changes", [
  (True, "contiguous", 1, 5, {}), (True, "paged", 3, 5, {"shift": 5}),
  (True, "contiguous", 2, 5, {"granularity": "layer"}),
  (True, "paged", 3, 5, {"override": True}), (True, "contiguous", 3, 0, {"shift": 0}),
  (False, "contiguous", 3, 0, {}), (False, "masked", 2, 5, {}), (False, "paged", 1, 5, {"gate": "neuron"}),
  (False, "contiguous", 3, 5, {"LATE_ROWS": 2}),
])  # fmt: skip
def test_small_steps_on_a_gpu(late, kind, rows, window, changes, monkeypatch):
  """Padded rows, and gates of all layers behind them where decisions can wait so long: neither hidden states nor cache
  show it, whoever sits out."""
  gate, shift = changes.get("gate", "adapter"), changes.get("shift", 1)
  cfg = tiny.config() if gate == "adapter" else tiny.neuron_config()
  dms = tiny.dms(gate=gate, granularity=changes.get("granularity", "head"))
  model, tokens = tiny.model(cfg, dms).unstacked(), tiny.tokens(cfg, rows, 18)
  override = np.random.default_rng(0).random((2, rows, 2, 18)) < 0.5 if "override" in changes else None
  steps = [(1, np.asarray([1, i % 2, i % 3 > 0])[:rows].astype(int)) for i in range(18)]
  results, found = [], []
  monkeypatch.setattr("dms_jax.execution.LATE_ROWS", changes.get("LATE_ROWS", rows))
  monkeypatch.setattr("dms_jax.model.step_gate_logits", lambda *args: found.append(1) or step_gate_logits(*args))
  for name in ("cpu", "gpu"):
    assert not found
    cache = caches.create(kind, cfg, batch=rows, capacity=24, window=window, lag=shift, dtype=jnp.float32)
    step.clear_cache()  # for which device it was traced is no part of its key
    with tracing_for(name):
      results.append(run_cached(model, ByPlace(window=window), cache, tokens, steps, override))
  step.clear_cache()
  assert bool(found) == late
  for padded, as_it_is in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[0]), strict=True):
    np.testing.assert_array_equal(np.isnan(padded), np.isnan(as_it_is))  # NaN where a row was fed nothing
    close(np.nan_to_num(padded), np.nan_to_num(as_it_is))


def test_bfloat16_under_imposed_decisions(record_property):
  """bfloat16 cached against bfloat16 whole and float32 whole, under the same decisions; the flip rate is on record."""
  cfg = tiny.config()
  model = tiny.model(cfg, tiny.dms())
  half = model.replace(params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params))
  model = half.replace(params=jax.tree.map(lambda w: w.astype(jnp.float32), half.params))  # the same numbers
  tokens = tiny.tokens(cfg, 2, 48)
  hidden, z = whole(model, tokens, eviction=Eviction(threshold=0.0))
  decisions, exact = np.asarray(z) > 0, np.asarray(unembed(model, hidden))
  cache = caches.create("contiguous", cfg, batch=2, capacity=48, window=5, lag=1, dtype=jnp.bfloat16)
  steps = even_steps(2, 32, 16) + even_steps(2, 16, 1)
  logits, gates, _ = run_cached(half, policies.DMS(window=5), cache, tokens, steps, override=decisions)
  close(logits, exact, 0.04)  # 2^-8 a rounding, about ten in a row
  flips = float(np.mean((gates > 0) != decisions))
  record_property("bfloat16_flip_rate", flips)
  print(f"bfloat16 flips {flips:.2%} of decisions")
  assert flips < 0.05


@pytest.mark.parametrize(
  "kind, dtype", [("masked", jnp.float32), ("contiguous", jnp.float32), ("contiguous", jnp.bfloat16)]
)
def test_a_row_does_not_depend_on_its_company(kind, dtype):
  """At one width a row's logits and cache are bit-equal whatever its neighbours, its place or its pauses."""
  cfg = tiny.config(num_heads=6, num_kv_heads=2, d_model=96, d_ff=160)
  model, policy = tiny.model(cfg, tiny.dms(), dtype=dtype), policies.DMS(window=5)
  mine, rng = np.asarray(tiny.tokens(cfg, 1, 30, seed=9))[0], np.random.default_rng(0)

  def alone(place, company_seed, pauses):
    """One decode step at a time after a chunk of 12; the row at `place` among three others that do as they like."""
    tokens = np.asarray(tiny.tokens(cfg, 4, 40, seed=company_seed))
    start, logits = np.zeros(4, int), []
    cache = caches.create(kind, cfg, batch=4, capacity=200, window=5, lag=1, dtype=dtype)
    while start[place] < 30:
      width = 12 if start[place] < 12 else 1
      lengths = rng.integers(0, width + 1, 4)
      lengths[place] = 0 if pauses and rng.random() < 0.4 else width
      part = np.take_along_axis(tokens, (start[:, None] + np.arange(width)) % 40, 1)
      part[place] = mine[np.minimum(start[place] + np.arange(width), 29)]
      out, cache = step_as_shipped(model, policy, cache, jnp.asarray(part), jnp.asarray(lengths, jnp.int32))
      if lengths[place]:
        logits.append(np.asarray(unembed(model, out.hidden))[place])
      start = start + lengths
    state = [np.asarray(x) for x in jax.tree.leaves((cache.kv[:, place], jax.tree.map(
      lambda x: x[:, place], cache.layer_state()), cache.seen[place]))]  # fmt: skip
    return np.concatenate(logits), state

  reference = alone(0, 1, False)
  for place, company, pauses in ((0, 2, True), (1, 3, False), (2, 1, True), (3, 4, True)):
    logits, state = alone(place, company, pauses)
    np.testing.assert_array_equal(logits, reference[0])
    for a, b in zip(state, reference[1], strict=True):
      np.testing.assert_array_equal(a, b)


def test_packed_documents_do_not_see_each_other():
  """Each document of a packed row, and each row of a padded batch, is the text alone; positions restart."""
  cfg = tiny.neuron_config()
  for gate in ("adapter", "neuron"):
    model = tiny.model(cfg, tiny.dms(gate=gate, window=3))
    lengths, eviction = (13, 1, 13, 13), Eviction(threshold=0.0)
    ids = jnp.asarray(np.repeat([4, 0, 7, 2], lengths))[None]
    tokens = np.asarray(tiny.tokens(cfg, 1, 40))
    np.testing.assert_array_equal(segment_positions(ids)[0], np.concatenate([np.arange(n) for n in lengths]))
    packed, z = map(np.asarray, whole(model, tokens, segment_ids=ids, eviction=eviction))
    start = 0
    for n in lengths:
      alone, z_alone = whole(model, tokens[:, start : start + n], eviction=eviction)
      close(packed[:, start : start + n], np.asarray(alone))
      np.testing.assert_allclose(z[..., start : start + n], z_alone, atol=NEAR, rtol=0)
      start += n
    expected, *_ = oracle_forward(model, tokens[0], window=3, segments=np.asarray(ids[0]))
    close(np.asarray(unembed(model, packed))[0], expected)


def test_padding_side_does_not_matter():
  """Left-padded, right-padded and cached: the same logits; what the padding holds changes nothing."""
  model = tiny.model(gates=tiny.dms(window=3))
  cfg, lengths, width = model.config, np.array([9, 25, 17]), 25
  texts = [np.asarray(tiny.tokens(cfg, 1, n, seed=n))[0] for n in lengths.tolist()]
  results = []
  for side, filler in (("left", 0), ("left", 7), ("right", 0), ("right", 7)):
    tokens, real = np.full((3, width), filler), np.zeros((3, width), bool)
    for b, text in enumerate(texts):
      where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
      tokens[b, where], real[b, where] = text, True
    hidden, _ = whole(
      model, jnp.asarray(tokens), segment_ids=jnp.asarray(real, jnp.int32), eviction=Eviction(threshold=0.0)
    )
    results.append([np.asarray(unembed(model, hidden))[b, real[b]] for b in range(3)])
  for other in results[1:]:
    for a, b in zip(results[0], other, strict=True):
      close(a, b)
  tokens = np.stack([np.pad(t, (0, width - len(t))) for t in texts])
  cache = caches.create("contiguous", cfg, batch=3, capacity=width, window=3, lag=1)
  logits, *_ = run_cached(model, policies.DMS(window=3), cache, tokens, [(width, lengths)])
  for b, n in enumerate(lengths):
    close(logits[b, :n], results[0][b])


def test_remat_changes_nothing():
  model = tiny.model(gates=tiny.dms())
  tokens, noise = tiny.tokens(model.config, 1, 20), jnp.ones((2, 1, 2, 20))

  def loss(params, remat):
    hidden, z = forward(model.replace(params=params), tokens, eviction=Eviction(noise=noise), remat=remat)
    return jnp.mean(hidden**2) + jnp.mean(z)

  plain, remat = (
    jax.jit(jax.grad(functools.partial(loss, remat=r)), compiler_options=tiny.QUICK)(model.params)
    for r in (False, True)
  )
  equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(equal, plain, remat)
  listed = jax.jit(jax.grad(functools.partial(loss, remat=False)), compiler_options=tiny.QUICK)(
    model.unstacked().params
  )  # a list of layers keeps everything
  jax.tree.map(equal, plain, Model(listed, model.config, model.dms).stacked().params)


def test_small_parts():
  """Embedding, output head, last logits, policy checks."""
  model = tiny.model(tiny.config(tie_embeddings=False), tiny.dms(window=9, shift=0))
  assert output_head(model) is model.params["lm_head"] and model.lag() == 0 and model.dtype == jnp.float32
  tied = tiny.model()
  assert output_head(tied) is tied.params["embed"] and tied.lag() == 1
  tokens = tiny.tokens(model.config, 2, 6)
  np.testing.assert_array_equal(embed(model, tokens), np.asarray(model.params["embed"])[np.asarray(tokens)])
  cache = caches.create("masked", model.config, batch=2, capacity=6, window=9, lag=0)
  out, _ = step(model, policies.DMS(window=9), cache, tokens, jnp.array([4, 0], jnp.int32))
  expected = np.asarray(unembed(model, out.hidden))
  np.testing.assert_allclose(last_logits(model, out), expected[[0, 1], [3, 0]], rtol=1e-5, atol=1e-6)
  assert check_policy(model, policies.DMS()).window == 9 and check_policy(tied, policies.Vanilla()).window == 0
  with pytest.raises(ValueError, match="needs eviction gates"):
    check_policy(tied, policies.DMS(window=2))
  with pytest.raises(ValueError, match="window=-1"):
    check_policy(model, policies.DMS(window=-1))
  with pytest.raises(ValueError, match="no eviction gates"):
    forward(tied, tokens, eviction=Eviction(threshold=0.0))


# Fields that act elsewhere than in `forward` and `cached_forward`, and the test that holds them to it.
ELSEWHERE = {
  "max_position_embeddings": "tests/generation/test_generate.py",
  "eos_token_ids": "tests/generation/test_generate.py",
  "objective": "tests/retrofit/test_objectives.py",
  "hidden": "tests/retrofit/test_objectives.py",
  "elastic": "tests/retrofit/test_elastic.py",
  "elastic_thresholds": "tests/retrofit/test_elastic.py",
  "by_cr": "tests/retrofit/test_elastic.py",
  "norms": "tests/parity/test_families.py",  # another parameter table
  "layer_norm": "tests/parity/test_families.py",
  "num_experts": "tests/parity/test_families.py",
  "experts_per_token": "tests/parity/test_families.py",
  "norm_experts": "tests/parity/test_families.py",
  "swiglu_alpha": "tests/parity/test_families.py",
  "swiglu_limit": "tests/parity/test_families.py",
  "attention_sinks": "tests/parity/test_families.py",
  "gated_mlp": "tests/parity/test_families.py",
  "proj_bias": "tests/parity/test_families.py",
  "learned_positions": "tests/parity/test_families.py",
  "norm_plus_one": "tests/parity/test_families.py",  # and other initial weights
}
CHANGES = {
  "family": None,  # a name: qkv_bias and qk_norm are what differ (tests/test_params.py: names)
  "num_layers": 3, "d_model": 40, "d_ff": 56, "num_heads": 6, "num_kv_heads": 4, "head_dim": 8, "vocab_size": 131,
  "rope_theta": 500.0, "rope_scaling": RopeScaling(2.0, 1.0, 4.0, 16), "rms_norm_eps": 1e-2, "tie_embeddings": False,
  "qkv_bias": True, "qk_norm": True, "factor": 8.0, "low_freq_factor": 1.7, "high_freq_factor": 5.0,
  "original_max_position_embeddings": 64, "gate": "neuron", "window": 2, "scale": 20.0, "offset": 60.0, "shift": 0,
  "granularity": "layer", "eviction": "immediate", "rank": 3, "targets": ("q_proj",), "lora.scale": 0.5,
  "rope_fraction": 0.5, "rope_layers": (True, False), "qk_norm_over": "all", "embed_scale": 3.0, "residual_scale": 0.5,
  "attention_scale": 0.1, "logit_divisor": 2.0, "kind": "linear", "beta_fast": 8.0, "beta_slow": 0.5,
  "attention_factor": 1.5, "truncate": False, "activation": "gelu_tanh", "parallel": True, "sliding_window": 4,
  "sliding_layers": (False, True), "local_rope_theta": 10.0, "attention_softcap": 1.0, "logit_softcap": 1.0,
}  # fmt: skip


@functools.cache  # most fields are compared with one model
def _logits(config, gates, lora):
  model = tiny.model(config, gates, lora)
  hidden, _ = whole(model, jnp.arange(30)[None] % 97, eviction=Eviction(threshold=0.0))
  return np.asarray(unembed(model, hidden))


@pytest.mark.parametrize(
  "kind, field",
  [(kind, f.name) for kind, cls in (("model", type(tiny.config())), ("rope", RopeScaling), ("dms", DMSConfig),
   ("lora", LoRAConfig)) for f in dataclasses.fields(cls) if f.name not in ELSEWHERE],
)  # fmt: skip
def test_no_dead_field(kind, field):
  """Changing any field of any config changes what the model computes. A new field must be entered above."""
  value = CHANGES[f"{kind}.{field}" if f"{kind}.{field}" in CHANGES else field]
  if field == "family":
    names = {f: [s.hf_name for s in param_table(tiny.config(**FAMILIES[f])).values()] for f in ("llama", "qwen2")}
    assert names["llama"] != names["qwen2"]
    return
  configs = {
    "model": tiny.config(num_kv_heads=2),
    "rope": RopeScaling(4.0, 1.0, 4.0, 32),
    "dms": tiny.dms(shift=1),
    "lora": LoRAConfig(2),
  }
  results = []
  for changed in (False, True):
    parts = dict(configs)
    if field in ("beta_fast", "beta_slow", "truncate"):
      parts[kind] = dataclasses.replace(parts[kind], kind="yarn", original_max_position_embeddings=500)
    if field == "qk_norm_over":
      parts[kind] = dataclasses.replace(parts[kind], qk_norm=True)
    if field in ("sliding_window", "sliding_layers", "local_rope_theta"):
      parts[kind] = dataclasses.replace(parts[kind], sliding_window=6, sliding_layers=(True, False))
    if changed:
      extra = {"num_heads": 8} if field == "num_kv_heads" else {}
      parts[kind] = dataclasses.replace(parts[kind], **{field: value}, **extra)
    elif field == "num_kv_heads":
      parts[kind] = dataclasses.replace(parts[kind], num_heads=8)
    parts["dms"] = dataclasses.replace(parts["dms"], window=parts["model"].ring_window or parts["dms"].window)
    cfg = dataclasses.replace(parts["model"], rope_scaling=parts["rope"]) if kind == "rope" else parts["model"]
    results.append(_logits(cfg, parts["dms"], parts["lora"] if kind == "lora" else None))
  before, after = results
  assert before.shape != after.shape or np.abs(before - after).max() > 1e-4
