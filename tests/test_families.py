"""Families whose layers are not Llama's: a retrofit reaches its CR; the cache then equals the mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.convert import export
from dms_jax.model import Eviction, check_policy, forward
from dms_jax.retrofit import RetrofitConfig
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, init_state, train_step, trained_model
from tests.helpers import OTHER_FAMILIES, changed, close, family
from tests.programs import quick, read, step, unembed

ROWS, LENGTH, CHUNK, CR = 2, 40, 16, 2.0
CONFIG = changed(
  RetrofitConfig(batch_size=ROWS, seq_len=LENGTH), memory__compute_dtype="float32", schedule__initial_cr=CR,
  schedule__final_cr=CR, schedule__steps=30, optimizer__learning_rate=0.02, optimizer__warmup_steps=0,
)  # fmt: skip
train = quick(train_step.__wrapped__)


def test_what_is_left_out_is_refused_by_name(tmp_path):
  moe, phi3, granite = (OTHER_FAMILIES[name] for name in ("qwen3_moe", "phi3-partial", "granite"))
  with pytest.raises(ValueError, match=r"lora\.targets: 'gate_proj' is of experts"):
    tiny.model(moe, None, LoRAConfig(2, targets=("gate_proj",)))
  with pytest.raises(ValueError, match="phi3 models hold q_proj with others in one tensor"):
    export(tmp_path / "peft", tiny.model(phi3, tiny.dms(), LoRAConfig(2)), layout="peft")
  with pytest.raises(ValueError, match=r"family 'granite' \(its code has llama, qwen2, qwen3\)"):
    export(tmp_path / "torch", tiny.model(granite, tiny.dms()), layout="dms_torch")
  with pytest.raises(ValueError, match="ExpectedAttention turns keys by RoPE, and in this phi3 model not all"):
    check_policy(tiny.model(phi3), policies.ExpectedAttention(budget=20))
  for numbers in (dict(swiglu_limit=7.0), dict(swiglu_limit=7.0, swiglu_alpha=1.7)):
    with pytest.raises(ValueError, match="give swiglu_alpha and swiglu_limit together, to experts"):
      tiny.config(**numbers)
  assert not list(tmp_path.iterdir())


def test_sliding_layers_bound_windows_and_gates():
  """Rings are as large in all layers, and no sliding layer holds more than its window; other gates are refused."""
  config = OTHER_FAMILIES["gemma3"]
  with pytest.raises(
    ValueError, match=r"dms\.window=7: a gemma3_text model .* over 6 tokens takes dms\.window=5 at most"
  ):
    tiny.model(config, tiny.dms(window=7))
  with pytest.raises(ValueError, match=r"dms\.gate='neuron': a gemma3_text model"):
    tiny.model(config, tiny.dms(gate="neuron"))
  with pytest.raises(ValueError, match=r"dms\.elastic=2,8: a gemma3_text model .* takes gates for one ratio"):
    tiny.model(config, tiny.dms(window=5, elastic=(2.0, 8.0)))
  model = tiny.model(config)
  assert check_policy(tiny.model(config, tiny.dms(window=2)), None).window == 2
  for policy in (policies.StreamingLLM(window=6), policies.H2O(budget=20)):
    with pytest.raises(ValueError, match=f"{type(policy).__name__}: window=.* hold no more: give window=5 or less"):
      check_policy(model, policy)
  with pytest.raises(ValueError, match="every layer slides"):
    family("gemma3_text", sliding_window=6, sliding_layers=(True, True))


@pytest.mark.parametrize("window", [2, 5])
def test_gradients_of_layers_of_two_kinds(window):
  """A scan chooses each layer's window as it runs, a list of layers as it is traced: the gradients are equal."""
  config = OTHER_FAMILIES["gemma3"]
  model, tokens = tiny.model(config, tiny.dms(window=window)), tiny.tokens(config, ROWS, LENGTH)
  noise = jax.random.logistic(jax.random.key(0), (config.num_layers, ROWS, config.num_kv_heads, LENGTH))

  @quick
  def gradients(model):
    def loss(params):
      hidden, z = forward(model.replace(params=params), tokens, eviction=Eviction(noise=noise, tau=1.0))
      return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.tanh(z))

    return jax.grad(loss)(model.params)

  stacked, listed = gradients(model), model.replace(params=gradients(model.unstacked())).stacked().params
  assert np.abs(stacked["layers"]["dms_proj"]).max() > 1e-3
  jax.tree.map(lambda x, y: close(x, y, rtol=1e-4), stacked, listed)  # sums over tokens run in another order


@pytest.mark.parametrize("name", [name for name in OTHER_FAMILIES if name != "phi3"])  # its layers are Llama's
def test_retrofit_reaches_its_ratio(name):
  """By gates and low-rank updates; the trained model then reads a text in chunks and steps as it does at once.

  The window is smaller than that of layers that slide, if there are any.
  """
  config = OTHER_FAMILIES[name]
  window = 2 if config.sliding_layers else 5
  base, tokens = tiny.model(config), tiny.tokens(config, ROWS, LENGTH)
  student, teacher, trained = prepare(base, tiny.dms(window=window), LoRAConfig(rank=2), CONFIG)
  state, batch = init_state(CONFIG, trained), Batch(tokens)
  with jax.numpy_dtype_promotion("standard"):  # optax
    for _ in range(CONFIG.schedule.steps):
      state, metrics = train(state, student, teacher, batch, jax.random.key(0), CONFIG)
  assert metrics["evicted_fraction"] > 0.9 * (1 - 1 / CR) and np.isfinite(metrics["loss"])

  model = trained_model(student, state.trained, jnp.float32)
  tokens = np.asarray(tokens)
  expected, z = read(model, tokens)
  decisions = z > 0
  assert 0.1 < decisions.mean() < 0.99
  policy = policies.DMS(window=model.dms.window)
  cache = caches.for_model(model, policy, batch=ROWS, capacity=LENGTH, longest=LENGTH, page_size=8)
  widths = [CHUNK, CHUNK, *[1] * (LENGTH - 2 * CHUNK)]
  for start, width in zip(np.cumsum([0, *widths]), widths, strict=False):
    now = slice(int(start), int(start) + width)
    part = tokens[:, now], np.full(ROWS, width, np.int32), decisions[..., now]
    out, cache = step(model, policy, cache, *part)
    close(unembed(model, out.hidden), expected[:, now])
  sliding = np.flatnonzero(config.sliding_layers)  # exactly their windows, and the metrics count them
  for count in (out.seen.live, out.seen.reads, cache.live()):
    assert (np.asarray(count)[sliding] == config.sliding_window).all()
