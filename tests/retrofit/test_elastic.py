"""Gates for a range of ratios against numpy; the paper's one target is their special case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig, from_json, to_json
from dms_jax.levels import Levels
from dms_jax.model import Eviction, forward
from dms_jax.params import flatten, join_params, unflatten
from dms_jax.retrofit import LossConfig, MemoryConfig, OptimizerConfig, RetrofitConfig, ScheduleConfig, losses, schedule
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, init_state, logistic_noise, loss_fn, train_step
from tests import trained_oracle
from tests.helpers import changed

SMALL = tiny.config(num_layers=2, d_model=16, d_ff=16, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=31)
LOW, HIGH = 1.5, 12.0
BASE = RetrofitConfig(
  batch_size=4,
  seq_len=16,
  schedule=ScheduleConfig(steps=8, initial_cr=1.0, final_cr=HIGH, steps_per_cr=1),
  optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
  loss=LossConfig(tau=1.0),
  memory=MemoryConfig(compute_dtype="float32", loss_chunk=64, vocab_chunk=31),
)
quick_step = jax.jit(train_step.__wrapped__, static_argnames=("config", "fading"), compiler_options=tiny.QUICK)


def gates(*elastic: float, **more) -> DMSConfig:
  return tiny.dms(window=3, scale=10.0, **({"offset": 1.0} | more), elastic=elastic)


def set_up(dms: DMSConfig, config: RetrofitConfig):
  """(student, teacher, state) of a small model whose gates decide both ways."""
  student, teacher, trained = prepare(tiny.model(SMALL), dms, LoRAConfig(rank=2), config)
  noisy = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
  return student, teacher, init_state(config, unflatten({p: noisy(p, x) for p, x in flatten(trained).items()}))


def steps_of(dms: DMSConfig, config: RetrofitConfig, steps: int = 3, begun=None):
  """(state, metrics of each step) after `steps` steps, or those up to it from the state `begun`."""
  student, teacher, state = set_up(dms, config)
  state, lines = state if begun is None else begun, []
  for step in range(int(state.step), steps):
    batch = Batch(tiny.tokens(SMALL, config.batch_size, config.seq_len, seed=step))
    state, metrics = quick_step(state, student, teacher, batch, jax.random.key(1), config)
    lines.append(jax.device_get(metrics))
  return state, lines


@pytest.mark.parametrize("numbers", [(1.5, 12.0, 4.0, 4.0), (1.1, 30.0, 2.5, 1.1), (3.0, 3.0, 4.0, 3.0)])
def test_thresholds_are_the_formula(numbers):
  """Float32 against float64: the logarithm of a ratio, they fall strictly, and are 0 at the pivot."""
  levels, crs = Levels(*numbers), np.geomspace(1.0, 40.0, 41)
  got = np.asarray(jax.jit(levels.threshold)(jnp.asarray(crs, jnp.float32)))
  want = [trained_oracle.level_threshold(c, *numbers) for c in crs]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * numbers[2])
  within = got[(crs >= numbers[0]) & (crs <= numbers[1])]
  assert (np.diff(within) < 0).all() and float(levels.threshold(numbers[3])) == 0.0
  back, inside = np.asarray(jax.jit(levels.cr)(got)), np.clip(crs, numbers[0], numbers[1])
  np.testing.assert_allclose(back, inside, rtol=1e-5)
  for count in (1, 2, 3, 5, 17):  # a row's threshold does not depend on its neighbours
    rows = jax.jit(levels.threshold)(jnp.asarray(crs[:count], jnp.float32))
    np.testing.assert_array_equal(rows, got[:count])


def test_ranks_of_the_formulas_distribution_are_calibrated():
  """Logits of the logistic distribution of scale `slope`: at threshold(c) the share 1 - 1/c is above."""
  levels = Levels(1.5, 12.0, 4.0, 2.0)
  logits = 4.0 * np.random.default_rng(0).logistic(size=200_000)  # standard error 0.001
  for c in (1.5, 2.0, 4.0, 12.0):
    assert abs((logits > float(levels.threshold(c))).mean() - (1 - 1 / c)) < 0.005


@pytest.mark.parametrize("counts", ["evicted", "held"])
@pytest.mark.parametrize("penalty, tolerance", [("shortfall", 0.0), ("distance", 0.0), ("ratio", 0.0), ("ratio", 0.2)])
def test_row_losses_against_numpy(counts, penalty, tolerance):
  """Each row's own threshold and target, with padding; and every gradient is finite."""
  dms = gates(LOW, HIGH)
  config = changed(BASE, loss__counts=counts, loss__penalty=penalty, loss__tolerance=tolerance)
  student, teacher, state = set_up(dms, config)
  crs, tokens = np.array([1.5, 3.0, 6.0, 12.0], np.float32), tiny.tokens(SMALL, 4, 16)
  segments = np.ones((4, 16), np.int32)
  segments[1, 11:] = segments[3, 2:] = 0
  batch, noise = Batch(tokens, jnp.asarray(segments)), logistic_noise(jax.random.key(0), (2, 4, 2, 16))

  def loss(trained):
    whole = student.replace(params=join_params(student.params, trained))
    return loss_fn(whole, teacher, batch, noise, jnp.asarray(crs), config)

  (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.trained)
  whole = student.replace(params=join_params(student.params, state.trained))
  numbers = dms.elastic_slope, dms.elastic_pivot
  thresholds = [trained_oracle.level_threshold(float(c), LOW, HIGH, *numbers) for c in crs]
  eviction = Eviction(jnp.asarray(thresholds, jnp.float32), noise, config.loss.tau)
  _, z = forward(whole, tokens, segment_ids=batch.segment_ids, eviction=eviction)
  logits = np.asarray(z) * config.loss.tau - np.asarray(noise) + np.reshape(thresholds, (-1, 1, 1))
  want, shares = trained_oracle.row_compression(
    logits, np.asarray(noise), crs, thresholds, segments > 0, window=dms.window, held=counts == "held",
    penalty=penalty, tolerance=tolerance,
  )  # fmt: skip
  assert 0 < want and len(set(shares)) > 1
  np.testing.assert_allclose(metrics["compression_loss"], want, atol=1e-6)
  np.testing.assert_allclose(metrics["evicted_fraction"], shares.mean(), atol=1e-6)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert np.any(flatten(grads)["layers/dms_proj"])


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("cr", [2.0, 4.0])
def test_one_target_is_the_special_case(cr):
  """Lowest and highest CR the same: states and losses of all steps, ramp included, are bit-equal to those of one CR."""
  config = changed(BASE, schedule__final_cr=cr)
  one, elastic = steps_of(gates(), config, 6), steps_of(gates(cr, cr), config, 6)
  jax.tree.map(np.testing.assert_array_equal, one[0], elastic[0])
  jax.tree.map(np.testing.assert_array_equal, one[1], elastic[1])


