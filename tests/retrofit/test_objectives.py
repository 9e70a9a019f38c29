"""Objectives of other methods: losses and gradients against plain numpy; runs resume and load."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint, policies
from dms_jax import testing as tiny
from dms_jax.attention import layer_softmax
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.json_files import from_json, to_json
from dms_jax.params import flatten, unflatten
from dms_jax.retrofit import (
  DataConfig,
  LossConfig,
  MemoryConfig,
  OptimizerConfig,
  RetrofitConfig,
  SavingConfig,
  ScheduleConfig,
  TRIMKVConfig,
  decay,
  dmc,
  kvzap,
  loop,
  trimkv,
)
from dms_jax.retrofit.batch import Batch
from dms_jax.retrofit.config import check
from dms_jax.retrofit.data import Packer, Source
from dms_jax.retrofit.loop import Run, train
from dms_jax.tokenizer import byte_tokenizer
from pallas_kernels.window_bias import xla
from tests import oracle, trained_oracle
from tests.helpers import TEMPLATE, changed

MODEL = tiny.config(num_layers=2, d_model=16, d_ff=16, head_dim=8, vocab_size=257)
LENGTH = 12
CONFIG = RetrofitConfig(
  trainable="gates",
  batch_size=2,
  seq_len=LENGTH,
  schedule=ScheduleConfig(steps=10),
  optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
  loss=LossConfig(kind="forward_kl", bound=1e4),
  memory=MemoryConfig(compute_dtype="float32", loss_chunk=16, vocab_chunk=64),
  saving=SavingConfig(save_every=4),
  trimkv=TRIMKVConfig(capacity=3),
)
GATES = {"trimkv": tiny.dms(objective="trimkv", hidden=8, offset=-2.0), "kvzap": tiny.dms(objective="kvzap", hidden=8)}
SEGMENTS = np.array([[1] * LENGTH, [1] * 5 + [2] * 7])


# Losses and gradients -------------------------------------------------------------------------------------------------


def naive_attention(q, k, v, log_beta, causal, weights):
  """(attended [T, N, H], gradients of its sum with `weights`, by q, k, v and log_beta): the derivative of softmax."""
  group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
  out, grads = np.zeros(q.shape), [np.zeros(x.shape) for x in (q, k, v, log_beta)]
  age = np.arange(len(q))[:, None] - np.arange(len(q))[None]
  for n in range(q.shape[1]):
    h = n // group
    p = oracle._softmax(np.where(causal, q[:, n] @ k[:, h].T * scale + age * log_beta[h], -np.inf))
    out[:, n] = p @ v[:, h]
    dp = weights[:, n] @ v[:, h].T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    grads[0][:, n] += ds @ k[:, h] * scale
    grads[1][:, h] += ds.T @ q[:, n] * scale
    grads[2][:, h] += p.T @ weights[:, n]
    grads[3][h] += (ds * age).sum(0)
  return out, grads


@pytest.mark.parametrize("block", [5, 512])
def test_retention_gated_attention(block, monkeypatch):
  """Attention, soft sizes and gradients, for two packed documents, in blocks of queries; float32 sums of 12 terms."""
  monkeypatch.setattr(xla, "BLOCK", block)
  monkeypatch.setattr(xla, "STAGES", 2)
  rng = np.random.default_rng(0)
  q, k, v, weights = (rng.standard_normal((1, LENGTH, n, 4)) for n in (4, 2, 2, 4))
  log_beta = -rng.exponential(0.3, (1, 2, LENGTH))
  causal = np.tril(np.ones((LENGTH,) * 2, bool)) & (SEGMENTS[1][:, None] == SEGMENTS[1][None])
  expected, grads = naive_attention(q[0], k[0], v[0], log_beta[0], causal, weights[0])
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v, log_beta)]
  ids = jnp.asarray(SEGMENTS[1:], jnp.int32)
  total = lambda *args: jnp.sum(decay.decay_attention(*args, ids) * weights.astype(np.float32))
  np.testing.assert_allclose(decay.decay_attention(*args, ids)[0], expected, atol=2e-6)
  for got, want in zip(jax.grad(total, (0, 1, 2, 3))(*args), grads, strict=True):
    np.testing.assert_allclose(got[0], want, atol=1e-5 * max(np.abs(want).max(), 1.0))
  sizes = np.array(
    [[sum(math.exp((t - i) * b[i]) for i in range(t + 1) if causal[t, i]) for t in range(LENGTH)] for b in log_beta[0]]
  )
  np.testing.assert_allclose(decay.soft_sizes(args[3], ids)[0], sizes, rtol=1e-5)
  age, share = np.arange(LENGTH)[:, None] - np.arange(LENGTH), rng.standard_normal(sizes.shape)
  terms = np.where(
    causal, age * np.exp(np.where(causal, age, 0) * log_beta[0][:, None]), 0.0
  )  # d size_t / d log beta_i
  slopes = jax.grad(lambda x: jnp.sum(decay.soft_sizes(x, ids)[0] * share.astype(np.float32)))(args[3])[0]
  np.testing.assert_allclose(slopes, np.einsum("kt,kti->ki", share, terms), atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_merging_attention(window):
  """Relaxed decisions: attention, and its derivative in a random direction; two documents; float32 sums of 12 terms."""
  rng = np.random.default_rng(0)
  q, k, v, weights = (rng.standard_normal((LENGTH, n, 4)) for n in (4, 2, 2, 4))
  z, omega = rng.standard_normal((2, LENGTH)) * 2, rng.random((2, LENGTH)) + 0.1
  args, segments = (q, k, v, z, omega), SEGMENTS[1]
  expected = trained_oracle.merging(*args, window, segments)
  ids, ours = jnp.asarray(segments[None], jnp.int32), [jnp.asarray(x[None], jnp.float32) for x in args]
  attend = jax.jit(lambda *args: dmc.merging_attention(*args, window, ids))
  np.testing.assert_allclose(attend(*ours)[0], expected, atol=5e-6)
  moves = [rng.standard_normal(x.shape) for x in args]
  at = lambda step: (
    trained_oracle.merging(*(x + step * m for x, m in zip(args, moves, strict=True)), window, segments) * weights
  ).sum()
  loss = lambda *args: jnp.sum(attend(*args)[0] * weights.astype(np.float32))
  grads = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*ours)
  slope = sum((np.asarray(g[0]) * m).sum() for g, m in zip(grads, moves, strict=True))
  np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 12, 50])
def test_sums_that_decay(length):
  """In chunks of about sqrt(T), against the recursion; some decays are 0, others near 1. Float32 sums of 50 terms."""
  rng = np.random.default_rng(length)
  x, decay = rng.standard_normal((2, length, 3, 4)), rng.uniform(0.0, 1.0, (2, length, 3)) ** rng.choice([0.01, 5], 3)
  gone = rng.random(decay.shape) < 0.1
  expected, last = np.zeros(x.shape), 0.0
  for t in range(length):
    expected[:, t] = last = np.where(gone, 0.0, decay)[:, t, :, None] * last + x[:, t]
  log_decay = np.where(gone, dmc.FORGETS, np.log(decay))
  out = jax.jit(dmc.prefix_sums)(*(jnp.asarray(y, jnp.float32) for y in (x, log_decay)))
  np.testing.assert_allclose(out, expected, atol=1e-5)


def whole_merging(q, k, v, z, omega, window, segments, softcap=None, sinks=None):
  """`dmc.merging_attention` of one row from whole matrices in JAX: slots by all decays, one softmax over both parts."""
  t, group = len(q), q.shape[1] // k.shape[1]
  j, i = np.arange(t)[:, None], np.arange(t)  # token j, token i before it
  own = segments[:, None] == segments
  alpha = jnp.where(np.diff(segments, prepend=-1) != 0, 0.0, jax.nn.sigmoid(z))
  past = (i[:, None, None] < i) & (i <= j)  # [i, j, m]: i < m <= j
  decays = jnp.prod(jnp.where(past[None], alpha[:, None, None], 1.0), axis=-1)  # [K, i, j]
  weights = jnp.where((i <= j) & own, jnp.swapaxes(decays, 1, 2) * omega[:, None], 0.0)  # [K, j, i]
  weights = weights / weights.sum(axis=-1, keepdims=True)
  slots = [jnp.einsum("kji,ikh->jkh", weights, x) for x in (k, v)]
  bias = jnp.concatenate([jnp.log1p(-alpha[:, 1:]), jnp.zeros_like(alpha[:, :1])], axis=1)
  k, v, *slots, bias = (jnp.repeat(x, group, axis) for x, axis in ((k, 1), (v, 1), *((s, 1) for s in slots), (bias, 0)))

  def score(keys):
    scores = jnp.einsum("tnh,snh->nts", q, keys) / math.sqrt(q.shape[-1])
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

  age = j - i
  seen = own & (age >= 0)
  near = jnp.where(seen & (age <= window), score(k), -jnp.inf)
  far = jnp.where(seen & (age > window), score(slots[0]) + jnp.where(age > window + 1, bias[:, None], 0.0), -jnp.inf)
  more = [] if sinks is None else [jnp.broadcast_to(sinks[:, None, None], (*near.shape[:2], 1))]
  p = jax.nn.softmax(jnp.concatenate([near, far, *more], axis=-1), axis=-1)
  return jnp.einsum("nts,snh->tnh", p[..., : 2 * t], jnp.concatenate([v, slots[1]]))


@pytest.mark.parametrize(
  ("window", "documents", "bounded"), [(0, True, False), (0, False, True), (3, True, True), (60, True, False)]
)
def test_merging_equals_whole_matrices(window, documents, bounded):
  """Attention and each gradient, in several chunks, against float64; float32 sums of 50 terms."""
  rng, length = np.random.default_rng(window), 50
  q, k, v, cotangent = (rng.standard_normal((length, n, 8)) for n in (4, 2, 2, 4))
  z, omega = rng.standard_normal((2, length)) * 3 + 1, rng.random((2, length)) + 0.01
  segments = np.repeat([0, 1, 2], [20, 1, 29]) if documents else np.zeros(length, int)
  softcap, sinks = (1.5, rng.standard_normal(4)) if bounded else (None, None)

  def value_and_grads(attend, dtype):
    loss = lambda *args: (jnp.sum((out := attend(*args)) * jnp.asarray(cotangent, dtype)), out)
    grads, out = jax.jit(jax.grad(loss, range(5), has_aux=True))(*(jnp.asarray(x, dtype) for x in (q, k, v, z, omega)))
    return [np.asarray(x) for x in (out, *grads)]

  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    expected = value_and_grads(lambda *args: whole_merging(*args, window, segments, softcap, sinks), np.float64)
  ids = jnp.asarray(segments[None], jnp.int32) if documents else None
  with layer_softmax(softcap, None if sinks is None else jnp.asarray(sinks, jnp.float32)):
    ours = value_and_grads(lambda *args: dmc.merging_attention(*(x[None] for x in args), window, ids)[0], np.float32)
  for name, got, want in zip(("out", "q", "k", "v", "z", "omega"), ours, expected, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("window", [0, 3])
def test_merging_is_trained_as_it_is_decoded(window):
  """With hard decisions, training's attention is that of the slots, token by token."""
  rng = np.random.default_rng(2)
  q, k, v = (rng.standard_normal((LENGTH, n, 4)) for n in (4, 2, 2))
  merges, omega = rng.random((2, LENGTH)) < 0.5, rng.random((2, LENGTH)) + 0.1
  expected, _ = trained_oracle.dmc(q.reshape(LENGTH, 2, 2, 4), k, v, merges, omega, window=window)
  args = [jnp.asarray(x[None], jnp.float32) for x in (q, k, v, np.where(merges, 80.0, -80.0), omega)]
  out = jax.jit(dmc.merging_attention, static_argnums=5)(*args, window)[0]
  np.testing.assert_allclose(out, expected.reshape(out.shape), atol=5e-6)


