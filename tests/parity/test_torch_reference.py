"""The twin in PyTorch: step, schedules and decoding equal ours, and NVIDIA's training figures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dms_jax
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, RopeScaling
from dms_jax.convert import export
from dms_jax.families.huggingface import config_to_hf
from dms_jax.model import Eviction, Model, forward, unembed
from dms_jax.params import flatten, join_params, param_table
from dms_jax.retrofit import RetrofitConfig, losses, schedule
from dms_jax.retrofit.step import (
  Batch,
  cast_trained,
  init_state,
  logistic_noise,
  loss_fn,
  optimizer,
  split_trained,
  train_step,
)
from tests.helpers import changed, load_golden

torch = pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")

import experiments.torch_reference as twin_package  # noqa: E402
from experiments.torch_reference import attention as twin_attention  # noqa: E402
from experiments.torch_reference import decode as twin_decode  # noqa: E402
from experiments.torch_reference import gates as twin_gates  # noqa: E402
from experiments.torch_reference import losses as twin_losses  # noqa: E402
from experiments.torch_reference import model as twin_model  # noqa: E402
from experiments.torch_reference import schedule as twin_schedule  # noqa: E402
from experiments.torch_reference import step as twin_step  # noqa: E402

LOSS, GRADIENT = 1e-5, 1e-4  # float32 in another order; gradients relative to the largest of their tensor
LOGITS = 4e-5  # of the logits' largest value
quick = functools.partial(jax.jit, compiler_options=tiny.QUICK)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Threads cost more than they save on models of this size."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


# Our model as the twin's ----------------------------------------------------------------------------------------------


def to_torch(x) -> torch.Tensor:
  x = np.array(x)
  return torch.from_numpy(x).long() if x.dtype.kind in "iu" else torch.from_numpy(x)


def twin_names(model: Model) -> dict[str, tuple[str, int | None]]:
  """The twin's name of each tensor -> (path in our parameters, layer)."""
  names = {}
  table = param_table(model.config, model.dms, model.lora)
  for path, spec in table.items():
    name = spec.hf_name
    if name is None:  # a low-rank update: of the projection's name, "_lora_a" or "_lora_b"
      target = path.rsplit("_lora_", 1)[0]
      name = table[target].hf_name.removesuffix("weight") + f"lora_{path[-1].upper()}.weight"
    for layer in range(model.config.num_layers) if spec.layered else [None]:
      names[name.format(layer=layer)] = path, layer
  return names


def twin_tensors(model: Model, flat: dict) -> dict[str, np.ndarray]:
  """Tensors by our paths, those of `flat`, under the twin's names and in its shapes: outputs and inputs flattened."""
  table, out = param_table(model.config, model.dms, model.lora), {}
  for name, (path, layer) in twin_names(model).items():
    if path in flat:
      value, spec = np.asarray(flat[path] if layer is None else flat[path][layer]), table[path]
      outputs = spec.shape[spec.layered : len(spec.shape) - spec.num_inputs]
      out[name] = value.reshape(int(np.prod(outputs)), -1) if spec.num_inputs else value.reshape(-1)
  return out


def twin_of(model: Model) -> tuple[dict[str, torch.Tensor], twin_model.ModelConfig, twin_gates.DMSConfig | None]:
  """(weights, config, gates)."""
  weights = {name: to_torch(x) for name, x in twin_tensors(model, flatten(model.params)).items()}
  config = twin_model.ModelConfig.from_hf(config_to_hf(model.config, "float32"))
  config = dataclasses.replace(config, lora_scale=model.lora.scale if model.lora else 0.0)
  return weights, config, None if model.dms is None else gates_of(model.dms)


def gates_of(dms: DMSConfig) -> twin_gates.DMSConfig:
  return twin_gates.DMSConfig(**{f.name: getattr(dms, f.name) for f in dataclasses.fields(twin_gates.DMSConfig)})


def settings_of(config: RetrofitConfig) -> twin_schedule.RetrofitConfig:
  """Our settings as the twin's: each field by its name, whatever section it is in."""
  sections = [config, config.loss, config.schedule, config.optimizer]
  names = [f.name for f in dataclasses.fields(twin_schedule.RetrofitConfig)]
  return twin_schedule.RetrofitConfig(**{n: next(getattr(s, n) for s in sections if hasattr(s, n)) for n in names})


