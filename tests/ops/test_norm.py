import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import layernorm_bwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_fwd
from tests.compare import assert_same_gradients, assert_same_sums, normal, vjp_of

size = st.integers(1, 5)


def test_forward_against_the_definition():
    x, w, b = (np.asarray(a) for a in (3 + 2 * normal(0, 2, 3, 8), normal(1, 8), normal(2, 8)))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(layernorm_fwd(*map(jnp.asarray, (x, w, b)))[0], expected, rtol=1e-12)


@given(B=size, T=size, C=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_backward_equals_vjp(B, T, C, scale):
    x, w, b, dy = scale * normal(0, B, T, C), normal(1, C), normal(2, C), normal(3, B, T, C)
    _, saved = layernorm_fwd(x, w, b)
    reference = vjp_of(lambda *args: layernorm_fwd(*args)[0], x, w, b, dy=dy)
    assert_same_gradients(
        layernorm_bwd(saved, w, dy), reference, (x, w, b), tolerance=1e-11 if C == 1 else 1e-12
    )


def test_gradient_has_no_component_along_a_shift_or_scale_of_the_input():
    """LayerNorm ignores both (eps aside), so the gradient is orthogonal to the ones vector and to x
    - mean.
    """
    x, w, dy = 10 * normal(0, 1, 1, 64), normal(1, 64), normal(2, 1, 1, 64)
    dx, _, _ = layernorm_bwd(layernorm_fwd(x, w, w)[1], w, dy)
    # The backward subtracts the mean of 64, then all are added
    assert_same_sums(dx.sum(), 0, jnp.tile(dx.ravel(), 2))
    assert abs((dx * (x - x.mean())).sum()) < 1e-5


def test_bfloat16_statistics_are_float32():
    x = (1000 + normal(0, 1, 2, 64)).astype(jnp.bfloat16)
    w = jnp.ones(64, jnp.float32)
    y, saved = layernorm_fwd(x, w, 0 * w)
    assert y.dtype == jnp.bfloat16
    assert saved.mean.dtype == saved.rstd.dtype == jnp.float32
    np.testing.assert_allclose(saved.mean[..., 0], np.asarray(x, np.float64).mean(-1), rtol=1e-6)


def test_rmsnorm_against_the_definition():
    x, w = (np.asarray(a) for a in (3 + 2 * normal(0, 2, 3, 8), normal(1, 8)))
    for eps in (1e-5, 0.5):
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w
        found = rmsnorm_fwd(jnp.asarray(x), jnp.asarray(w), eps)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(
    B=size,
    T=size,
    C=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_rmsnorm_backward_equals_vjp(B, T, C, scale, eps):
    x, w, dy = scale * normal(0, B, T, C), normal(1, C), normal(2, B, T, C)
    _, saved = rmsnorm_fwd(x, w, eps)
    reference = vjp_of(lambda *args: rmsnorm_fwd(*args, eps)[0], x, w, dy=dy)
    assert_same_gradients(
        rmsnorm_bwd(saved, w, dy), reference, (x, w), tolerance=1e-9 if C == 1 else 1e-12
    )


def test_rmsnorms_gradient_has_no_component_along_the_input():
    """RMSNorm ignores the input's scale (eps aside)."""
    x, w, dy = 10 * normal(0, 1, 1, 64), normal(1, 64), normal(2, 1, 1, 64)
    dx, _ = rmsnorm_bwd(rmsnorm_fwd(x, w)[1], w, dy)
    assert abs((dx * x).sum()) < 1e-6
    assert abs(dx.sum()) > 1e-3  # but of a shift it takes notice


def test_rmsnorms_bfloat16_statistic_is_float32():
    x = (1000 + normal(0, 1, 2, 64)).astype(jnp.bfloat16)
    y, saved = rmsnorm_fwd(x, jnp.ones(64, jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert saved.rstd.dtype == jnp.float32
    expected = 1 / np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1))
    np.testing.assert_allclose(saved.rstd[..., 0], expected, rtol=1e-6)
