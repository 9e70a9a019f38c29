"""Gates for a range of ratios against numpy; the paper's one target is their special case."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.json_files import from_json, to_json
from dms_jax.levels import Levels
from dms_jax.model import Eviction, forward
from dms_jax.params import flatten, join_params, unflatten
from dms_jax.policies import DMS
from dms_jax.retrofit import (
  DataConfig,
  LossConfig,
  MemoryConfig,
  OptimizerConfig,
  RetrofitConfig,
  ScheduleConfig,
  elastic,
  loop,
  losses,
  schedule,
)
from dms_jax.retrofit.config import check
from dms_jax.retrofit.data import Packer, Source
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


@pytest.mark.parametrize("ends", [(1.5, 12.0), (1.1, 30.0)])
def test_thresholds_are_linear_in_the_log_odds(ends):
  """Float32 against float64 between the ends and beyond; the inverse; a row does not depend on its neighbours."""
  table = tuple(np.sort(np.random.default_rng(0).normal(0, 5, 7))[::-1].tolist())
  levels, crs = Levels(*ends, table), np.geomspace(1.01, 40.0, 41)
  got = np.asarray(jax.jit(levels.threshold)(jnp.asarray(crs, jnp.float32)))
  np.testing.assert_allclose(got, [trained_oracle.level_threshold(c, *ends, table) for c in crs], atol=1e-4)
  np.testing.assert_allclose(levels.threshold(np.asarray(Levels.ratios(*ends, 7))), table, atol=1e-4)
  back = np.asarray(jax.jit(levels.cr)(got))
  np.testing.assert_allclose(back, np.clip(crs, *ends), rtol=1e-4)
  for count in (1, 2, 3, 5, 17):
    np.testing.assert_array_equal(jax.jit(levels.threshold)(jnp.asarray(crs[:count], jnp.float32)), got[:count])
  assert float(Levels(*ends, (1.0, 1.0)).cr(1.0)) == ends[1] and Levels(*ends, table).usual == 4.0


@pytest.mark.parametrize("table", [(21.6, -10.4), (131.6, 120.0, 107.3), (0.3, 0.3, 0.1)])
@pytest.mark.parametrize("ends", [(1.2, 12.0), (1.01, 1.1)])
def test_the_level_of_a_threshold_evicts_no_token_of_that_logit(ends, table):
  """Gates have a level for each threshold, to rounding; beyond them it is an end."""
  levels = Levels(*ends, table)
  asked = np.random.default_rng(0).uniform(table[-1], table[0], 1000).astype(np.float32)
  found = levels.threshold(levels.cr(asked))
  assert (found >= asked).all() and np.max(found - asked) < 1e-4 * (table[0] - table[-1])
  lowered = DMS(cr=ends[0], levels=levels).lowered(jnp.asarray(asked))
  np.testing.assert_array_equal(lowered.limit, found)
  np.testing.assert_array_equal(levels.cr(np.float32([table[0] + 1, table[-1] - 1])), np.float32(ends))


def test_ranks_of_the_logistic_distribution_are_calibrated():
  """Untrained levels: of logits of scale 4 the share 1 - 1/c is above threshold(c), which is 0 at 2."""
  levels = Levels.logistic(1.5, 12.0, 4.0, 2.0)
  logits = 4.0 * np.random.default_rng(0).logistic(size=200_000)  # standard error 0.001
  for c in (1.5, 2.0, 4.0, 12.0):
    assert abs((logits > float(levels.threshold(c))).mean() - (1 - 1 / c)) < 0.005


def test_thresholds_of_a_batch_against_numpy():
  """Values: every share of the counted logits, 0 and 1 too. Derivative: the share over all noise stays the same."""
  rng = np.random.default_rng(0)
  logits, noise, move = (rng.normal(size=(2, 3, 2, 40)).astype(np.float32) for _ in range(3))
  counted = np.ones((3, 40), bool)
  counted[1, 25:] = False
  share = np.array([0.0, 0.4, 1.0], np.float32)
  of = lambda logits: elastic.thresholds(logits, jnp.asarray(noise), jnp.asarray(counted), jnp.asarray(share))
  values, moved = jax.jvp(of, (jnp.asarray(logits),), (jnp.asarray(move),))
  assert values.tolist() == [trained_oracle.threshold_of_share(logits + noise, counted, p) for p in share]
  want = [trained_oracle.threshold_derivative(logits, counted, float(x), move) for x in values]
  np.testing.assert_allclose(moved, want, atol=1e-5)


def test_certain_decisions_send_no_gradient_through_a_threshold():
  """A head far from its threshold has none; where no logit is near one, its derivative still moves with all of them."""
  logits = np.random.default_rng(0).normal(size=(1, 3, 2, 40)).astype(np.float32)
  counted, share = jnp.ones((3, 40), bool), jnp.asarray([0.3, 0.7, 0.9], jnp.float32)
  of = lambda logits: elastic.thresholds(logits, jnp.zeros(logits.shape), counted, share)
  slopes = jax.jit(jax.jacrev(of))
  far = np.asarray(slopes(jnp.asarray(logits + [[[[0.0], [1000.0]]]], jnp.float32)))
  assert (far[1:, :, :, 1] == 0.0).all() and (far[0, :, :, 0] == 0.0).all()
  np.testing.assert_allclose(far.sum(axis=(1, 2, 3, 4)), 1.0, atol=1e-5)
  gap = np.asarray(slopes(jnp.asarray(1000.0 * logits)))
  np.testing.assert_allclose(gap.sum(axis=(1, 2, 3, 4)), 1.0, atol=1e-5)


@pytest.mark.parametrize("counts, granularity", [("evicted", "head"), ("held", "layer")])
def test_a_batch_evicts_what_its_rows_ask_for(counts, granularity):
  """Thresholds of a dense pass under numpy's; no loss but the distillation's; raising all logits changes nothing."""
  dms = gates(LOW, HIGH, gate="linear", granularity=granularity)
  config = changed(BASE, loss__counts=counts)
  student, teacher, state = set_up(dms, config)
  crs, tokens = np.array([1.5, 3.0, 6.0, 12.0], np.float32), tiny.tokens(SMALL, 4, 16)
  segments = np.ones((4, 16), np.int32)
  segments[1, 11:] = segments[3, 2:] = 0
  batch, noise = Batch(tokens, jnp.asarray(segments)), logistic_noise(jax.random.key(0), (2, 4, 2, 16))

  def loss(trained):
    whole = student.replace(params=join_params(student.params, trained))
    return loss_fn(whole, teacher, batch, noise, jnp.asarray(crs), config)

  (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=tiny.QUICK)(state.trained)
  whole = student.replace(params=join_params(student.params, state.trained))
  logits = forward(whole, tokens, segment_ids=batch.segment_ids)[1]
  own = noise if granularity == "head" else np.repeat(np.asarray(noise)[:, :, :1], 2, axis=2)
  share = [trained_oracle.evicting_share(c, n, 3, counts == "held") for c, n in zip(crs, (16, 11, 16, 2), strict=True)]
  limits = [trained_oracle.threshold_of_share(np.asarray(logits + own), segments > 0, p) for p in share]
  eviction = Eviction(jnp.asarray(limits, jnp.float32), noise, config.loss.tau)
  z = np.asarray(forward(whole, tokens, segment_ids=batch.segment_ids, eviction=eviction)[1])
  evicted = [(z[:, b][..., segments[b] > 0] > 0).mean() for b in range(4)]
  np.testing.assert_allclose(metrics["evicted_fraction"], np.mean(evicted), atol=1e-6)
  assert float(value) == float(metrics["kl"]) > 0 and float(metrics["compression_loss"]) == 0.0
  grads = flatten(grads)
  assert all(np.isfinite(g).all() for g in grads.values()) and np.any(grads["layers/dms_proj"])
  bias = np.asarray(grads["layers/dms_bias"])
  assert abs(bias.sum()) < 1e-4 * np.abs(bias).sum()


@pytest.mark.parametrize("counts, lora", [("evicted", None), ("held", LoRAConfig(rank=2, scale=8.0, by_cr=True))])
def test_calibrated_thresholds_hold_what_is_asked(counts, lora):
  """On the batches that measured them, hard decisions without noise evict each CR's share, at every level."""
  config = changed(BASE, loss__counts=counts, seq_len=64)
  model = tiny.model(SMALL, gates(LOW, HIGH), lora)
  batches = [Batch(tiny.tokens(SMALL, 4, 64, seed=i)) for i in range(3)]
  shown = []
  found = elastic.calibrated(model, batches, config, lambda items: (shown.append(x) or x for x in items)).dms
  assert len(shown) == 3 and len(found.elastic_thresholds) == elastic.LEVELS and found.elastic == (LOW, HIGH)
  assert (np.diff(found.elastic_thresholds) <= 0).all()
  logits = jax.jit(lambda batch, limit, cr: forward(model, batch.tokens, eviction=Eviction(threshold=limit), cr=cr)[1])
  for cr in (LOW, 4.0, HIGH):
    limit = found.levels.threshold(cr)
    share = np.mean([np.asarray(logits(batch, limit, cr)) > limit for batch in batches])
    want = trained_oracle.evicting_share(cr, 64, 3, counts == "held")
    assert abs(share - want) < 0.01  # a row's edges lie 1/1024 apart; logits depend on what is evicted