def batch_of(batch: Batch) -> twin_step.Batch:
  return twin_step.Batch(
    *(None if x is None else to_torch(x) for x in (batch.tokens, batch.segment_ids, batch.loss_mask))
  )


# Settings and formulas ------------------------------------------------------------------------------------------------


def test_defaults_are_ours():
  assert settings_of(RetrofitConfig()) == twin_schedule.RetrofitConfig()
  assert gates_of(DMSConfig()) == twin_gates.DMSConfig()


@pytest.mark.parametrize(
  "changes",
  [{}, {"decay_steps": 30}, {"decay_steps": -1, "warmup_steps": 7, "final_rate": 0.1}, {"warmup_steps": 0}],
  ids=lambda changes: ",".join(changes) or "defaults",
)
def test_schedules(changes):
  config = changed(
    RetrofitConfig(), schedule__steps=90, schedule__fade_steps=20, schedule__steps_per_cr=9, schedule__final_cr=6.5,
    **{f"optimizer__{name}": value for name, value in changes.items()},
  )  # fmt: skip
  settings, steps = settings_of(config), range(95)
  for ours, theirs in (
    (schedule.target_cr, twin_schedule.target_cr),
    (schedule.neuron_kept, twin_schedule.neuron_kept),
    (schedule.learning_rate, twin_schedule.learning_rate),
  ):
    want = [float(ours(config, step)) for step in steps]
    np.testing.assert_allclose([theirs(settings, step) for step in steps], want, rtol=1e-6, atol=1e-7)


def test_losses():
  rng = np.random.default_rng(0)
  z, real = 2 * rng.normal(size=(3, 4, 2, 9)), rng.random((4, 9)) < 0.7
  z = z.astype(np.float32)

  def ours(z):
    fraction = losses.evicted_fraction(z, jnp.asarray(real))
    return losses.compression_loss(fraction, jnp.float32(2.1)), fraction

  (want, fraction), want_grad = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(z))
  leaf = to_torch(z).requires_grad_()
  found = twin_losses.evicted_fraction(leaf, torch.from_numpy(real))
  assert 0 < (np.asarray(fraction) > 1 - 1 / 2.1).sum() < 4  # some rows above the target, some below
  loss = twin_losses.compression_loss(found, 2.1)
  np.testing.assert_allclose(found.detach(), fraction, rtol=1e-6)
  np.testing.assert_allclose(loss.item(), want, rtol=1e-5)
  np.testing.assert_allclose(torch.autograd.grad(loss, leaf)[0], want_grad, rtol=1e-5, atol=1e-9)

  student, teacher = (rng.normal(size=(2, 5, 11)).astype(np.float32) for _ in range(2))
  counted = rng.random((2, 5)) < 0.6
  for kind in ("reverse_kl", "forward_kl"):
    want = losses.kl_divergence(jnp.asarray(student), jnp.asarray(teacher), kind.removesuffix("_kl"))
    found = twin_losses.divergence(kind, to_torch(student), to_torch(teacher), torch.from_numpy(counted))
    np.testing.assert_allclose(found.item(), np.asarray(want)[counted].mean(), rtol=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("window", [0, 3])
def test_the_mask_is_the_formula(window, shift):
  """Entry by entry; after `shift` the last keys are not decided yet."""
  rng, length = np.random.default_rng(0), 9
  evict, segments = rng.random((1, 2, length)) < 0.5, np.array([[1] * 4 + [2] * 5])
  outside = twin_attention.hard_outside(torch.from_numpy(evict), shift)
  mask = twin_attention.additive_mask(outside, window, torch.from_numpy(segments))
  for head, i, j in np.ndindex(2, length, length):
    decided = j + shift < length and evict[0, head, j + shift]
    seen = j <= i and segments[0, i] == segments[0, j] and (i - j <= window or not decided)
    assert mask[0, head, i, j] == (0.0 if seen else -np.inf)


def test_noise_is_logistic():
  """The difference of two Gumbels: mean 0, variance pi^2 / 3, P(noise > 5) = sigmoid(-5). n = 4e5, five sigma."""
  torch.manual_seed(0)
  noise = twin_step.logistic_noise((4, 10, 10, 1000)).numpy()
  assert noise.shape == (4, 10, 10, 1000) and np.isfinite(noise).all()
  assert abs(noise.mean()) < 5 * (np.pi / 3**0.5) / noise.size**0.5
  np.testing.assert_allclose(noise.var(), np.pi**2 / 3, rtol=0.02)
  tail = 1 / (1 + np.exp(5))
  assert abs((noise > 5).mean() - tail) < 5 * (tail / noise.size) ** 0.5


# A retrofit step ------------------------------------------------------------------------------------------------------


def texts(cfg) -> Batch:
  """Three rows: one document with an end of text in it, two packed documents, and padding; two with a prompt."""
  tokens = tiny.tokens(cfg, 3, 24).at[0, 5].set(cfg.eos_token_ids[0])
  ids, counted = np.ones((3, 24), np.int32), np.ones((3, 24), bool)
  ids[1, 10:], ids[2, 17:] = 2, 0
  counted[0, :4], counted[1, 10:15], counted[2, 17:] = False, False, False
  return Batch(tokens, jnp.asarray(ids), jnp.asarray(counted))


def set_up(gate, granularity, trainable, **overrides):
  """(student, teacher, config, batch); gates decide both ways, and the target is above what they evict."""
  cfg = tiny.config(eos_token_ids=(3,))
  cfg = tiny.neuron_config(cfg) if gate == "neuron" else cfg
  # A small scale: at 100 and tau 0.1 sigmoid(z) is 0 or 1 nearly everywhere, and no gradient of the gates is left.
  dms = tiny.dms(gate=gate, granularity=granularity, window=3, scale=3.0, offset=0.5)
  lora = LoRAConfig(rank=2, scale=0.5) if trainable == "lora" else None
  student, teacher = tiny.model(cfg, dms, lora), tiny.model(cfg, seed=1)
  defaults = dict(
    trainable=trainable, memory__compute_dtype="float32", loss__tau=0.5, schedule__initial_cr=5.0, schedule__steps=9,
    optimizer__learning_rate=1e-2, optimizer__warmup_steps=3,
  )  # fmt: skip
  return student, teacher, changed(RetrofitConfig(seq_len=24, batch_size=3), **{**defaults, **overrides}), texts(cfg)


def noise_of(student, batch, step=0):
  """The noise that `train_step` samples."""
  shape = (student.config.num_layers, len(batch.tokens), student.config.num_kv_heads, batch.tokens.shape[1])
  return logistic_noise(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), 0), shape)


