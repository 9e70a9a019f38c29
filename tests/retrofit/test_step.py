"""The training step: NVIDIA's reference losses and gradients, and the data order."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.json_files import from_json, to_json
from dms_jax.layers import rms_norm
from dms_jax.model import Eviction, forward
from dms_jax.params import flatten, param_table
from dms_jax.retrofit import DataConfig, RetrofitConfig, ScheduleConfig, losses, schedule
from dms_jax.retrofit.data import Packer, Source, documents, load_sources
from dms_jax.retrofit.step import (
  Batch,
  _compression_metrics,
  init_state,
  logistic_noise,
  loss_fn,
  split_trained,
  train_step,
  trained_model,
)
from pallas_kernels.common.softmax import soft_capped
from tests.helpers import changed, load_golden

FLOAT32 = changed(RetrofitConfig(seq_len=24, batch_size=2), memory__compute_dtype="float32", loss__teacher="same")


quick_loss = jax.jit(loss_fn, static_argnames=("config",), compiler_options=tiny.QUICK)
quick_forward = jax.jit(forward, compiler_options=tiny.QUICK)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", ["separate_head", "neuron_head"])
def test_golden_step(kind):
  """NVIDIA's losses and gradients; the neuron's pass through q_norm at scale 1000 and agree to fewer digits."""
  model, g = load_golden(kind)
  cr = jnp.float32(1 / (1 - float(g["train_target"])))
  batch = Batch(jnp.asarray(g["input_ids"], jnp.int32))

  def loss(params):
    student = model.replace(params=params)
    teacher = model.replace(params=jax.lax.stop_gradient(params))
    return loss_fn(student, teacher, batch, jnp.asarray(g["train_noise"]), cr, FLOAT32)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=tiny.QUICK)
  (_, metrics), grads = run(model.params)
  assert abs(metrics["kl"] - g["train_distil_loss"]) < 1e-7
  assert abs(metrics["compression_loss"] - g["train_dms_loss"]) < 1e-7
  assert abs(metrics["evicted_fraction"] - g["train_frac_closed"]) < 1e-7
  checked = 0
  for path, spec in param_table(model.config, model.dms).items():
    for layer in range(model.config.num_layers):
      want = g.get("grad." + spec.hf_name.format(layer=layer)) if spec.layered else None
      if want is not None:
        got = np.asarray(flatten(grads)[path][layer]).reshape(want.shape)
        tolerance = 1e-4 if kind == "separate_head" else 2e-3
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), (path, layer)
        checked += 1
  assert checked == {"separate_head": 12, "neuron_head": 6}[kind]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_direction(direction):
  rng = np.random.default_rng(0)
  s, t = jnp.asarray(rng.normal(size=(2, 3, 11)), jnp.float32)
  p, q = (log_softmax(s), log_softmax(t)) if direction == "reverse" else (log_softmax(t), log_softmax(s))
  want = (np.exp(p) * (p - q)).sum(axis=-1)
  np.testing.assert_allclose(losses.kl_divergence(s, t, direction), want, atol=1e-6)


@pytest.mark.parametrize(
  "kind, softcap",
  [("reverse_kl", None), ("forward_kl", None), ("lm", None), ("reverse_kl", 20.0), ("forward_kl", 20.0)],
)
def test_vocabulary_loss_is_chunked_exactly(kind, softcap):
  """With any chunks of positions and vocabulary, loss and both gradients equal those of whole logits under a mask.

  Logits up to +-60, so that a sum without a running maximum would overflow. Tolerance: float32 sums in another order.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape, scale=1.0: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
  student, teacher, heads = normal(2, 7, 5, scale=5.0), normal(2, 7, 5, scale=5.0), [normal(300, 5), normal(300, 5)]
  mask, targets = jnp.asarray(rng.random((2, 7)) < 0.7), jnp.asarray(rng.integers(0, 300, (2, 7)), jnp.int32)

  def whole(student, head):
    logits = jnp.einsum("btd,vd->btv", student, head, precision="highest")
    original = jnp.einsum("btd,vd->btv", teacher, heads[1], precision="highest")
    logits, original = (soft_capped(x, softcap) for x in (logits, original))
    if kind == "lm":
      each = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    else:
      each = losses.kl_divergence(logits, original, kind.removesuffix("_kl"))
    return jnp.sum(jnp.where(mask, each, 0.0)) / mask.sum().astype(jnp.float32)

  against = {"targets": targets} if kind == "lm" else {"teacher": teacher, "teacher_head": heads[1]}
  against["softcap"] = softcap
  want, (want_x, want_head) = jax.value_and_grad(whole, argnums=(0, 1))(student, heads[0])
  for chunk, vocab_chunk in ((4, 128), (14, 100), (100, 10_000)):
    fn = functools.partial(losses.vocabulary_loss, kind, mask=mask, **against, chunk=chunk, vocab_chunk=vocab_chunk)
    fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)), compiler_options=tiny.QUICK)
    got, (x, head) = fn(student, heads[0])
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(x, want_x, atol=3e-6 * np.abs(want_x).max())
    np.testing.assert_allclose(head, want_head, atol=3e-6 * np.abs(want_head).max())
  frozen = lambda head: losses.vocabulary_loss(kind, student, head, mask, **against, train_head=False)
  assert not np.any(jax.grad(frozen)(heads[0]))


