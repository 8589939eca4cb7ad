"""On a mesh of 8 simulated devices, against the heads without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.mesh import MeshConfig, make_mesh
from gptjax.ops.heads import by_heads, from_heads, join_heads, split_heads
from gptjax.sharding import within
from tests.models import tiny

B, T, H, C = 8, 3, 8, 16
QKV = jax.random.normal(jax.random.key(0), (B, T, 3 * C))
MESH = make_mesh(MeshConfig(2, 2, 2), tiny.config(num_heads=H, channels=C, vocab_size=120), B)


def on_mesh(f, *arguments):
    return jax.jit(within(MESH, f))(*arguments)


@pytest.mark.parametrize("x", [QKV[0, 0], QKV[0].T @ QKV[0]], ids=["bias", "weight"])
def test_the_gradients_order_undoes_the_weights(x):
    dealt = on_mesh(by_heads, x)
    assert (np.asarray(dealt) != np.asarray(x)).any()
    np.testing.assert_array_equal(on_mesh(lambda x: from_heads(by_heads(x)), x), x)
    np.testing.assert_array_equal(by_heads(x), x)


def test_heads_on_a_mesh_are_those_without_one():
    found = on_mesh(lambda x: split_heads(by_heads(x), H), QKV)
    for head, expected in zip(found, split_heads(QKV, H), strict=True):
        np.testing.assert_array_equal(head, expected)
    np.testing.assert_array_equal(on_mesh(lambda x: join_heads(*split_heads(x, H)), QKV), QKV)
    np.testing.assert_array_equal(join_heads(*jnp.split(QKV.reshape(B, T, 3 * H, -1), 3, 2)), QKV)