def test_updates_by_cr_learn_from_rows_that_evict():
  """A row at CR 1 has none of the update and gives it no gradient; the others' is that of their strength."""
  student, teacher, trained = prepare(tiny.model(SMALL), gates(LOW, HIGH), LoRAConfig(rank=2, by_cr=True), BASE)
  batch, noise = Batch(tiny.tokens(SMALL, 4, 16)), logistic_noise(jax.random.key(0), (2, 4, 2, 16))

  @functools.partial(jax.jit, compiler_options=tiny.QUICK)
  def grads(trained, crs):
    whole = lambda trained: student.replace(params=join_params(student.params, trained))
    return jax.grad(lambda trained: loss_fn(whole(trained), teacher, batch, noise, crs, BASE)[0])(trained)

  for crs, learns in (([1.0] * 4, False), ([1.0, 1.0, 1.0, 6.0], True)):
    found = flatten(grads(trained, jnp.asarray(crs, jnp.float32)))
    assert bool(np.any(found["layers/q_proj_lora_b"])) == learns
  for wrong, message in (({}, "it needs dms.elastic"), ({"saving__export": "model"}, "cannot be merged")):
    dms = gates() if not wrong else gates(LOW, HIGH)
    with pytest.raises(ValueError, match=f"lora.by_cr.*{message}"):
      check(dms, LoRAConfig(rank=2, by_cr=True), changed(BASE, **wrong))


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