def test_logits_of_a_large_vocabulary_are_never_whole():
  """Vocabulary of 128K: loss and gradients need less than a tenth of the memory of one chunk of positions' logits."""
  vocab, positions, chunk, width = 128256, 256, 64, 8
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

  def loss(x, head, teacher, teacher_head, mask):
    return losses.vocabulary_loss(
      "reverse_kl", x, head, mask, teacher=teacher, teacher_head=teacher_head, chunk=chunk, vocab_chunk=2048
    )

  x, head = shape(1, positions, width), shape(vocab, width)
  args = (x, head, x, head, jax.ShapeDtypeStruct((1, positions), jnp.bool_))
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
  gradient = 4 * vocab * width  # of the head, accumulated
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * gradient + 4 * vocab * chunk / 10


def test_compression_loss_is_one_sided_per_row():
  fraction = jnp.asarray([0.9, 0.5])
  loss, grad = jax.value_and_grad(losses.compression_loss)(fraction, jnp.float32(4.0))
  np.testing.assert_allclose(loss, (0.0 + 0.25) / 2)
  np.testing.assert_allclose(grad, [0.0, -0.5])


def test_hard_decisions_carry_the_sigmoid_gradient():
  z = jnp.asarray([-2.0, -1e-3, 1e-3, 3.0])
  np.testing.assert_array_equal(losses.hard_decisions(z), [0, 0, 1, 1])
  grad = jax.grad(lambda z: losses.hard_decisions(z).sum())(z)
  sigmoid = 1 / (1 + np.exp(-np.asarray(z)))
  np.testing.assert_allclose(grad, sigmoid * (1 - sigmoid), rtol=1e-5)


def ids_equal(batch, b, t):
  return batch.segment_ids is None or batch.segment_ids[b, t] == batch.segment_ids[b, t + 1]


def numpy_losses(model, batch, noise, cr, config):
  """Both losses in plain numpy from the model's states and z."""
  hidden, z = quick_forward(
    model, batch.tokens, segment_ids=batch.segment_ids, eviction=Eviction(noise=noise, tau=config.loss.tau)
  )
  teacher, _ = quick_forward(model, batch.tokens, segment_ids=batch.segment_ids)
  head = np.asarray(model.params["embed" if model.config.tie_embeddings else "lm_head"], np.float64)
  s, t = (
    log_softmax(np.asarray(rms_norm(h, model.params["final_norm"], model.config.rms_norm_eps), np.float64) @ head.T)
    for h in (hidden, teacher)
  )
  kl = (np.exp(s) * (s - t)).sum(axis=-1)
  tokens = np.asarray(batch.tokens)
  real = np.ones(tokens.shape, bool) if batch.segment_ids is None else np.asarray(batch.segment_ids) > 0
  counted = real & ~np.isin(tokens, model.config.eos_token_ids)
  if batch.loss_mask is not None:  # the next token is in the mask and in the same document
    for b, t in np.argwhere(counted):
      counted[b, t] = t + 1 < tokens.shape[1] and batch.loss_mask[b, t + 1] and ids_equal(batch, b, t)
  fraction = [(np.asarray(z)[:, b][..., real[b]] > 0).mean() for b in range(len(tokens))]
  return kl[counted].mean(), np.mean([max(1 - 1 / cr - f, 0) for f in fraction])


