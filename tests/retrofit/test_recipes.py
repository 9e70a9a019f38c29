"""Flags of a retrofit: immediate eviction, fading neuron, losses, low-rank targets, every field."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import masks
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.model import Eviction, forward, unembed
from dms_jax.params import flatten, unflatten
from dms_jax.retrofit import DataConfig, LossConfig, MemoryConfig, OptimizerConfig, RetrofitConfig, ScheduleConfig
from dms_jax.retrofit.data import Packer, Source
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, cast_trained, init_state, loss_fn, train_step, zero_neuron
from tests import oracle
from tests.helpers import changed


def test_immediate_eviction_is_the_mask_of_the_formula():
  """Key j is invisible to query i iff i - j > W and token j + W + shift evicted it; with W 0 both kinds agree."""
  rng = np.random.default_rng(0)
  for window, shift in ((0, 1), (3, 1), (3, 0), (30, 1)):
    decided = rng.random(20) < 0.5
    lag = DMSConfig(window=window, shift=shift, eviction="immediate").lag()
    seen = np.asarray(masks.visible(masks.about_key(jnp.asarray(decided), lag, False), window))
    for i, j in np.ndindex(20, 20):
      at = j + window + shift
      gone = i - j > window and at < 20 and decided[at]
      assert seen[i, j] == (j <= i and not gone)
      assert not (i - j > window) or at <= i  # decided by the time it acts
    np.testing.assert_array_equal(seen, oracle.visible(oracle.about(decided, lag), window))
  assert DMSConfig(window=0, eviction="immediate").lag() == DMSConfig(window=0).lag()
  assert DMSConfig(window=9, eviction="immediate").lag(4) == 5  # of the window in force


# ------------------------------------------------------------------------------------------------- the training step

SMALL = tiny.config(
  num_layers=1, d_model=16, d_ff=16, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=31, eos_token_ids=(3,)
)
BASE = RetrofitConfig(
  trainable="lora",
  batch_size=2,
  seq_len=16,
  schedule=ScheduleConfig(steps=6, initial_cr=2.0, final_cr=4.0, steps_per_cr=1),
  optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
  loss=LossConfig(tau=1.0),
  memory=MemoryConfig(compute_dtype="float32", loss_chunk=16, vocab_chunk=31),
)
quick_step = jax.jit(train_step.__wrapped__, static_argnames=("config", "fading"), compiler_options=tiny.QUICK)


def set_up(config: RetrofitConfig, gate: str = "adapter"):
  """(student, teacher, state) of a small model whose gates decide both ways."""
  dms, base = tiny.dms(gate=gate, window=3, scale=10.0, offset=1.0), tiny.model(SMALL)
  student, teacher, trained = prepare(base, dms, LoRAConfig(rank=2), config)
  noisy = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
  return student, teacher, init_state(config, unflatten({p: noisy(p, x) for p, x in flatten(trained).items()}))


def outcome(config: RetrofitConfig, gate: str = "adapter", steps: int = 3):
  """Everything that `steps` steps compute, as a flat list of arrays."""
  student, teacher, state = set_up(config, gate)
  lines = []
  for step in range(steps):
    batch = Batch(tiny.tokens(SMALL, config.batch_size, config.seq_len, seed=step))
    state, metrics = quick_step(
      state, student, teacher, batch, jax.random.key(1), config, fading=step < config.schedule.fade_steps
    )
    lines.append({k: metrics[k] for k in ("loss", "compression_loss", "target_cr", "learning_rate", "grad_norm")})
  held = state.trained if state.ema is None else state.ema
  return [np.asarray(x) for x in jax.tree.leaves((lines, held))]


def differ(a, b) -> bool:
  return len(a) != len(b) or any(x.shape != y.shape or not np.allclose(x, y, rtol=1e-4) for x, y in zip(a, b))  # noqa: B905


IN_THE_STEP = {
  "trainable": "gates",
  "microbatches": 2,
  "schedule__initial_cr": 1.0,
  "schedule__final_cr": 2.5,
  "schedule__steps_per_cr": 3,
  "loss__tau": 0.3,
  "loss__kind": "forward_kl",
  "loss__teacher": "same",
  "loss__compression_weight": 0.5,
  "loss__counts": "held",
  "optimizer__learning_rate": 1e-3,
  "optimizer__warmup_steps": 3,
  "optimizer__decay_steps": 6,
  "optimizer__beta1": 0.5,
  "optimizer__beta2": 0.5,
  "optimizer__weight_decay": 1.0,
  "optimizer__clip_norm": 0.01,
  "saving__ema_decay": 0.9,
}
SAME_RESULT = {
  "memory__remat": True,
  "memory__loss_chunk": 5,
  "memory__vocab_chunk": 7,
}  # other programs, the same numbers
BY_THE_NEURON = {"schedule__fade_steps": 2}
IN_THE_DATA = {"batch_size": 3, "seq_len": 12, "seed": 1}
IN_THE_LOOP = {
  "schedule__steps",
  "saving__snapshots",
  "saving__save_every",
  "saving__keep_states",
  "loss__bound",
  "saving__export",
  "schedule__zero_neuron",
}  # tests/test_survival.py
OF_THE_MACHINE = {"memory__compute_dtype": "bfloat16"}
OF_THE_SCHEDULE = {"schedule__hold_steps", "optimizer__final_rate"}  # tests/test_step.py
OF_LEVELS = {"schedule__targets", "saving__calibration"}  # tests/test_elastic.py
OF_OTHERS = {"objective", "trimkv__capacity", "trimkv__lm_weight", "kvzap__prompt"}  # tests/test_objectives.py


def test_every_field_is_accounted_for():
  known = {*IN_THE_STEP, *SAME_RESULT, *BY_THE_NEURON, *IN_THE_DATA, *IN_THE_LOOP, *OF_THE_MACHINE}
  known |= {*OF_THE_SCHEDULE, *OF_OTHERS, *OF_LEVELS}
  fields = lambda config: {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  sections = {name: value for name, value in fields(BASE).items() if dataclasses.is_dataclass(value)}
  assert known == {*fields(BASE)} - {*sections} | {f"{n}__{field}" for n, s in sections.items() for field in fields(s)}


@pytest.fixture(scope="module")
def baseline():
  with jax.numpy_dtype_promotion("standard"):
    return {gate: outcome(changed(BASE, **extra), gate) for gate, extra in (("adapter", {}), ("neuron", {}))}


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("field", [*IN_THE_STEP, *OF_THE_MACHINE])
def test_no_dead_field_in_the_step(field, baseline):
  value = {**IN_THE_STEP, **OF_THE_MACHINE}[field]
  assert differ(outcome(changed(BASE, **{field: value})), baseline["adapter"])


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("field", SAME_RESULT)
def test_what_only_saves_memory_changes_no_number(field, baseline):
  config = changed(BASE, **{field: SAME_RESULT[field]})
  got = outcome(config)
  for x, y in zip(got, baseline["adapter"], strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)  # Adam divides sums in another order by small numbers
  texts = [str(jax.make_jaxpr(lambda b, c=c: train_step.__wrapped__(
    set_up(BASE)[2], *set_up(BASE)[:2], b, jax.random.key(1), c))(Batch(tiny.tokens(SMALL, 2, 16))))
    for c in (BASE, config)]  # fmt: skip
  assert texts[0] != texts[1]


def test_the_data_depends_on_its_fields():
  source = Source("one", np.arange(200, dtype=np.int32), np.ones(200, np.int32))
  batch = lambda config: Packer([source], DataConfig(paths=("one",)), config).batch(1).tokens
  for field, value in IN_THE_DATA.items():
    other = batch(changed(BASE, **{field: value}))
    assert other.shape != batch(BASE).shape or (other != batch(BASE)).any(), field


# --------------------------------------------------------------------------------------------------- the fading neuron


def test_the_neuron_fades_from_whole_to_cleared():
  """At 1 the model is the untouched one, at 0 its channel is cleared, at 0.5 it is in between."""
  base = tiny.model()
  model = base.replace(dms=tiny.dms(gate="neuron"))
  tokens = tiny.tokens(base.config, 2, 12)
  run = jax.jit(lambda m, kept: forward(m, tokens, neuron_kept=kept)[0], compiler_options=tiny.QUICK)
  whole, half, gone = (np.asarray(run(model, jnp.float32(kept))) for kept in (1.0, 0.5, 0.0))
  np.testing.assert_allclose(whole, run(base, None), atol=1e-6)
  np.testing.assert_allclose(gone, run(model, None), atol=1e-6)
  assert 0 < np.abs(half - whole).mean() < np.abs(gone - whole).mean()


@pytest.mark.standard_promotion  # optax
def test_phase_one_evicts_nothing_and_phase_two_begins_where_it_ends():
  config = changed(BASE, trainable="all", schedule__fade_steps=4, schedule__steps=8, schedule__zero_neuron=True)
  dms, base = tiny.dms(gate="neuron", window=3, scale=10.0, offset=1.0), tiny.model(SMALL)
  student, teacher, trained = prepare(base, dms, LoRAConfig(), config)
  state, lines = init_state(config, trained), []
  batch = Batch(tiny.tokens(SMALL, 2, 16))
  for step in range(6):
    if step == config.schedule.fade_steps:
      state = zero_neuron(student, state)
      assert not np.any(state.trained["layers"]["q_proj"][:, ::2, -1])
      assert np.all(np.any(state.trained["layers"]["q_proj"][:, 1::2, -1], axis=-1))
    state, metrics = quick_step(state, student, teacher, batch, jax.random.key(1), config, fading=step < 4)
    lines.append(jax.device_get(metrics))
  assert lines[0]["kl"] < 1e-9  # the whole channel is there, and nothing has been trained yet
  assert all(line["kl"] > 1e-7 for line in lines[1:4])
  assert [line["compression_loss"] for line in lines[:4]] == [0.0] * 4
  assert [line["target_cr"] for line in lines] == [2.0] * 5 + [3.0]
  assert lines[4]["gate_rate"] == 0.0  # every gate at -offset
  assert lines[4]["compression_loss"] > 0


@pytest.mark.standard_promotion
def test_a_neuron_that_fades_is_no_neuron_that_is_gone(baseline):
  assert differ(outcome(changed(BASE, **BY_THE_NEURON), "neuron"), baseline["neuron"])


# ------------------------------------------------------------------------------------------- losses, low-rank updates


@pytest.mark.standard_promotion
def test_language_model_loss_is_the_next_tokens_surprise():
  """Only tokens that continue their document count, and none after an end of text."""
  config = changed(BASE, loss__kind="lm", trainable="all")
  model = tiny.model(SMALL, tiny.dms(window=3))
  tokens = tiny.tokens(SMALL, 2, 16).at[0, 4].set(3)
  ids = jnp.asarray([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4], jnp.int32)
  noise = jnp.zeros((1, 2, 2, 16))
  run = jax.jit(loss_fn, static_argnames=("config",), compiler_options=tiny.QUICK)
  _, metrics = run(model, model, Batch(tokens, ids), noise, jnp.float32(2.0), config)
  hidden, _ = forward(model, tokens, segment_ids=ids, eviction=Eviction(noise=noise, tau=1.0))
  logp = jax.nn.log_softmax(unembed(model, hidden))
  surprises = [
    -logp[b, t, tokens[b, t + 1]]
    for b in range(2)
    for t in range(15)
    if ids[b, t] and ids[b, t] == ids[b, t + 1] and tokens[b, t] != 3
  ]
  np.testing.assert_allclose(metrics["nll"], np.mean(surprises), rtol=1e-5)
  assert "kl" not in metrics


@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "v_proj", "down_proj")])
def test_low_rank_updates_are_of_the_targets(targets):
  _, _, trained = prepare(tiny.model(SMALL), tiny.dms(), LoRAConfig(2, targets=targets), BASE)
  names = {n.removeprefix("layers/") for n in flatten(trained)}
  assert names == {"dms_norm", "dms_proj"} | {f"{t}_lora_{ab}" for t in targets for ab in "ab"}
  with pytest.raises(ValueError, match=r"lora\.targets: 'qproj'"):
    prepare(tiny.model(SMALL), tiny.dms(), LoRAConfig(2, targets=("qproj",)), BASE)


def test_a_base_with_merged_updates_is_one_like_others():
  """What is trained on it can be saved as its retrofit."""
  base = tiny.model(SMALL, tiny.dms(), LoRAConfig(2)).merged()
  student, teacher, _ = prepare(base, tiny.dms(), LoRAConfig(2), BASE)
  assert base.holds_updates and not student.holds_updates and not teacher.holds_updates


def test_gates_are_trained_and_shipped_in_float32():
  student, _, state = set_up(changed(BASE, memory__compute_dtype="bfloat16"))
  cast = flatten(cast_trained(student, state.trained, jnp.bfloat16))
  assert {path: x.dtype for path, x in cast.items() if "dms" in path} == {
    "layers/dms_norm": jnp.float32,
    "layers/dms_proj": jnp.float32,
  }
  assert cast["layers/q_proj_lora_a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "dms, lora, config, message",
  [
    ({}, 0, {}, r"lora\.rank"),
    ({}, 2, {"schedule__fade_steps": 2}, r"retrofit\.schedule\.fade_steps.*dms\.gate='adapter'"),
    ({"gate": "neuron"}, 2, {"trainable": "gates"}, "no weights of its own"),
    ({"gate": "neuron"}, 2, {}, r"lora\.targets=\('v_proj',\)"),
  ],
)
def test_settings_that_do_not_go_together_are_named(dms, lora, config, message):
  with pytest.raises(ValueError, match=message):
    prepare(tiny.model(SMALL), tiny.dms(**dms), LoRAConfig(lora, targets=("v_proj",)), changed(BASE, **config))


@pytest.mark.parametrize(
  "wrong",
  [
    {"loss__kind": "l2"},
    {"loss__teacher": "same", "loss__kind": "lm"},
    {"loss__teacher": "same", "schedule__fade_steps": 2},
    {"schedule__fade_steps": 2000},
    {"schedule__zero_neuron": True},
    {"saving__export": "retrofit", "trainable": "all"},
    {"memory__vocab_chunk": 0},
    {"optimizer__clip_norm": 0.0},
    {"loss__bound": -1.0},
    {"optimizer__warmup_steps": -1},
    {"optimizer__beta2": 1.0},
    {"saving__keep_states": 0},
  ],
)
def test_refused_values_are_named(wrong):
  with pytest.raises(ValueError, match="retrofit." + next(iter(wrong)).replace("__", ".")):
    changed(RetrofitConfig(), **wrong)