@pytest.mark.standard_promotion  # optax
@pytest.mark.slow
def test_a_run_ends_with_thresholds_of_what_it_exports(tmp_path, monkeypatch):
  """final/ holds those that `calibrated` finds for it on the batches after the last step; nothing else is exported."""
  monkeypatch.setattr(loop, "train_step", quick_step)
  config = changed(BASE, schedule__steps=2, saving__calibration=2, saving__ema_decay=0.5)
  data, tokens = DataConfig(paths=("text",)), np.random.default_rng(0).integers(0, SMALL.vocab_size, 300)
  packer = Packer([Source("text", tokens.astype(np.int32), np.ones(300, np.int32))], data, config)
  shown = []
  progress = lambda batches: (shown.append(batch) or batch for batch in batches)
  base = tiny.model(SMALL)
  loop.train(loop.Run(base, gates(LOW, HIGH), LoRAConfig(rank=2), config, data, tmp_path), packer, progress=progress)
  checkpoint.save(tmp_path / "base", base)
  found = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "final")
  again = elastic.calibrated(found, [packer.batch(2), packer.batch(3)], config)
  assert len(shown) == 2 and not list(tmp_path.glob("cr*"))
  np.testing.assert_allclose(
    found.dms.elastic_thresholds, again.dms.elastic_thresholds, atol=0.02
  )  # updates are merged


