"""A whole model lowered for an absent Hopper GPU: every layer's attention is a kernel."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.families import PRESETS
from dms_jax.generation import decode as decoding
from dms_jax.generation import together
from dms_jax.generation.sampling import Sampling
from dms_jax.generation.stops import StopCriteria
from dms_jax.model import Model, cached_forward
from dms_jax.params import map_table, param_table
from dms_jax.retrofit import LossConfig, MemoryConfig, RetrofitConfig
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, init_state, train_step
from pallas_kernels.common import compat
from pallas_kernels.common.dispatch import log_once
from tests.kernels.suite import needs_mosaic_gpu

pytestmark = needs_mosaic_gpu
SMOLLM2 = PRESETS["smollm2-135m"]


def lowered_for_cuda(
  tokens: int, kind: str = "contiguous", policy=None, config: ModelConfig = SMOLLM2, **options
) -> str:
  """A model's step of `tokens` tokens a row into a cache of a kind, lowered for a Hopper GPU that is not there.

  `policy`: of the cache; default DMS, by the model's gates.
  """
  dms, struct = DMSConfig(window=64), jax.ShapeDtypeStruct
  params = map_table(lambda _, spec: struct(spec.shape, jnp.bfloat16), param_table(config, dms))
  policy = policies.DMS(window=64, threshold=struct((), jnp.float32)) if policy is None else policy.resolved(64)
  sizes = dict(batch=4, capacity=1024, policy=policy, lag=1, dtype=jnp.bfloat16)
  cache = jax.eval_shape(partial(caches.create, kind, config, **sizes, **options))
  as_on_a_gpu = lambda x: struct(x.shape, jnp.bfloat16) if x.dtype == jnp.uint16 else x  # not as bits, as on a CPU
  cache = jax.tree.map(as_on_a_gpu, cache)
  arguments = Model(params, config, dms), policy, cache, struct((4, tokens), jnp.int32), struct((4,), jnp.int32)
  with compat.assume_hopper():
    return jax.jit(cached_forward, donate_argnums=2).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


TRAINED = {  # gates, and settings of a retrofit besides its sizes
  "lm": (None, {"trainable": "all", "loss": LossConfig("lm")}),
  "trimkv": (DMSConfig(objective="trimkv"), {"trainable": "gates", "loss": LossConfig("forward_kl")}),
  "dmc": (DMSConfig(objective="dmc", window=16), {"trainable": "gates", "loss": LossConfig("lm")}),
}


@pytest.mark.parametrize("objective", TRAINED)
def test_training_lowers_for_cuda(objective):
  """Packed documents, forward and backward: attention by the kernel, and no array of T x T scores."""
  config, struct, rows, tokens = PRESETS["smollm2-135m"], jax.ShapeDtypeStruct, 2, 1024
  dms, options = TRAINED[objective]
  settings = RetrofitConfig(objective=objective, batch_size=rows, seq_len=tokens, memory=MemoryConfig(), **options)
  base = Model(map_table(lambda _, spec: struct(spec.shape, jnp.float32), param_table(config)), config)
  student, teacher, trained = jax.eval_shape(lambda base: prepare(base, dms, LoRAConfig(), settings), base)
  state = jax.eval_shape(partial(init_state, settings), trained)
  ids = struct((rows, tokens), jnp.int32)
  batch, key = Batch(ids, ids, struct((rows, tokens), jnp.bool)), jax.eval_shape(lambda: jax.random.key(0))
  with compat.assume_hopper(), jax.numpy_dtype_promotion("standard"):  # optax
    lowered = train_step.trace(state, student, teacher, batch, key, settings).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert all(f"window_bias_{name}" in text for name in ("forward", "dq", "dkv"))
  assert f"{tokens}x{tokens}" not in text


@pytest.mark.parametrize("tokens, kind, kernel", [(1, "paged", "decode_pages"), (64, "contiguous", "prefill_")])
def test_heads_of_256_are_the_kernels(tokens, kind, kernel):
  """Two layers of Gemma 2 9B, whose scores are capped."""
  config = dataclasses.replace(PRESETS["gemma-2-9b"], num_layers=2, sliding_layers=(True, False), vocab_size=256)
  assert kernel in lowered_for_cuda(tokens, kind, config=config)


def test_prefill_of_a_model_lowers_for_cuda():
  """SmolLM2's, into a contiguous cache: every layer through the kernel."""
  assert "prefill_" in lowered_for_cuda(256)