def close_to_largest(found: dict, want: dict, tolerance: float):
  assert found.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


def compare_step(gate, granularity, trainable, **overrides):
  """Losses, gradients, and weights after an optimizer step. Returns the gradients by the twin's names."""
  student, teacher, config, batch = set_up(gate, granularity, trainable, **overrides)
  trained, frozen = split_trained(student, trainable)
  noise, cr = noise_of(student, batch), schedule.target_cr(config, 0)
  kept = schedule.neuron_kept(config, 0) if config.schedule.fade_steps else None
  same = config.loss.teacher == "same"

  @quick
  def ours(trained, noise):
    def loss(trained):
      whole = student.replace(params=join_params(frozen, cast_trained(student, trained, jnp.float32)))
      original = whole.replace(params=jax.lax.stop_gradient(whole.params)) if same else teacher
      return loss_fn(whole, original, batch, noise, cr, config, kept)

    (loss, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    updates, _ = optimizer(config).update(grads, optimizer(config).init(trained), trained)
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return metrics, grads, optax.apply_updates(trained, updates)

  metrics, grads, after = ours(trained, noise)
  grads = twin_tensors(student, flatten(grads))
  weights, shape, dms = twin_of(student)
  original = None if same else twin_of(teacher)[0]
  settings, rows = settings_of(config), batch_of(batch)
  state = twin_step.init_state(weights, settings)
  assert state.trained.keys() == grads.keys()
  loss, parts = twin_step.loss_fn(
    state.frozen | state.trained, original, shape, dms, settings, rows, to_torch(noise), float(cr),
    None if kept is None else float(kept),
  )  # fmt: skip
  assert parts["kl"] > 0.01 and (kept is not None or parts["compression_loss"] > 0.01)
  theirs = dict(zip(state.trained, torch.autograd.grad(loss, state.trained.values()), strict=True))
  close_to_largest(theirs, grads, GRADIENT)
  compare_figures(twin_step.train_step(state, original, shape, dms, settings, rows, to_torch(noise)), metrics)
  compare_weights(state, twin_tensors(student, flatten(after)), grads, float(schedule.learning_rate(config, 0)))
  return grads


def compare_figures(figures: dict, metrics: dict):
  for name in ("loss", "kl", "compression_loss", "evicted_fraction"):
    np.testing.assert_allclose(figures[name], metrics[name], rtol=0, atol=LOSS, err_msg=name)
  np.testing.assert_allclose(figures["grad_norm"], metrics["grad_norm"], rtol=GRADIENT)


def compare_weights(state, after: dict, grads: dict, rate: float):
  """Weights after the first step, of `rate`.

  AdamW's first step is close to rate * sign(gradient). Where a gradient is 0 to within its tolerance, its sign is of
  rounding, and all that holds is that both steps are at most `rate`.
  """
  moved = 0
  for name, want in after.items():
    got, grad = state.trained[name].detach().numpy(), np.abs(grads[name])
    certain = grad > GRADIENT * grad.max()
    np.testing.assert_allclose(got[certain], want[certain], rtol=1e-6, atol=1e-3 * rate, err_msg=name)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2 * rate, err_msg=name)
    moved += certain.sum()
  assert moved > 0.9 * sum(np.count_nonzero(g) for g in grads.values())


