import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops.linear import linear_fwd
from gptjax.ops.quantized import (
    OutIn,
    Quantized,
    _dequantized_product,
    product,
    quantize,
    quantized_linear,
    table_rows,
)
from tests.compare import assert_same_sums, normal

X = jax.random.normal(jax.random.key(0), (3, 17))
W = jax.random.normal(jax.random.key(1), (5, 17))
TERMS = X[:, None] * W[None]  # of X @ W.T


def dequantized(w: Quantized) -> np.ndarray:
    return np.asarray(w.q, np.float64) * np.asarray(w.scale, np.float64)[..., None]


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


@given(st.floats(1e-20, 1e20), st.integers(1, 4))
def test_no_weight_moves_by_more_than_half_a_step(size, layers):
    w = size * jax.random.normal(jax.random.key(layers), (layers, 5, 17))
    quantized = quantize(w)
    step = np.abs(w).max(-1, keepdims=True) / 127
    assert (np.abs(dequantized(quantized) - w) <= 0.5001 * step).all()
    assert quantized.q.dtype == jnp.int8
    assert (np.abs(quantized.q).max(-1) == 127).all()


def test_a_row_of_zeros_stays_one():
    quantized = quantize(jnp.zeros((2, 3)))
    assert not product(jnp.ones((1, 3)), quantized).any()
    assert np.isfinite(product(jnp.zeros((1, 17)), quantize(W))).all()


def test_products_of_whole_weights_are_exact():
    assert_same_sums(product(X, OutIn(W)), X @ W.T, TERMS)
    assert_same_sums(product(X, W), X @ W.T, TERMS)


def test_the_product_of_8_bit_weights_adds_no_error():
    """On CPU x has 15 bits in it: an error of at most 2^-16 of the largest of a row."""
    quantized = quantize(W)
    error = np.abs(np.asarray(product(X, quantized)) - np.asarray(X) @ dequantized(quantized).T)
    bound = 2.0**-16 * np.abs(X).max(-1, keepdims=True) * np.abs(dequantized(quantized)).sum(-1)
    assert (error <= 1.1 * bound + 1e-5).all()
    assert (
        relative(_dequantized_product(X, quantized), np.asarray(X) @ dequantized(quantized).T)
        < 1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("store", [OutIn, quantize])
def test_dtypes_stay(dtype, store):
    x, w = X.astype(dtype), W.astype(dtype)
    y = product(x, store(w))
    assert y.dtype == x.dtype
    assert relative(y.astype(jnp.float64), X @ W.T) < 2e-2


def test_a_linear_layer_is_the_same_however_its_weight_is_kept():
    x, b = X.reshape(3, 1, 17), jnp.arange(5.0)
    y, _ = linear_fwd(x, W.T, b)
    terms = jnp.concatenate([TERMS, jnp.broadcast_to(b[None, :, None], (3, 5, 1))], -1)[:, None]
    assert_same_sums(quantized_linear(x, OutIn(W), b)[0], y, terms)
    assert relative(quantized_linear(x, quantize(W), b)[0], y) < 1e-2


def test_several_axes_count_as_one():
    """Heads to channels, without bias: (C, H, D) for the outputs first, one scale a channel."""
    w = normal(0, 5, 3, 4)
    x = normal(1, 2, 6, 3, 4)
    y, _ = linear_fwd(x, jnp.moveaxis(w, 0, -1))
    assert_same_sums(
        quantized_linear(x, OutIn(w))[0], y, (x[:, :, None] * w[None, None]).reshape(2, 6, 5, 12)
    )
    assert quantize(w, inputs=2).scale.shape == (5,)
    assert relative(quantized_linear(x, quantize(w, inputs=2))[0], y) < 1e-2


def test_rows_of_a_table():
    ids = jnp.array([[4, 0], [1, 1]])
    for table in (W, OutIn(W)):
        np.testing.assert_array_equal(table_rows(table, ids), W[ids])
    quantized = quantize(W)
    np.testing.assert_allclose(table_rows(quantized, ids), dequantized(quantized)[ids], rtol=1e-6)