@pytest.mark.parametrize("gate", ["adapter", "neuron"])
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_losses_with_eos_padding_and_packing(gate, granularity):
  """Not covered by the reference outputs: end of text in a row, padding, packed documents, rows above the target."""
  cfg = tiny.config(eos_token_ids=(3,))
  model = tiny.model(cfg, tiny.dms(gate=gate, granularity=granularity, window=3))
  tokens = tiny.tokens(cfg, 3, 24).at[0, 5].set(3)
  ids = np.ones((3, 24), np.int32)
  ids[1, 10:] = 2
  ids[2, 17:] = 0
  prompts = np.ones((3, 24), bool)
  prompts[0, :4], prompts[1, 10:15], prompts[2, 17:] = False, False, False
  noise = logistic_noise(jax.random.key(1), (cfg.num_layers, 3, cfg.num_kv_heads, 24))
  for cr, mask in ((1.2, None), (8.0, jnp.asarray(prompts))):  # below and above what the random gates evict
    batch = Batch(tokens, jnp.asarray(ids), mask)
    _, metrics = quick_loss(model, model, batch, noise, jnp.float32(cr), FLOAT32)
    kl, compression = numpy_losses(model, batch, noise, cr, FLOAT32)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["compression_loss"], compression, atol=1e-6)


def test_packed_documents_train_as_if_alone():
  """Two documents in a row have the states that each has alone: attention, positions and decisions stay apart."""
  model = tiny.model(gates=tiny.dms(window=2))
  tokens = tiny.tokens(model.config, 1, 20)
  ids = jnp.asarray([[1] * 8 + [2] * 12], jnp.int32)
  noise = logistic_noise(jax.random.key(0), (2, 1, 2, 20))
  run = lambda t, n, ids=None: quick_forward(model, t, segment_ids=ids, eviction=Eviction(noise=n))[0]
  packed = run(tokens, noise, ids)
  np.testing.assert_allclose(packed[:, :8], run(tokens[:, :8], noise[..., :8]), atol=1e-5)
  np.testing.assert_allclose(packed[:, 8:], run(tokens[:, 8:], noise[..., 8:]), atol=1e-5)


def test_layer_granularity_uses_the_first_head_and_its_noise():
  model = tiny.model(gates=tiny.dms(granularity="layer"))
  tokens, noise = tiny.tokens(model.config, 2, 20), logistic_noise(jax.random.key(0), (2, 2, 2, 20))
  _, z = forward(model, tokens, eviction=Eviction(noise=noise))
  np.testing.assert_array_equal(z[:, :, 0], z[:, :, 1])
  other = noise.at[:, :, 1].add(5.0)
  np.testing.assert_array_equal(z, forward(model, tokens, eviction=Eviction(noise=other))[1])