GATES_OF = [("adapter", "gates"), ("adapter", "lora"), ("adapter", "all"), ("neuron", "lora"), ("neuron", "all")]


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize(("gate", "trainable"), GATES_OF)
def test_a_step_equals_ours(gate, granularity, trainable):
  grads = compare_step(gate, granularity, trainable)
  assert all(np.any(grad) for grad in grads.values())


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("gate", "trainable"), GATES_OF)
def test_a_step_by_forward_kl_equals_ours(gate, trainable):
  compare_step(gate, "head", trainable, loss__kind="forward_kl")


@pytest.mark.standard_promotion
@pytest.mark.parametrize("gate", ["adapter", "neuron"])
def test_a_step_with_the_same_weights_as_teacher_equals_ours(gate):
  compare_step(gate, "head", "all", loss__teacher="same", loss__compression_weight=0.3)


@pytest.mark.standard_promotion
def test_a_step_with_decay_of_weights_and_hard_clipping_equals_ours():
  compare_step("adapter", "head", "lora", optimizer__weight_decay=0.1, optimizer__clip_norm=1e-3)


@pytest.mark.standard_promotion
def test_a_step_of_phase_1_equals_ours():
  compare_step("neuron", "head", "all", schedule__fade_steps=4)


@pytest.mark.standard_promotion
def test_shift_0_and_window_0(monkeypatch):
  dms = tiny.dms
  monkeypatch.setattr(tiny, "dms", lambda **fields: dms(**{**fields, "window": 0, "shift": 0}))
  compare_step("adapter", "head", "lora")


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
  ("gate", "trainable", "fade_steps"), [("adapter", "lora", 0), ("neuron", "all", 1)], ids=("adapter", "neuron")
)
def test_steps_of_our_program_equal_the_twins(gate, trainable, fade_steps):
  """`train_step` itself, three times with the noise that it samples; the neuron's first step is of phase 1."""
  student, teacher, config, batch = set_up(
    gate, "head", trainable, schedule__steps_per_cr=1, schedule__fade_steps=fade_steps
  )
  trained, frozen = split_trained(student, trainable)
  ours, frozen = init_state(config, trained), student.replace(params=frozen)
  weights, shape, dms = twin_of(student)
  settings, original = settings_of(config), twin_of(teacher)[0]
  state = twin_step.init_state(weights, settings)
  run = quick(train_step.__wrapped__, static_argnames=("fading",))
  for step in range(3):
    noise = to_torch(noise_of(student, batch, step))
    figures = twin_step.train_step(state, original, shape, dms, settings, batch_of(batch), noise)
    ours, metrics = run(ours, frozen, teacher, batch, jax.random.key(0), config, fading=step < fade_steps)
    # Where a gradient is 0 to within rounding, the first step of AdamW moves a weight by up to a learning rate either
    # way, and so the later losses.
    for name in ("loss", "kl", "compression_loss", "evicted_fraction", "target_cr", "learning_rate"):
      np.testing.assert_allclose(figures[name], metrics[name], rtol=0, atol=LOSS if step == 0 else 1e-4, err_msg=name)
    assert figures["target_cr"] == 5 + max(step - fade_steps, 0)
  assert state.step == int(ours.step) == 3