def set_up(objective):
  """(model, flat float64 weights, batch) of a small model with random gates."""
  model = tiny.model(MODEL, GATES[objective])
  flat = {name: np.asarray(x, np.float64) for name, x in flatten(model.params).items()}
  tokens = np.asarray(tiny.tokens(MODEL, 2, LENGTH))
  segments = SEGMENTS if objective == "trimkv" else np.ones_like(SEGMENTS)
  return model, flat, Batch(jnp.asarray(tokens), jnp.asarray(segments, jnp.int32))


def check_gradient(loss_of, expected_of, model, flat):
  """The loss, and its derivative in a random direction of all gate parameters against a central difference."""
  rng, names = np.random.default_rng(1), [name for name in flat if "dms_" in name]
  direction = {name: rng.standard_normal(flat[name].shape) for name in names}
  moved = lambda step: flat | {name: flat[name] + step * direction[name] for name in names}
  expected = expected_of(flat)

  def total(gates):
    return loss_of(model.replace(params=unflatten(flatten(model.params) | gates)))[0]

  loss, grads = jax.jit(jax.value_and_grad(total))({name: flatten(model.params)[name] for name in names})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  slope = (expected_of(moved(1e-5)) - expected_of(moved(-1e-5))) / 2e-5
  assert abs(slope) > 1e-3
  np.testing.assert_allclose(sum((np.asarray(grads[n]) * direction[n]).sum() for n in names), slope, rtol=1e-3)