def _set_up(trainable="lora", **overrides):
  defaults = dict(trainable=trainable, optimizer__learning_rate=1e-2, schedule__steps=8)
  config = changed(FLOAT32, **{**defaults, **overrides})
  lora = LoRAConfig(rank=2) if trainable == "lora" else None
  student = tiny.model(gates=tiny.dms(window=3), lora=lora)
  trained, frozen = split_trained(student, trainable)
  return config, student.replace(params=frozen), tiny.model(), init_state(config, trained)


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("trainable", ["gates", "lora", "all"])
def test_training_moves_only_what_it_should(trainable):
  config, student, teacher, state = _set_up(trainable)
  before = jax.tree.map(np.asarray, flatten(state.trained))
  batch = Batch(tiny.tokens(student.config, 2, 24))
  state, metrics = train_step(state, student, teacher, batch, jax.random.key(0), config)
  assert np.isfinite(metrics["loss"]) and int(state.step) == 1
  after = flatten(state.trained)
  groups = {param_table(student.config, student.dms, student.lora)[path].group for path in after}
  assert groups == {"gates": {"gate"}, "lora": {"gate", "lora"}, "all": {"base", "gate"}}[trainable]
  assert all(np.any(before[path] != after[path]) for path in after)


@pytest.mark.standard_promotion  # optax
def test_compression_rises_and_distillation_falls():
  """Gates that evict too little learn to evict; the loss of a fixed batch falls."""
  config, student, teacher, state = _set_up(
    "lora", schedule__initial_cr=4.0, schedule__final_cr=4.0, optimizer__warmup_steps=0, schedule__steps=60
  )
  batch = Batch(tiny.tokens(student.config, 2, 24))
  lines = []
  for _ in range(60):
    state, metrics = train_step(state, student, teacher, batch, jax.random.key(0), config)
    lines.append(jax.device_get(metrics))
  assert np.mean([m["loss"] for m in lines[-5:]]) < 0.6 * np.mean([m["loss"] for m in lines[:5]])
  assert lines[-1]["evicted_fraction"] > 0.6


@pytest.mark.standard_promotion  # optax
def test_microbatches_accumulate_the_mean_gradient():
  """With equal noise in each part (none: a huge tau removes it), two halves give the step of the whole batch."""
  whole = _set_up(loss__teacher="original", loss__tau=1e6)
  batch = Batch(tiny.tokens(whole[1].config, 4, 24))
  results = []
  for count in (1, 2):
    config, student, teacher, state = _set_up(loss__teacher="original", loss__tau=1e6, microbatches=count, batch_size=4)
    results.append(train_step(state, student, teacher, batch, jax.random.key(0), config)[1])
  np.testing.assert_allclose(results[0]["kl"], results[1]["kl"], rtol=1e-4)
  np.testing.assert_allclose(results[0]["grad_norm"], results[1]["grad_norm"], rtol=1e-3)


def test_schedules():
  config = changed(
    RetrofitConfig(), schedule=ScheduleConfig(steps=1000, steps_per_cr=100, final_cr=8.0),
    optimizer__warmup_steps=10, optimizer__decay_steps=100,
  )  # fmt: skip
  faded = changed(config, schedule__fade_steps=40)
  assert [float(schedule.target_cr(faded, s)) for s in (0, 40, 90, 340)] == [1.0, 1.0, 1.5, 4.0]
  np.testing.assert_allclose([schedule.neuron_kept(faded, s) for s in (0, 10, 40)], [1.0, 0.75, 0.0])
  assert faded.schedule.step_of_cr(4) == 340
  assert [float(schedule.target_cr(config, s)) for s in (0, 50, 300, 700, 999)] == [1.0, 1.5, 4.0, 8.0, 8.0]
  assert config.schedule.step_of_cr(4) == 300
  rates = lambda config, *steps: np.asarray([float(schedule.learning_rate(config, step)) for step in steps]) * 1e3
  np.testing.assert_allclose(rates(config, 0, 9, 500, 950), [0.1, 1, 1, 0.5], rtol=1e-5)
  falling = changed(config, optimizer__decay_steps=-1, optimizer__final_rate=0.1)
  np.testing.assert_allclose(rates(falling, 0, 9, 10, 505, 1000), [0.1, 1, 1, 0.55, 0.1], rtol=1e-5)
  constant = changed(config, optimizer__warmup_steps=0, optimizer__decay_steps=0)
  np.testing.assert_allclose(rates(constant, 0, 999), 1.0, rtol=1e-5)