@pytest.mark.parametrize("targets", ["log_uniform", "uniform", "uniform_kept"])
def test_targets_of_rows(targets):
  """Mean of the uniform quantity over many keys, one row in each part of the range; the ramp widens the range."""
  config, levels = changed(BASE, schedule__targets=targets), Levels(LOW, HIGH, (0.0,))
  draw = jax.jit(lambda step, key: schedule.row_targets(config, levels, step, key, 4))
  crs = np.stack([draw(100, jax.random.key(i)) for i in range(100)])
  scale = {"log_uniform": np.log, "uniform": lambda x: x, "uniform_kept": lambda x: -1 / x}[targets]
  place = (scale(crs) - scale(LOW)) / (scale(HIGH) - scale(LOW))
  np.testing.assert_array_equal(np.sort(np.floor(place * 4), axis=1), np.broadcast_to(np.arange(4), (100, 4)))
  np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.12)  # standard error 0.029 of each row
  for step, low, high in ((0, 1.0, 1.0), (0.25, 1.25, 1.25), (4, LOW, 5.0)):
    drawn = np.asarray(draw(step, jax.random.key(0)))
    assert (drawn >= low).all() and (drawn <= high).all() and (low < high or (drawn == low).all())


def test_configs_keep_the_thresholds(tmp_path):
  """JSON and a checkpoint give them back; gates of one ratio are as ever; earlier files hold a slope and a zero."""
  dms = DMSConfig(elastic=(1.5, 12.0), window=3, elastic_thresholds=(3.5, 1.0, -2.0))
  assert dms.levels == Levels(1.5, 12.0, (3.5, 1.0, -2.0)) and from_json(DMSConfig, to_json(dms)) == dms
  assert DMSConfig().levels is None and DMSConfig(elastic=(1.5, 12.0)).offset == DMSConfig().offset == 5.0
  assert DMSConfig(elastic=(6.0, 9.0)).levels.usual == 6.0 and DMSConfig(elastic=(2.0, 2.0)).elastic_thresholds == (
    0.0,
  )
  old = {name: value for name, value in to_json(dms).items() if name != "elastic_thresholds"}
  earlier = from_json(DMSConfig, old | {"elastic_slope": 3.0, "elastic_pivot": 2.0}).levels
  crs = np.geomspace(1.5, 12.0, 9)
  np.testing.assert_allclose(earlier.threshold(crs), -3.0 * np.log(crs - 1.0), atol=1e-4)
  one = {name: value for name, value in to_json(DMSConfig()).items() if not name.startswith("elastic")}
  assert from_json(DMSConfig, one | {"elastic": [], "elastic_slope": None, "elastic_pivot": None}) == DMSConfig()
  checkpoint.save(tmp_path / "base", tiny.model(SMALL))
  checkpoint.save(tmp_path / "retrofit", tiny.model(SMALL, dms, LoRAConfig(rank=2)), groups=("gate", "lora"))
  assert checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit").dms == dms


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"elastic": (2.0,)}, "dms.elastic=2 must be two compression ratios above 1"),
    ({"elastic": (1.0, 4.0)}, "dms.elastic=1,4 must be two"),
    ({"elastic": (4.0, 2.0)}, "dms.elastic=4,2 must be two"),
    ({"elastic": (2.0, 4.0), "elastic_thresholds": (1.0, 2.0)}, "dms.elastic_thresholds must be two or more numbers"),
    ({"elastic": (2.0, 4.0), "elastic_thresholds": (1.0,)}, "dms.elastic_thresholds must be two or more numbers"),
    ({"elastic_thresholds": (1.0, 0.0)}, "dms.elastic_thresholds are of gates for a range of ratios"),
    ({"elastic": (2.0, 4.0), "objective": "dmc"}, "dms.elastic is for retrofit.objective=dms"),
  ],
)
def test_refused_numbers_are_named(wrong, message):
  with pytest.raises(ValueError, match=message):
    DMSConfig(**wrong)


@pytest.mark.parametrize(
  ("dms", "config", "message"),
  [
    ({}, {"schedule__final_cr": 8.0}, r"retrofit.schedule.final_cr=8 must be the highest CR of dms.elastic=1.5,12"),
    ({"gate": "neuron"}, {"trainable": "all"}, "dms.elastic with dms.gate='neuron': gates for a range of ratios need"),
  ],
)
def test_settings_that_do_not_fit_are_named(dms, config, message):
  with pytest.raises(ValueError, match=message):
    prepare(tiny.model(SMALL), gates(1.5, 12.0, **dms), LoRAConfig(rank=2), changed(BASE, **config))


def test_rows_of_one_target_are_a_single_target():
  fraction = jnp.asarray([0.9, 0.5])
  rows = losses.compression_loss(fraction, jnp.full(2, 4.0))
  assert float(rows) == float(losses.compression_loss(fraction, jnp.float32(4.0))) == 0.125