def test_decode_step_of_a_model_lowers_for_cuda():
  """SmolLM2's, from a contiguous cache: every layer through the kernel."""
  assert "decode_" in lowered_for_cuda(1)


@pytest.mark.parametrize("archive", [None, "int8"])
def test_decode_step_of_a_model_with_pages_lowers_for_cuda(archive):
  """The same from a pool of pages, beside rings."""
  assert "decode_pages32_" in lowered_for_cuda(1, "paged", page_format=archive)


OBSERVERS = [(policies.H2O(budget=513), "contiguous"), (policies.TOVA(budget=512), "paged")]


@pytest.mark.parametrize("policy, kind", OBSERVERS, ids=["h2o", "tova"])
def test_decode_step_that_observes_mass_lowers_for_cuda(policy, kind):
  """The kernel also returns the attention mass that these policies watch."""
  assert "_mass_64x" in lowered_for_cuda(1, kind, policy)


WIDTH, HEADS = 2048, 2  # rows of a sweep, KV heads of a small reasoner


def on_a_gpu(tree):
  """Shapes as on a GPU: bfloat16 is not stored as bits."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.uint16 else x.dtype), tree)


@pytest.fixture(scope="module")
def sweep():
  """The shapes of a `Generator` of 2,048 rows on a model of 7 M parameters: (model, policy, cache, rows' states)."""
  config = ModelConfig(
    num_layers=6, d_model=320, d_ff=896, num_heads=6, num_kv_heads=HEADS, head_dim=64, vocab_size=128
  )
  gates, struct = DMSConfig(window=16), jax.ShapeDtypeStruct
  params = map_table(lambda _, spec: struct(spec.shape, jnp.bfloat16), param_table(config, gates))
  model = jax.eval_shape(lambda params: Model(params, config, gates).unstacked(), params)
  policy = policies.DMS(window=16, threshold=struct((WIDTH,), jnp.float32))
  make = lambda: caches.for_model(model, policy, batch=WIDTH, capacity=18, kind="paged", longest=2048)
  cache = on_a_gpu(jax.eval_shape(make))
  column, keys = struct((WIDTH,), jnp.int32), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), WIDTH))
  return model, policy, cache, decoding.DecodeState(column, keys, column, column, column, column)


def test_decode_block_of_many_rows_lowers_for_cuda(sweep, caplog):
  """2,048 rows of two KV heads take the kernel for pages in every layer; nothing falls back to XLA."""
  model, policy, cache, rows = sweep
  sampling = Sampling(jax.ShapeDtypeStruct((WIDTH,), jnp.float32))
  stop = StopCriteria(jax.ShapeDtypeStruct((1,), jnp.int32))
  with compat.assume_hopper(), caplog.at_level("INFO", "pallas_kernels"):
    log_once.cache_clear()
    traced = decoding.decode_block.trace(model, policy, cache, rows, sampling, stop, steps=4, history=False)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("decode_pages32_") >= model.config.num_layers
  assert not [record.getMessage() for record in caplog.records if "XLA takes over" in record.getMessage()]


def test_prompts_read_together_lower_for_cuda(sweep):
  model, policy, cache, _ = sweep
  struct, reads = jax.ShapeDtypeStruct, 32
  column = struct((reads,), jnp.int32)
  arguments = model, policy.replace(threshold=struct((reads,), jnp.float32)), cache, column
  logits = struct((WIDTH, model.config.vocab_size), jnp.float32)
  with compat.assume_hopper():
    traced = together._whole.trace(*arguments, struct((reads, 64), jnp.int32), column, column, logits, places=8)
    assert "prefill_" in traced.lower(lowering_platforms=("cuda",)).as_text()
