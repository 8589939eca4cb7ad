import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.ops import linear_bwd, linear_fwd
from tests.compare import assert_same_gradients, assert_same_sums, normal, vjp_of

size = st.integers(1, 5)


def test_forward_is_numpy_matmul():
    x, w, b = (np.asarray(a) for a in (normal(0, 2, 3, 4), normal(1, 4, 5), normal(2, 5)))
    terms = np.concatenate([x[:, :, None] * w.T, np.broadcast_to(b[:, None], (2, 3, 5, 1))], -1)
    assert_same_sums(linear_fwd(*map(jnp.asarray, (x, w, b)))[0], x @ w + b, terms)


@given(B=size, T=size, I=size, O=size)
@example(B=3, T=4, I=6, O=2)  # many rows of a wide input
def test_backward_equals_vjp(B, T, I, O):  # noqa: E741
    x, w, b, dy = normal(0, B, T, I), normal(1, I, O), normal(2, O), normal(3, B, T, O)
    _, saved = linear_fwd(x, w, b)
    reference = vjp_of(lambda *args: linear_fwd(*args)[0], x, w, b, dy=dy)
    assert_same_gradients(linear_bwd(saved, w, dy), reference, (x, w, b))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((4,), (3, 2)), ((3, 2), (4,)), ((3, 2), (2, 5)), ((4,), (5,))],
    ids=["CHD", "HDC", "HDHD", "CF"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_several_axes_count_as_one(inputs, outputs, bias):
    """Forward as NumPy's tensordot, backward as JAX's; a bias is left out where there is none."""
    x, w, dy = normal(0, 2, 3, *inputs), normal(1, *inputs, *outputs), normal(3, 2, 3, *outputs)
    weights = (w, normal(2, *outputs)) if bias else (w,)
    y, saved = linear_fwd(x, *weights)
    np.testing.assert_allclose(
        y, np.tensordot(x, w, len(inputs)) + (np.asarray(weights[1]) if bias else 0), rtol=1e-13
    )
    reference = vjp_of(lambda *args: linear_fwd(*args)[0], x, *weights, dy=dy)
    assert_same_gradients(linear_bwd(saved, w, dy)[: 1 + len(weights)], reference, (x, *weights))


def test_bfloat16_weight_gradients_are_summed_in_float32():
    """4096 equal products: a bfloat16 running sum would stop growing at 256."""
    x, dy, w = (
        jnp.ones((1, 4096, 1), jnp.bfloat16),
        jnp.ones((1, 4096, 1), jnp.bfloat16),
        jnp.ones((1, 1), jnp.float32),
    )
    dx, dw, db = linear_bwd(x, w, dy)
    assert (dx.dtype, dw.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert dw.item() == db.item() == 4096


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 24), (24, 96)])
def test_the_wider_side_of_a_weight_gradient_is_not_transposed(inputs, outputs, dtype):
    """XLA's CPU compiler writes a transposed left side out, which is slow in proportion to its
    size.
    """
    x, w, dy = (
        jax.ShapeDtypeStruct(s, dtype)
        for s in ((4, 64, inputs), (inputs, outputs), (4, 64, outputs))
    )
    text = jax.jit(linear_bwd).lower(x, w, dy).compile().as_text()
    assert "[96,256]" not in text
    assert "[24,256]" in text
