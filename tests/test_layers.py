"""Products as each device computes them: the same numbers by whatever form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.execution import FEW_ROWS, override
from dms_jax.layers import join_updates, joint_updates, linear, project
from tests.helpers import close


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_of_few_rows(rows, dtype):
  """To float32's rounding what the formula gives, and bit-equal at every place and beside any neighbours."""
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, 96), (75, 96)))
  product = jax.jit(lambda x: linear(x, weight, out_dtype=jnp.float32))
  y = np.asarray(product(x))
  close(y, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, 1e-6)
  np.testing.assert_array_equal(product(x[::-1]), y[::-1])
  np.testing.assert_array_equal(product(x.at[1:].set(jnp.nan))[0], y[0])


@pytest.mark.parametrize("cores", [1, 2, 6, 7, None])
def test_one_row_is_divided_among_cores(cores, monkeypatch):
  """On any number of them, also where they do not divide it."""
  monkeypatch.setattr("os.cpu_count", lambda: cores)
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 2, 24), (6, 5, 2, 24)))
  y = linear(x, weight, 2)
  close(y, np.einsum("rhd,abhd->rab", np.asarray(x, np.float64), np.asarray(weight, np.float64)), 1e-6)


@pytest.mark.parametrize("scale", [2.5, (0.0, 0.3, 2.0)])
@pytest.mark.parametrize("names", [("q", "k", "v"), ("q", "v"), ("k",), ()])
def test_joint_updates_are_those_apart(names, scale):
  """To float32's rounding, or bfloat16's of three numbers; o, which is never joined, has two axes of inputs."""
  rng, scale = np.random.default_rng(0), jnp.asarray(scale) if isinstance(scale, tuple) else scale
  random = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  outputs = {"q": (4, 8), "k": (2, 8), "v": (2, 8), "o": (24,)}
  inputs, layer, read = {name: (4, 8) if name == "o" else (24,) for name in outputs}, {}, {}
  for name in outputs:
    layer[name], read[name] = random(*outputs[name], *inputs[name]), random(3, 1, *inputs[name])
    if name in (*names, "o"):
      layer |= {f"{name}_lora_a": random(3, *inputs[name]), f"{name}_lora_b": random(*outputs[name], 3)}

  def products(layer, read):
    updates = joint_updates(read["q"], layer, ("q", "k", "v"), "qkv", scale)
    assert set(updates) in (set(), set(names))
    of = lambda name, x: project(x, layer, name, x.ndim - 2, lora_scale=scale, update=updates.get(name))
    return [of(name, read["o" if name == "o" else "q"]) for name in outputs]

  for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):
    own, x = jax.tree.map(lambda y, dtype=dtype: y.astype(dtype), (layer, read))
    apart = products(own, x)
    with override(joint_updates=3):
      joint = products(join_updates(own, ("q", "k", "v"), "qkv"), x)
    for one, other in zip(joint, apart, strict=True):
      assert one.dtype == other.dtype
      close(np.asarray(one, np.float64), np.asarray(other, np.float64), tolerance)