def test_trimkv_loss():
  """Forward KL, next token and capacity, with packed documents."""
  config = changed(CONFIG, objective="trimkv", loss__compression_weight=0.7, trimkv__lm_weight=0.4)
  model, flat, batch = set_up("trimkv")
  base = model.replace(dms=None, params=unflatten({n: x for n, x in flatten(model.params).items() if "dms_" not in n}))

  def expected_of(weights):
    rows = [
      trained_oracle.trimkv(weights, MODEL, model.dms, np.asarray(batch.tokens)[b], SEGMENTS[b], 3) for b in range(2)
    ]
    kl, count, nll, follow, over = np.sum(np.array(rows), axis=0)
    return kl / count + 0.4 * nll / follow + 0.7 * over / (count * MODEL.num_layers * MODEL.num_kv_heads)

  check_gradient(lambda student: trimkv.loss_fn(student, base, batch, config), expected_of, model, flat)


def test_kvzap_loss(monkeypatch):
  """Scores of the reconstruction in blocks of queries, and the regression of the gates on them."""
  monkeypatch.setattr(kvzap, "BLOCK", 5)
  config, (model, flat, batch) = changed(CONFIG, objective="kvzap"), set_up("kvzap")
  frame = jnp.array([7, 9], jnp.int32), jnp.array([3, 200, 4], jnp.int32)

  def expected_of(weights):
    errors = []
    for row in np.asarray(batch.tokens):
      target, found = trained_oracle.kvzip_plus(weights, MODEL, model.dms, [7, 9], list(row), [3, 200, 4])
      errors.append((target - found) ** 2)
    return np.mean(errors)

  check_gradient(lambda student: kvzap.loss_fn(student, batch, frame, config), expected_of, model, flat)
  found = [
    trained_oracle.kvzip_plus(flat, MODEL, model.dms, [7, 9], list(row), [3, 200, 4])[1]
    for row in np.asarray(batch.tokens)
  ]
  _, metrics = jax.jit(lambda student: kvzap.loss_fn(student, batch, frame, config))(model)
  assert np.mean(np.array(found) < float(metrics["threshold_cr4"]) - 1e-6) == pytest.approx(0.75, abs=0.02)