def test_the_optimizer_is_ours():
  """The same gradients, also tiny ones, give the same weights in five steps with clipping, decay and warm-up."""
  config = changed(
    RetrofitConfig(),
    trainable="gates",
    optimizer__weight_decay=0.1,
    optimizer__clip_norm=0.5,
    optimizer__warmup_steps=3,
  )
  name, rng = "dms_proj_alpha.weight", np.random.default_rng(0)
  start = rng.normal(size=(4, 6)).astype(np.float32)
  state = twin_step.init_state({name: to_torch(start)}, settings_of(config))
  ours, optimised = jnp.asarray(start), optimizer(config)
  opt_state = optimised.init(ours)
  for step, size in enumerate((1.0, 1e-7, 0.01, 3.0, 1e-4)):
    grad = (size * rng.normal(size=start.shape)).astype(np.float32)
    twin_step.update(state, (to_torch(grad),), twin_schedule.learning_rate(settings_of(config), step), 0.5)
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimised.update(jnp.asarray(grad), opt_state, ours)
      ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(state.trained[name].detach(), ours, rtol=0, atol=1e-6)


def test_a_gate_without_weights_cannot_be_trained_alone():
  weights = twin_of(tiny.model(gates=tiny.dms(gate="neuron")))[0]
  for trainable in ("gates", "lora"):
    with pytest.raises(ValueError, match="no such weights"):
      twin_step.init_state(weights, twin_schedule.RetrofitConfig(trainable=trainable))


def test_settings_that_mean_nothing_are_refused():
  for make in (
    lambda: twin_gates.DMSConfig(gate="neurons"), lambda: twin_gates.DMSConfig(shift=2),
    lambda: twin_schedule.RetrofitConfig(kind="kl"), lambda: twin_schedule.RetrofitConfig(trainable="none"),
    lambda: twin_model.ModelConfig.from_hf({"model_type": "mixtral"}),
    lambda: twin_model.ModelConfig.from_hf({"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn"}}),
  ):  # fmt: skip
    with pytest.raises(ValueError):
      make()


# NVIDIA's figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["separate_head", "neuron_head"])
def test_golden_step(kind):
  model, golden = load_golden(kind)
  weights, config, dms = twin_of(model)
  weights = {name: weight.requires_grad_() for name, weight in weights.items()}
  cr = 1 / (1 - float(golden["train_target"]))
  loss, parts = twin_step.loss_fn(
    weights, None, config, dms, twin_schedule.RetrofitConfig(), twin_step.Batch(to_torch(golden["input_ids"])),
    to_torch(golden["train_noise"]), cr,
  )  # fmt: skip
  for name, theirs in (
    ("kl", "train_distil_loss"), ("compression_loss", "train_dms_loss"), ("evicted_fraction", "train_frac_closed")
  ):  # fmt: skip
    assert abs(parts[name].item() - golden[theirs]) < 1e-7, name
  names = [name.removeprefix("grad.") for name in golden if name.startswith("grad.")]
  assert len(names) == {"separate_head": 12, "neuron_head": 6}[kind]
  grads = torch.autograd.grad(loss, [weights[name] for name in names])
  # The neuron's gradients pass through q_norm at scale 1000 and agree to fewer digits.
  tolerance = 1e-4 if kind == "separate_head" else 2e-3
  want = {name: golden[f"grad.{name}"] for name in names}
  close_to_largest(dict(zip(names, grads, strict=True)), want, tolerance)


@pytest.mark.parametrize("kind", ["separate_head", "neuron_head"])
def test_golden_decoding(kind):
  """Logits, decisions and lengths under NVIDIA's own tokens, read one by one; eviction off too."""
  model, golden = load_golden(kind)
  weights, config, dms = twin_of(model)
  prompt = to_torch(golden["input_ids"])
  with torch.no_grad():
    logits, z = twin_model.forward(weights, config, dms, prompt)
    scale = np.abs(golden["prefill_logits"]).max()
    np.testing.assert_allclose(logits, golden["prefill_logits"], rtol=0, atol=LOGITS * scale)
    np.testing.assert_array_equal(z > 0, golden["decisions"][..., : prompt.shape[1]] > 0)
    for threshold, prefix in ((0.0, ""), (np.inf, "noevict_")):
      cache, fed = twin_decode.Cache(config, dms, 2), to_torch(golden[f"{prefix}tokens"])[:, :-1]
      for column in prompt.T:
        logits = twin_decode.read(weights, config, dms, cache, column, threshold=threshold)
      np.testing.assert_array_equal(logits.argmax(-1), golden[f"{prefix}tokens"][:, 0])
      lengths = [cache.live()]
      for column, want in zip(fed.T, golden[f"{prefix}decode_logits"].swapaxes(0, 1), strict=True):
        logits = twin_decode.read(weights, config, dms, cache, column, threshold=threshold)
        np.testing.assert_allclose(logits, want, rtol=0, atol=LOGITS * scale)
        lengths.append(cache.live())
      if not prefix:
        np.testing.assert_array_equal(torch.stack(lengths).flatten(2), golden["cache_lengths"])
        held = lengths[-1].float().mean() / golden["decisions"].shape[-1]
        np.testing.assert_allclose(1 / held, golden["cr"], rtol=1e-6)


