"""The one pass of CUDA against the two passes of CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.xla.softmax import _one_pass, _two_passes, log_sum_exp
from tests.compare import normal

INF = float("inf")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_ways_are_the_logarithm_of_the_sum(scale, dtype):
    x = (scale * normal(0, 5, 131)).astype(dtype)
    x = x.at[0, :100].set(-INF)
    expected = jax.nn.logsumexp(x.astype(jnp.float64), axis=1)
    for way in (_one_pass, _two_passes, log_sum_exp):
        found = way(x)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found, expected, rtol=50 * jnp.finfo(dtype).eps, atol=1e-6)


def test_rows_at_the_edges():
    x = jnp.array([[-INF, -INF], [3.0, -INF], [-INF, 3.0], [1e38, 1e38], [jnp.nan, 1.0]])
    x = x.astype(jnp.float32)
    found = _one_pass(x)
    np.testing.assert_allclose(found[:4], _two_passes(x)[:4])
    assert found[0] == jnp.finfo(jnp.float32).min
    assert jnp.isnan(found[4])


def test_jax_differentiates_the_one_pass_as_the_two():
    x = normal(1, 3, 17)
    np.testing.assert_allclose(
        jax.grad(lambda x: _one_pass(x).sum())(x), jax.nn.softmax(x, axis=1), rtol=1e-12
    )