def test_steps_of_a_run_for_one_cr():
  """Ramp, hold and decay add up to the steps; a resumed run reads them back."""
  schedule = ScheduleConfig(steps=0, final_cr=3.5, steps_per_cr=40, hold_steps=20)
  config = changed(RetrofitConfig(), schedule=schedule, optimizer__decay_steps=60)
  assert config.schedule.steps == 100 + 20 + 60
  assert from_json(RetrofitConfig, to_json(config)) == config
  assert changed(RetrofitConfig(), schedule=ScheduleConfig(steps=0)).schedule.steps == 700
  with pytest.raises(
    ValueError, match=r"schedule\.steps=180 is not the ramp's 120 steps \+ hold_steps=20 \+ optim.*=60"
  ):
    changed(config, schedule__final_cr=4.0)
  with pytest.raises(ValueError, match=r"schedule: objective=lm has no ramp of the CR; give steps alone"):
    changed(RetrofitConfig(), objective="lm", schedule__steps=0)


@pytest.mark.standard_promotion  # optax
def test_another_schedule_compiles_nothing():
  """Target CR, hold, decay, learning rate and seed are traced; the step follows them."""
  counted = jax.jit(train_step.__wrapped__, static_argnames=("fading",), compiler_options=tiny.QUICK)
  counted.clear_cache()  # of other tests
  batch, lines = Batch(tiny.tokens(tiny.config(), 2, 24)), []
  for overrides in (
    {}, {"schedule__final_cr": 5.0}, {"schedule__initial_cr": 3.0, "schedule__steps_per_cr": 3, "seed": 5},
    {"schedule__steps": 60, "optimizer__decay_steps": 60}, {"optimizer__learning_rate": 1e-4},
    {"optimizer__warmup_steps": 1}, {"loss__compression_weight": 0.5},
  ):  # fmt: skip
    config, student, teacher, state = _set_up("lora", **overrides)
    state, metrics = counted(state, student, teacher, batch, jax.random.key(0), config)
    lines.append([float(metrics[name]) for name in ("target_cr", "learning_rate", "loss")])
    expected = schedule.target_cr(config, 0), schedule.learning_rate(config, 0)
    np.testing.assert_allclose(lines[-1][:2], np.asarray(expected, np.float32), rtol=1e-6)
  assert counted._cache_size() == 1 and len({tuple(line) for line in lines}) == 4


def test_a_trained_model_outlives_the_next_step():
  """The state's buffers are deleted by the next step; those of the model are its own, gates and float32 too."""
  _, student, _, state = _set_up("all")
  kept = trained_model(student, state.trained, jnp.float32)
  jax.tree.map(lambda x: x.delete(), state.trained)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept.params))


@pytest.mark.parametrize(
  "wrong",
  [
    {"trainable": "some"},
    {"loss__tau": 0.0},
    {"schedule__initial_cr": 9.0},
    {"microbatches": 3},
    {"saving__ema_decay": 1.0},
  ],
)
def test_config_names_the_culprit(wrong):
  with pytest.raises(ValueError, match="retrofit." + next(iter(wrong)).replace("__", ".")):
    changed(RetrofitConfig(), **wrong)


def test_lora_without_low_rank_updates_is_refused():
  with pytest.raises(ValueError, match=r"lora\.rank"):
    split_trained(tiny.model(gates=DMSConfig()), "lora")


class Letters:
  """A tokenizer of characters."""

  eos_token_ids = (0,)

  def encode(self, text):
    return [ord(c) % 90 + 1 for c in text]

  def chat(self, messages, add_generation_prompt=False):
    return "".join(m["content"] for m in messages)