@pytest.mark.standard_promotion  # optax
def test_a_resumed_run_draws_the_same_targets():
  """The state after 4 steps, and 2 more from it: as 6 steps in one run. The logged target lies within the ramp."""
  dms = gates(LOW, HIGH)
  begun, first = steps_of(dms, BASE, 4)
  resumed, second = steps_of(dms, BASE, 6, begun)
  whole, lines = steps_of(dms, BASE, 6)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  jax.tree.map(np.testing.assert_array_equal, first + second, lines)
  for step, line in enumerate(lines):
    assert min(LOW, 1.0 + step) <= line["target_cr"] <= 1.0 + step


@pytest.mark.parametrize("targets", ["log_uniform", "uniform", "uniform_kept"])
def test_targets_of_rows(targets):
  """Mean of the uniform quantity over many keys, one row in each part of the range; the ramp widens the range."""
  config, levels = changed(BASE, schedule__targets=targets), Levels(LOW, HIGH, 4.0, 4.0)
  draw = jax.jit(lambda step, key: schedule.row_targets(config, levels, step, key, 4))
  crs = np.stack([draw(100, jax.random.key(i)) for i in range(100)])
  scale = {"log_uniform": np.log, "uniform": lambda x: x, "uniform_kept": lambda x: -1 / x}[targets]
  place = (scale(crs) - scale(LOW)) / (scale(HIGH) - scale(LOW))
  np.testing.assert_array_equal(np.sort(np.floor(place * 4), axis=1), np.broadcast_to(np.arange(4), (100, 4)))
  np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.12)  # standard error 0.029 of each row
  for step, low, high in ((0, 1.0, 1.0), (0.25, 1.25, 1.25), (4, LOW, 5.0)):
    drawn = np.asarray(draw(step, jax.random.key(0)))
    assert (drawn >= low).all() and (drawn <= high).all() and (low < high or (drawn == low).all())


