"""A whole model lowered for an absent Hopper GPU: every layer's attention is a kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import DMSConfig
from dms_jax.families import PRESETS
from dms_jax.model import Model, cached_forward
from dms_jax.params import map_table, param_table
from pallas_kernels.common import compat
from tests.kernels.suite import needs_mosaic_gpu

pytestmark = needs_mosaic_gpu


def lowered_for_cuda(tokens: int, kind: str = "contiguous", policy=None, **options) -> str:
  """SmolLM2's step of `tokens` tokens a row into a cache of a kind, lowered for a Hopper GPU that is not there.

  `policy`: of the cache; default DMS, by the model's gates.
  """
  config, dms, struct = PRESETS["smollm2-135m"], DMSConfig(window=64), jax.ShapeDtypeStruct
  params = map_table(lambda _, spec: struct(spec.shape, jnp.bfloat16), param_table(config, dms))
  policy = policies.DMS(window=64, threshold=struct((), jnp.float32)) if policy is None else policy.resolved(64)
  sizes = dict(batch=4, capacity=1024, policy=policy, lag=1, dtype=jnp.bfloat16)
  cache = jax.eval_shape(partial(caches.create, kind, config, **sizes, **options))
  as_on_a_gpu = lambda x: struct(x.shape, jnp.bfloat16) if x.dtype == jnp.uint16 else x  # not as bits, as on a CPU
  cache = jax.tree.map(as_on_a_gpu, cache)
  arguments = Model(params, config, dms), policy, cache, struct((4, tokens), jnp.int32), struct((4,), jnp.int32)
  with compat.assume_hopper():
    return jax.jit(cached_forward, donate_argnums=2).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


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
