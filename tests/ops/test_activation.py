import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import gelu_bwd, gelu_fwd, swiglu_bwd, swiglu_fwd
from tests.compare import assert_same_gradients, normal, vjp_of


def test_forward_is_the_tanh_form():
    # 1 + tanh cancels on the left: |x| u remains
    x = jnp.linspace(-6, 6, 101, dtype=jnp.float64)[None, None]
    np.testing.assert_allclose(
        gelu_fwd(x)[0], jax.nn.gelu(x, approximate=True), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("x", [0.5, 1.0, 3.0])
def test_forward_is_not_the_erf_form(x):
    """The two differ by up to 5e-4: weights trained with one must not run with the other."""
    exact = 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    assert (
        1e-6 < abs(float(gelu_fwd(jnp.full((1, 1, 1), x, jnp.float64))[0][0, 0, 0]) - exact) < 5e-4
    )


@given(T=st.integers(1, 6), F=st.integers(1, 6), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_backward_equals_vjp(T, F, scale):
    x, dy = scale * normal(0, 2, T, F), normal(1, 2, T, F)
    _, saved = gelu_fwd(x)
    (reference,) = vjp_of(lambda x: gelu_fwd(x)[0], x, dy=dy)
    assert_same_gradients(gelu_bwd(saved, dy), reference, x)


def test_bfloat16_stays_bfloat16():
    x = normal(0, 1, 2, 3).astype(jnp.bfloat16)
    y, saved = gelu_fwd(x)
    assert y.dtype == gelu_bwd(saved, x).dtype == jnp.bfloat16


def test_swiglu_is_silu_of_the_gate_times_up():
    gate, up = jnp.linspace(-20, 20, 41)[None, None], normal(0, 1, 1, 41)
    np.testing.assert_allclose(
        swiglu_fwd(gate, up)[0], np.asarray(gate) / (1 + np.exp(-np.asarray(gate))) * up, rtol=1e-12
    )


@given(T=st.integers(1, 6), F=st.integers(1, 6), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_swiglu_backward_equals_vjp(T, F, scale):
    gate, up, dy = scale * normal(0, 2, T, F), normal(1, 2, T, F), normal(2, 2, T, F)
    _, saved = swiglu_fwd(gate, up)
    reference = vjp_of(lambda *x: swiglu_fwd(*x)[0], gate, up, dy=dy)
    assert_same_gradients(swiglu_bwd(saved, dy), reference, (gate, up))


def test_swiglu_of_bfloat16_stays_bfloat16():
    x = normal(0, 1, 2, 3).astype(jnp.bfloat16)
    y, saved = swiglu_fwd(x, x)
    assert {y.dtype, *(d.dtype for d in swiglu_bwd(saved, x))} == {jnp.dtype(jnp.bfloat16)}