def test_the_request_to_repeat():
  tokenizer = byte_tokenizer()
  config = changed(CONFIG, objective="kvzap")
  text = lambda ids: tokenizer.decode(np.asarray(ids).tolist())
  first, middle = kvzap.frame(tokenizer, config, 2048)
  assert first.size == 0 and text(middle) == "\n\nRepeat the previous context exactly.\n"
  template = TEMPLATE.replace("{{", "<{{ m['role'] }}>{{") + "<assistant>"
  chatty = dataclasses.replace(tokenizer, settings={**tokenizer.settings, "chat_template": template})
  first, middle = kvzap.frame(chatty, config, 2048)
  assert text(first) == "<user>" and text(middle) == "\n\nRepeat the previous context exactly.<assistant>"
  with pytest.raises(ValueError, match=r"seq_len=12: a text and its repetition are \d+ tokens, more than the 9"):
    kvzap.frame(tokenizer, config, 9)
  with pytest.raises(ValueError, match="needs a tokenizer"):
    kvzap.frame(None, config, 2048)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
  """The same step, compiled four times faster."""
  names = ("config", "fading")
  step = jax.jit(loop.train_step.__wrapped__, static_argnames=names, compiler_options=tiny.QUICK)
  monkeypatch.setattr(loop, "train_step", step)


def a_run(directory, objective, **overrides) -> tuple[Run, Packer]:
  config = changed(CONFIG, objective=objective, **overrides)
  tokens = np.random.default_rng(0).integers(0, 256, 300).astype(np.int32)
  packer = Packer([Source("text", tokens, np.ones(300, np.int32))], DataConfig(paths=("text",)), config)
  run = Run(tiny.model(MODEL), GATES[objective], LoRAConfig(rank=2), config, DataConfig(paths=("text",)), directory)
  return run, packer