# Whole texts and decoding ---------------------------------------------------------------------------------------------

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SHAPES = {
  "llama": tiny.config(),
  "llama3-rope": tiny.config(rope_theta=500000.0, rope_scaling=LLAMA3, tie_embeddings=False),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, num_kv_heads=1),
  "qwen3": tiny.neuron_config(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_ours(shape):
  """Every family under hard decisions, with packed documents: logits and gate logits."""
  model = tiny.model(SHAPES[shape], tiny.dms(offset=0.0, scale=5.0))
  tokens, ids = tiny.tokens(model.config, 2, 70), jnp.asarray([[1] * 70, [1] * 30 + [2] * 40], jnp.int32)
  hidden, z = quick(forward)(model, tokens, segment_ids=ids, eviction=Eviction(0.5))
  weights, config, dms = twin_of(model)
  found, logits = twin_model.forward(weights, config, dms, to_torch(tokens), segments=to_torch(ids), threshold=0.5)
  want = np.asarray(unembed(model, hidden))
  np.testing.assert_allclose(found, want, rtol=0, atol=LOGITS * np.abs(want).max())
  np.testing.assert_allclose(logits, z, rtol=0, atol=1e-4)
  assert 0.2 < (logits > 0.5).float().mean() < 0.8


def test_spellings_of_config_json():
  """That of transformers 5 gives the same config as that of transformers 4, which we write."""
  for config in SHAPES.values():
    values = config_to_hf(config, "float32")
    scaling = values.pop("rope_scaling") or {"rope_type": "default"}
    other = {**values, "rope_parameters": {"rope_theta": values.pop("rope_theta"), **scaling}}
    other.pop("rope_theta")
    found, want = (twin_model.ModelConfig.from_hf(v) for v in (other, config_to_hf(config, "float32")))
    assert dataclasses.replace(found, rope_scaling=None) == dataclasses.replace(want, rope_scaling=None)
    assert (found.rope_scaling is None) == (want.rope_scaling is None) == (config.rope_scaling is None)
    positions = torch.arange(9)[None]
    for ours, theirs in zip(*(twin_model.rope_tables(c, positions) for c in (found, want)), strict=True):
      assert torch.equal(ours, theirs)


CACHES = [
  ("adapter", "head", 5, 1), ("adapter", "head", 0, 1), ("adapter", "head", 0, 0), ("adapter", "head", 3, 0),
  ("adapter", "layer", 4, 1), ("neuron", "head", 5, 1), ("neuron", "layer", 0, 1), ("neuron", "head", 2, 0),
]  # fmt: skip


GENERATE = dict(eos=False, cache="contiguous", capacity=64, decode_block=6)  # few shapes to compile


def gated_model(gate, granularity, window, shift):
  dms = tiny.dms(gate=gate, granularity=granularity, window=window, shift=shift, offset=0.0)
  return tiny.model(tiny.neuron_config() if gate == "neuron" else tiny.config(), dms)


@pytest.mark.parametrize("case", CACHES, ids=lambda case: "-".join(map(str, case)))
def test_decoding_equals_the_masked_formula(case):
  """Token by token, the ring and archive give the logits of the mask over the whole text, and hold what it says."""
  gated = gated_model(*case)
  weights, config, dms = twin_of(gated)
  tokens = to_torch(tiny.tokens(gated.config, 2, 30))
  with torch.no_grad():
    want, z = twin_model.forward(weights, config, dms, tokens)
    cache = twin_decode.Cache(config, dms, 2)
    for t, column in enumerate(tokens.T):
      logits = twin_decode.read(weights, config, dms, cache, column)
      np.testing.assert_allclose(logits, want[:, t], rtol=0, atol=LOGITS * want.abs().max())
      outside = torch.stack([twin_attention.hard_outside(x > 0, dms.shift) for x in z[..., : t + 1]])
      masks = torch.stack([twin_attention.additive_mask(x, dms.window) for x in outside])
      np.testing.assert_array_equal(cache.live(), (masks[..., t, :] == 0).sum(-1))
  assert 1 < 30 / cache.live().float().mean() < 30


@pytest.mark.parametrize("case", CACHES[::2], ids=lambda case: "-".join(map(str, case)))
def test_decoding_equals_generate(case):
  """Prompts padded on the left, two turns: tokens of both, and the tokens that each head holds."""
  gated = gated_model(*case)
  weights, config, dms = twin_of(gated)
  prompts, mask = np.array(tiny.tokens(gated.config, 3, 20)), np.ones((3, 20), bool)
  mask[0, :7], mask[2, :13] = False, False
  first = dms_jax.generate(gated, prompts, mask=mask, max_new_tokens=12, **GENERATE)
  tokens, cache = twin_decode.generate(weights, config, dms, to_torch(prompts), 12, mask=torch.from_numpy(mask))
  assert tokens.tolist() == first.tokens
  np.testing.assert_array_equal(cache.live(), first.metrics.live)

  following = np.array(tiny.tokens(gated.config, 3, 9, seed=1))
  second = dms_jax.generate(gated, following, max_new_tokens=10, continue_from=first, **{**GENERATE, "cache": None})
  turn = torch.cat([tokens[:, -1:], to_torch(following)], dim=1)
  more, cache = twin_decode.generate(weights, config, dms, turn, 10, cache=cache)
  assert more.tolist() == second.tokens
  np.testing.assert_array_equal(cache.live(), second.metrics.live)
  np.testing.assert_array_equal(cache.seen(), second.metrics.seen)


def test_a_threshold_trades_compression():
  model = gated_model(*CACHES[0])
  weights, config, dms = twin_of(model)
  prompts, counts = np.array(tiny.tokens(model.config, 3, 20)), {}
  for threshold in (-8.0, 8.0):
    out = dms_jax.generate(model, prompts, policy=dms_jax.DMS(threshold=threshold), max_new_tokens=12, **GENERATE)
    tokens, cache = twin_decode.generate(weights, config, dms, to_torch(prompts), 12, threshold=threshold)
    assert tokens.tolist() == out.tokens
    np.testing.assert_array_equal(cache.live(), out.metrics.live)
    counts[threshold] = cache.live().sum()
  assert counts[-8.0] < counts[8.0]


# The page -------------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_docstring_run(tmp_path, monkeypatch, capsys):
  """On a directory that we export; new gates and updates change nothing before the first step."""
  import safetensors.torch

  export(tmp_path / "hf", tiny.model())
  monkeypatch.chdir(tmp_path)
  example = twin_package.__doc__.split("file of safetensors:")[1].split("\n\nLeft to")[0]
  scope = dict(
    json=json, torch=torch, safetensors=safetensors, gates=twin_gates, schedule=twin_schedule, model=twin_model,
    step=twin_step, decode=twin_decode, texts=[to_torch(tiny.tokens(tiny.config(), 2, 40, seed)) for seed in range(3)],
  )  # fmt: skip
  exec(textwrap.dedent(example), scope)
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) >= 4 and "'compression_loss': 0.7" in printed[0]
  assert scope["state"].step == 3 and scope["tokens"].shape == (2, 8)
  untrained = scope["teacher"] | scope["new"]
  before, z = twin_model.forward(untrained, scope["config"], scope["dms"], scope["texts"][0])
  assert torch.equal(before, twin_model.forward(scope["teacher"], scope["config"], None, scope["texts"][0])[0])
  assert torch.equal(z, torch.full_like(z, -5.0))


def test_it_is_plain_torch():
  """No file imports JAX or dms_jax, and each names the file of dms_jax that it mirrors."""
  for module in (twin_attention, twin_decode, twin_gates, twin_losses, twin_model, twin_schedule, twin_step):
    source = inspect.getsource(module)
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "collections", "dataclasses", "math", "torch", "experiments"}, module.__name__
    assert "Mirrors dms_jax/" in module.__doc__ and "2506.05345" in module.__doc__
