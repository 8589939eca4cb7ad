import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptjax.ops import embedding_bwd, embedding_fwd
from tests.compare import assert_same_gradients, normal, vjp_of

V, TMAX, C = 5, 7, 3


@given(tokens=hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(1, TMAX)), elements=st.integers(0, V - 1)))
def test_backward_equals_vjp(tokens):
    tokens = jnp.asarray(tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    wte, wpe, dy = normal(0, V, C), normal(1, TMAX, C), normal(2, *tokens.shape, C)
    reference = vjp_of(lambda *w: embedding_fwd(tokens, positions, *w, jnp.float64), wte, wpe, dy=dy)
    ours = embedding_bwd(tokens, positions, jnp.zeros_like(wte), jnp.zeros_like(wpe), dy)
    assert_same_gradients(ours, reference, (wte, wpe))


def test_duplicate_ids_accumulate_and_unused_rows_stay():
    tokens, positions = jnp.array([[4, 4, 4]], jnp.int32), jnp.arange(3, dtype=jnp.int32)
    before = jnp.full((V, C), 10.0)
    dwte, dwpe = embedding_bwd(tokens, positions, before, jnp.zeros((TMAX, C)), jnp.ones((1, 3, C)))
    np.testing.assert_array_equal(dwte[:, 0], [10, 10, 10, 10, 13])
    np.testing.assert_array_equal(dwpe[:, 0], [1, 1, 1, 0, 0, 0, 0])


def test_bfloat16_activations_accumulate_in_float32():
    """512 ones in one row: a bfloat16 sum would stop at 256."""
    tokens, positions = jnp.zeros((1, 512), jnp.int32), jnp.zeros(512, jnp.int32)
    dy = jnp.ones((1, 512, C), jnp.bfloat16)
    dwte, dwpe = embedding_bwd(tokens, positions, jnp.zeros((V, C), jnp.float32), jnp.zeros((TMAX, C), jnp.float32), dy)
    assert dwte[0, 0] == dwpe[0, 0] == 512
