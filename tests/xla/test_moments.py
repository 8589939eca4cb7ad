"""The one pass of CUDA against the two passes of CPU, and both against float64."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.xla.moments import _one_pass, _two_passes, mean_and_variance
from tests.compare import normal, relative_l2

C = 768


def rows(kind):
    x = np.array(normal(0, 2, 3, C))
    match kind:
        case "far from zero":
            return x + 1000
        case "an outlier first":  # as far from the mean as a number can be
            x[..., 0] = 3000
        case "an outlier elsewhere":
            x[..., 447] = 3000
        case "constant":
            x[:] = 7
        case "rows far from each other":
            x += 1e4 * np.arange(6).reshape(2, 3, 1)
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "far from zero",
        "an outlier first",
        "an outlier elsewhere",
        "constant",
        "rows far from each other",
    ],
)
def test_both_ways_are_the_mean_and_the_variance(kind, dtype):
    x = jnp.asarray(rows(kind), dtype)
    exact = np.asarray(x, np.float64)
    eps = float(jnp.finfo(dtype).eps)
    for way in (_one_pass, _two_passes):
        mean, variance = way(x)
        assert mean.dtype == variance.dtype == dtype
        assert mean.shape == variance.shape == (2, 3, 1)
        largest = np.abs(exact).max()
        np.testing.assert_allclose(mean[..., 0], exact.mean(-1), rtol=0, atol=8 * eps * largest)
        np.testing.assert_allclose(variance[..., 0], exact.var(-1), rtol=4 * C * eps)
        assert (variance >= 0).all()


def test_jax_differentiates_the_one_pass_as_the_two():
    x, weights = normal(1, 2, 3, 17), normal(2, 2, 2, 3, 1)
    gradients = [
        jax.grad(
            lambda x, way=way: sum(jnp.vdot(w, m) for w, m in zip(weights, way(x), strict=True))
        )(x)
        for way in (_one_pass, _two_passes)
    ]
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize(
    ("dtype", "platform", "passes"),
    [
        ("bfloat16", "cuda", 1),
        ("bfloat16", "cpu", 2),
        ("bfloat16", "tpu", 2),
        ("float32", "cuda", 2),
    ],
)
def test_cuda_passes_once_over_16_bit_numbers(dtype, platform, passes):
    """In two passes all of x is needed again, for its distance from the mean."""
    x = jax.ShapeDtypeStruct((2, 3, C), dtype)
    exported = jax.export.export(jax.jit(mean_and_variance), platforms=[platform])(x)
    text = exported.mlir_module()
    distances = [line for line in text.splitlines() if "stablehlo.subtract" in line]
    # The one pass also subtracts a number a row
    assert len(distances) == 3 - passes
    assert all(result.dtype == jnp.float32 for result in exported.out_avals)


def test_of_16_bit_numbers_either_way_is_exact_to_their_own_rounding():
    """With a row's only outlier first, where the one pass is at its worst."""
    x = jnp.asarray(rows("an outlier first"), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for way in (_one_pass, _two_passes):
        mean, variance = (np.asarray(m) for m in way(x.astype(jnp.float32)))
        n = (exact - mean) / np.sqrt(variance)
        expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
        assert relative_l2(n, expected) < 0.1 * float(jnp.finfo(jnp.bfloat16).eps)
