"""The ops as blocks call them: the numbers of `gptjax.ops`, on one device and on a mesh, and where
an error in one shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import ops
from gptjax.config import MeshConfig
from gptjax.models import gpt2, layers, transformer
from gptjax.ops.quantized import OutIn, quantize
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import on_mesh
from tests.compare import assert_same_gradients, normal
from tests.models import tiny

MESH = make_mesh(MeshConfig(2, 2, 2), {}, 4)
IDS = jnp.array([[3, 0, 3], [1, 1, 1], [0, 4, 2], [4, 4, 3]], jnp.int32)
X, W, B = normal(0, 4, 3, 8), normal(1, 8, 6), normal(2, 6)
CALLS = {
    "linear_fwd": (X, W, B),
    "linear_bwd": (X, W, normal(3, 4, 3, 6)),
    "layernorm_fwd": (X, normal(1, 8), normal(2, 8)),
    "layernorm_bwd": (
        ops.layernorm_fwd(X, normal(1, 8), normal(2, 8))[1],
        normal(1, 8),
        normal(3, 4, 3, 8),
    ),
    "gelu_fwd": (X,),
    "gelu_bwd": (X, normal(3, 4, 3, 8)),
    "dropout_fwd": (X, 0.0, None),
    "embedding_fwd": (IDS, normal(0, 8, 8)),
    "embedding_bwd": (IDS, normal(0, 8, 8), X),
}


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "mesh"])
@pytest.mark.parametrize("name", CALLS)
def test_numbers_equal_those_of_the_ops(name, mesh):
    ours = jax.jit(on_mesh(mesh, lambda: getattr(layers, name)(*CALLS[name])))()
    expected = getattr(ops, name)(*CALLS[name])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), ours, expected
    )


def test_positions_of_a_mesh_are_those_of_one_device():
    """Ids with one axis, of which every device has all."""
    table, dy = normal(0, 8, 8), normal(1, 3, 8)
    ours = jax.jit(on_mesh(MESH, lambda: layers.embedding_bwd(IDS[0], table, dy)))()
    np.testing.assert_allclose(ours, ops.embedding_bwd(IDS[0], table, dy), rtol=1e-14)


def test_recomputed_gelu_equals_gelu():
    np.testing.assert_array_equal(layers.gelu_again(X, 2 * X), ops.gelu_fwd(2 * X)[0])


def test_recomputed_swiglu_equals_swiglu():
    y, saved = ops.swiglu_fwd(2 * X, 3 * X)
    np.testing.assert_array_equal(layers.swiglu_again(X, saved), y)


def test_weights_may_be_in_any_storage():
    np.testing.assert_allclose(
        layers.linear_fwd(X, OutIn(W.T), B)[0], ops.linear_fwd(X, W, B)[0], rtol=1e-12
    )
    together, _ = layers.linears_fwd(X, (OutIn(W.T), OutIn(2 * W.T)), (B, 3 * B))
    np.testing.assert_allclose(together[1], ops.linear_fwd(X, 2 * W, 3 * B)[0], rtol=1e-12)
    np.testing.assert_array_equal(layers.embedding_fwd(IDS, OutIn(W)), W[IDS])
    np.testing.assert_allclose(layers.embedding_fwd(IDS, quantize(W, "q8_0")), W[IDS], atol=0.02)


@pytest.mark.parametrize(
    "op",
    [
        "linear_bwd",
        "layernorm_bwd",
        "gelu_bwd",
        "attention_bwd",
        "cross_entropy_bwd",
        "embedding_bwd",
        "dropout_bwd",
    ],
)
def test_a_relative_error_of_1e_8_in_any_op_shows_in_the_gradient(monkeypatch, op):
    cfg = tiny.config(dropout=0.1)
    user = gpt2 if hasattr(gpt2, op) else transformer
    right = getattr(user, op)
    params, batch, key = tiny.params(cfg), tiny.batch(cfg), jax.random.key(5)
    expected = jax.jit(jax.grad(transformer.loss), static_argnums=2)(params, batch, cfg, key)
    monkeypatch.setattr(
        user, op, lambda *a, **k: jax.tree.map(lambda x: x * (1 + 1e-8), right(*a, **k))
    )
    _, found = jax.jit(functools.partial(transformer.loss_and_grad, cfg=cfg))(
        params, batch, key=key
    )
    with pytest.raises(AssertionError):
        assert_same_gradients(found, expected, params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_fusible_form_of_gelu_equals_gelu(dtype):
    """Up to the roundings of 1 + tanh, which x multiplies."""
    x = 3 * X.astype(dtype)
    found = layers._gelu_of_product(x)
    assert found.dtype == x.dtype
    eps = jnp.finfo(dtype).eps
    np.testing.assert_array_less(abs(found - ops.gelu_fwd(x)[0]), 2 * eps * abs(x))


def test_jax_differentiates_the_fusible_form_of_gelu_in_float32():
    """Not the roundings of 16-bit steps."""
    x = X.astype(jnp.bfloat16)
    found, expected = (
        jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum())(x)
        for f in (layers._gelu_of_product, lambda x: ops.gelu_fwd(x)[0])
    )
    np.testing.assert_array_equal(found, expected)


def test_add_adds():
    np.testing.assert_array_equal(layers.add(X, 2 * X), X + 2 * X)
    np.testing.assert_array_equal(layers.add(X, 2 * X, X), X + 2 * X + X)
