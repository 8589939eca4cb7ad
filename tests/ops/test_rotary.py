import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import rotary_bwd, rotary_fwd
from tests.compare import assert_same_gradients, normal, vjp_of

THETA = 1e4


def rotated(x, positions, theta=THETA):
    """A head's halves as the parts of complex numbers, turned by position times frequency."""
    D = x.shape[-1]
    z = x[..., : D // 2] + 1j * x[..., D // 2 :]
    angles = np.asarray(positions)[..., None, None] * theta ** (-2 * np.arange(D // 2) / D)
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "positions", [[0, 1, 2, 3, 4], [[0, 1, 2, 0, 1], [0, 0, 1, 7, 100]]], ids=["shared", "by row"]
)
def test_forward_rotates_complex_numbers(positions, theta):
    x = normal(0, 2, 5, 3, 8)
    y = rotary_fwd(x, jnp.asarray(positions, jnp.int32), theta)
    np.testing.assert_allclose(y, rotated(np.asarray(x), positions, theta), rtol=1e-12, atol=1e-13)


@given(B=st.integers(1, 3), T=st.integers(1, 7), H=st.integers(1, 3), half=st.integers(1, 4))
def test_backward_equals_vjp(B, T, H, half):
    x, dy = normal(0, B, T, H, 2 * half), normal(1, B, T, H, 2 * half)
    positions = jnp.asarray(np.random.default_rng(2).integers(0, 99, (B, T)), jnp.int32)
    (reference,) = vjp_of(lambda x: rotary_fwd(x, positions, THETA), x, dy=dy)
    assert_same_gradients(rotary_bwd(positions, THETA, dy), reference, x)


def test_the_backward_undoes_the_forward():
    """A rotation is orthogonal: its transpose is its inverse."""
    x, positions = normal(0, 2, 9, 2, 6), jnp.arange(9, dtype=jnp.int32)
    back = rotary_bwd(positions, THETA, rotary_fwd(x, positions, THETA))
    np.testing.assert_allclose(back, x, rtol=1e-13, atol=1e-14)


def test_scores_depend_on_distances_alone():
    q, k = normal(0, 1, 6, 1, 8), normal(1, 1, 6, 1, 8)
    scores = []
    for start in (0, 17):
        positions = jnp.arange(start, start + 6, dtype=jnp.int32)
        scores.append(
            jnp.einsum("bthd,bshd->ts", *(rotary_fwd(x, positions, THETA) for x in (q, k)))
        )
    np.testing.assert_allclose(*scores, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_rotated_in_float32_and_stays_bfloat16():
    x, positions = normal(0, 1, 3, 1, 4).astype(jnp.bfloat16), jnp.array([0, 5, 4000], jnp.int32)
    y = rotary_fwd(x, positions, THETA)
    assert y.dtype == jnp.bfloat16
    exact = rotated(np.asarray(x, np.float64), [0, 5, 4000])
    assert np.abs(np.asarray(y, np.float64) - exact).max() < 2**-7 * np.abs(exact).max()


def test_angles_of_a_long_context_are_exact_to_float32():
    position = jnp.array([8191], jnp.int32)
    x = jnp.ones((1, 1, 1, 64), jnp.float32)
    y = jax.jit(rotary_fwd, static_argnums=2)(x, position, 1e5)
    np.testing.assert_allclose(y, rotated(np.ones((1, 1, 1, 64)), [8191], 1e5), atol=2e-3)