def test_configs_keep_the_numbers(tmp_path):
  """JSON and a checkpoint give them back; gates of one ratio are as ever, and start as open as the lowest level's."""
  dms = DMSConfig(elastic=(1.5, 12.0), window=3)
  assert dms.levels == Levels(1.5, 12.0, 4.0, 4.0) and from_json(DMSConfig, to_json(dms)) == dms
  assert dms.offset == pytest.approx(5.0 - float(dms.levels.threshold(1.5)))
  assert DMSConfig().levels is None and DMSConfig().offset == 5.0
  assert DMSConfig(elastic=(6.0, 9.0)).elastic_pivot == 6.0 and DMSConfig(elastic=(2.0, 2.0)).offset == 5.0
  old = {name: value for name, value in to_json(DMSConfig()).items() if not name.startswith("elastic")}
  assert from_json(DMSConfig, old) == DMSConfig()
  checkpoint.save(tmp_path / "base", tiny.model(SMALL))
  checkpoint.save(tmp_path / "retrofit", tiny.model(SMALL, dms, LoRAConfig(rank=2)), groups=("gate", "lora"))
  assert checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit").dms == dms


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"elastic": (2.0,)}, "dms.elastic=2 must be two compression ratios above 1"),
    ({"elastic": (1.0, 4.0)}, "dms.elastic=1,4 must be two"),
    ({"elastic": (4.0, 2.0)}, "dms.elastic=4,2 must be two"),
    ({"elastic": (2.0, 4.0), "elastic_pivot": 5.0}, "dms.elastic_pivot=5.0 must lie in dms.elastic=2,4"),
    ({"elastic": (2.0, 4.0), "elastic_slope": -1.0}, "dms.elastic_slope=-1.0 must be 0 or more"),
    ({"elastic_slope": 4.0}, "dms.elastic_slope=4.0 is of gates for a range of ratios"),
    ({"elastic": (2.0, 4.0), "objective": "dmc"}, "dms.elastic is for retrofit.objective=dms"),
  ],
)
def test_refused_numbers_are_named(wrong, message):
  with pytest.raises(ValueError, match=message):
    DMSConfig(**wrong)


def test_the_ramp_ends_at_the_highest_ratio():
  with pytest.raises(ValueError, match=r"retrofit.schedule.final_cr=8 must be the highest CR of dms.elastic=1.5,12"):
    prepare(tiny.model(SMALL), gates(1.5, 12.0), LoRAConfig(rank=2), changed(BASE, schedule__final_cr=8.0))


def test_rows_of_one_target_are_a_single_target():
  fraction = jnp.asarray([0.9, 0.5])
  rows = losses.compression_loss(fraction, jnp.full(2, 4.0))
  assert float(rows) == float(losses.compression_loss(fraction, jnp.float32(4.0))) == 0.125
