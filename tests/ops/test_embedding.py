import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptjax.ops import embedding_bwd, embedding_fwd
from tests.compare import assert_same_gradients, normal, vjp_of

N, C = 5, 3


@given(
    ids=hnp.arrays(
        np.int32, hnp.array_shapes(max_dims=3, max_side=7), elements=st.integers(0, N - 1)
    )
)
def test_backward_equals_vjp(ids):
    """Of ids in any shape: (B, T) tokens, (T) positions."""
    ids = jnp.asarray(ids)
    table, dy = normal(0, N, C), normal(2, *ids.shape, C)
    (reference,) = vjp_of(lambda table: embedding_fwd(ids, table), table, dy=dy)
    assert_same_gradients(embedding_bwd(ids, jnp.zeros_like(table), dy), reference, table)


def test_forward_looks_up_rows():
    table = normal(0, N, C)
    np.testing.assert_array_equal(
        embedding_fwd(jnp.array([[3, 0], [0, 4]], jnp.int32), table)[1, 1], table[4]
    )


def test_duplicate_ids_accumulate_and_unused_rows_stay():
    before = jnp.full((N, C), 10.0)
    dtable = embedding_bwd(jnp.array([[4, 4, 4]], jnp.int32), before, jnp.ones((1, 3, C)))
    np.testing.assert_array_equal(dtable[:, 0], [10, 10, 10, 10, 13])


def test_bfloat16_activations_accumulate_in_float32():
    """512 ones in one row: a bfloat16 sum would stop at 256."""
    ids, dy = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512, C), jnp.bfloat16)
    assert embedding_bwd(ids, jnp.zeros((N, C), jnp.float32), dy)[0, 0] == 512