def log(directory) -> list[dict]:
  lines = [json.loads(line) for line in (directory / loop.LOG).read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("objective", GATES)
def test_a_run_resumes_and_its_gates_serve_their_policy(objective, tmp_path, quick):
  """The loss falls; a run stopped between two saves ends bit-equal; the retrofit loads and names its objective."""
  train(*a_run(tmp_path / "whole", objective), byte_tokenizer())
  train(*a_run(tmp_path / "parts", objective), byte_tokenizer(), stop_after=6)
  train(*a_run(tmp_path / "parts", objective), byte_tokenizer())
  lines = log(tmp_path / "whole")
  assert log(tmp_path / "parts") == lines and len(lines) == 10
  name = "mse" if objective == "kvzap" else "loss"
  assert np.mean([line[name] for line in lines[-3:]]) < np.mean([line[name] for line in lines[:3]])
  assert not list(tmp_path.glob("whole/cr*"))
  checkpoint.save(tmp_path / "base", tiny.model(MODEL))
  whole, parts = (checkpoint.load(tmp_path / "base", retrofit=tmp_path / name / "final") for name in ("whole", "parts"))
  assert whole.dms == GATES[objective] and whole.dms.objective == objective
  for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
    np.testing.assert_array_equal(x, y)
  policy, most = {
    "trimkv": (policies.TRIMKV(budget=6), 6),
    "kvzap": (policies.KVzap(window=2, threshold=math.inf), 3),
    "dmc": (policies.DMC(threshold=-math.inf), 2),
  }[objective]
  out = dms_jax.generate(whole, [list(range(20))], policy=policy, max_new_tokens=2, eos=False, prefill_chunk=8)
  assert out.metrics.live.max() == most
  with pytest.raises(ValueError, match=f"reads gates trained with retrofit.objective=dms; this .* {objective}"):
    dms_jax.generate(whole, [[1, 2]], policy=policies.DMS(), max_new_tokens=1)


# Configs --------------------------------------------------------------------------------------------------------------


def test_gates_of_an_objective():
  assert DMSConfig() == DMSConfig(gate="adapter", scale=100.0, offset=5.0, shift=1, objective="dms")
  assert to_json(DMSConfig(objective="trimkv")) == to_json(DMSConfig()) | {
    "objective": "trimkv", "gate": "mlp", "scale": 1.0, "offset": -10.0, "shift": 0,
  }  # fmt: skip
  old = {"gate": "neuron", "window": 16, "scale": 100.0, "offset": 5.0, "shift": 0, "granularity": "head"}
  assert from_json(DMSConfig, old).objective == "dms"
  assert DMSConfig(objective="kvzap", gate="linear").gate == "linear"


@pytest.mark.parametrize(
  ("gates", "message"),
  [
    ({"objective": "dmx"}, "dms.objective='dmx' is not one of"),
    ({"objective": "kvzap", "gate": "neuron"}, "dms.gate='neuron' cannot be trained with retrofit.objective=kvzap"),
    ({"objective": "trimkv", "shift": 1}, "dms.shift=1, dms.eviction='delayed': gates of retrofit.objective=trimkv"),
    ({"objective": "dmc", "granularity": "layer"}, "dms.granularity='layer' with retrofit.objective=dmc"),
    ({"hidden": 0}, "dms.hidden=0 must be at least 1"),
  ],
)
def test_gates_that_make_no_sense(gates, message):
  with pytest.raises(ValueError, match=message):
    DMSConfig(**gates)


def test_settings_that_do_not_fit():
  with pytest.raises(ValueError, match=r"dms.objective=dms follows retrofit.objective=trimkv"):
    check(DMSConfig(), LoRAConfig(), changed(CONFIG, objective="trimkv"))
  with pytest.raises(ValueError, match=r"objective=kvzap trains gates alone: retrofit.trainable='lora'"):
    check(GATES["kvzap"], LoRAConfig(rank=2), changed(CONFIG, objective="kvzap", trainable="lora"))
  with pytest.raises(ValueError, match=r"retrofit.trimkv.capacity=0 must be at least 1"):
    changed(CONFIG, trimkv__capacity=0)