def test_sources_of_every_kind(tmp_path):
  (tmp_path / "plain.txt").write_text("abc")
  (tmp_path / "records.jsonl").write_text(
    json.dumps({"text": "ab"}) + "\n\n" + json.dumps({"messages": [{"role": "user", "content": "c"}]}) + "\n"
  )
  (tmp_path / "list.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
  sources = load_sources(DataConfig(paths=(str(tmp_path / "plain.txt"), str(tmp_path / "*.json*"))), Letters())
  assert sources[0].document.tolist() == [1, 1, 1, 1] and sources[0].tokens[-1] == 0
  assert sources[1].document.tolist() == [1] * 4 + [2] * 3 + [3] * 2  # list.json sorts before records.jsonl
  for name, content, culprit in (
    ("bad.jsonl", '{"text": "a"}\n{"te', "bad.jsonl:2: not valid JSON"),
    ("keys.jsonl", '{"title": "a"}', r"keys.jsonl:1.*title"),
    ("latin.txt", b"\xff\xfe\xfa", "latin.txt:1: not UTF-8"),
  ):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=culprit):
      load_sources(DataConfig(paths=(str(path),)), Letters())
  with pytest.raises(ValueError, match=r"data\.paths.*nowhere"):
    load_sources(DataConfig(paths=(str(tmp_path / "nowhere"),)), Letters())


def test_packer_is_a_function_of_seed_and_step():
  tokens = np.arange(300, dtype=np.int32)
  one = Source("one", tokens, np.ones(300, np.int32))
  many = Source("many", tokens, np.repeat(np.arange(1, 31, dtype=np.int32), 10))
  config = RetrofitConfig(seq_len=24, batch_size=2)
  data = DataConfig(paths=("one", "many"), weights=(1.0, 3.0))
  packer = Packer([one, many], data, config)
  again = Packer([one, many], data, config)
  for step in (0, 5, 5, 2):
    jax.tree.map(np.testing.assert_array_equal, packer.batch(step), again.batch(step))
  rows = [packer.batch(step) for step in range(200)]
  share = np.mean([(row.segment_ids[i] == 1).all() for row in rows for i in range(2)])
  assert 0.15 < share < 0.35  # of the source that has one document
  assert all((np.diff(row.tokens) == 1).all() and row.segment_ids.min() == 1 for row in rows)
  assert Packer([one], DataConfig(paths=("one",)), config).batch(0).segment_ids is None
  with pytest.raises(ValueError, match="less than a row"):
    Packer([one], DataConfig(paths=("one",)), RetrofitConfig(seq_len=400))


def test_padding_counts_as_no_compression():
  """Tokens held are those of the real ones, whose window ends at the last of them."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 2, 12)), jnp.float32)
  padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 0), (0, 5)), constant_values=9.0)
  real = jnp.arange(17)[None] < 12
  dms = tiny.dms(window=3)
  alone, beside = _compression_metrics(dms, logits, jnp.ones((1, 12), bool)), _compression_metrics(dms, padded, real)
  assert float(alone["held_share"]) == float(beside["held_share"]) < 1


def test_half_a_surrogate_pair_leaves_its_line_out(tmp_path):
  """JSON can write it, and other programs do; it is no character. Lines in their raw bytes are no UTF-8 either."""
  lines = [{"text": "a"}, {"text": "b\ud800"}, {"text": "c", "prompt": "\udfff"}, {"text": "d"}]
  (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
  (tmp_path / "y.txt").write_bytes(b"one\n\xed\xa0\x80 two\nthree")
  (tmp_path / "z.json").write_text(json.dumps(lines))
  for name, texts, named in (
    ("x.jsonl", ["a", "d"], "line 2, 3"), ("y.txt", ["one\nthree"], "line 2"), ("z.json", ["a", "d"], "record 1, 2"),
  ):  # fmt: skip
    with pytest.warns(UserWarning, match=f"{name}: {named}: half of a surrogate pair .* left out") as warned:
      assert [text for _, text in documents(tmp_path / name, Letters(), ())] == texts
    assert len(warned) == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
  """Editors of Windows write it; a device has no end."""
  for name, content in (("a.txt", "text"), ("b.jsonl", '{"text": "text"}\n'), ("c.json", '[{"text": "text"}]')):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [text for _, text in documents(tmp_path / name, Letters(), ())] == ["text"]
  with pytest.raises(ValueError, match="/dev/zero: a device"):
    next(documents(Path("/dev/zero"), Letters(), ()))
