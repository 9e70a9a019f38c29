"""Products as each device computes them: the same numbers by whatever form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.execution import FEW_ROWS
from dms_jax.layers import linear
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
