"""Attention in blocks against the materialised form and JAX's gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import attention_bwd, attention_fwd
from gptjax.ops.attention import causal, materialised_fwd
from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd
from tests.compare import assert_same_gradients, normal, relative_l2, vjp_of

KEY = jax.random.key(3)
# B, T, H, D
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))


def qkv(B, T, H, D):
    return [normal(seed, B, T, H, D) for seed in range(3)]


def test_documents_and_groups_of_queries_in_uneven_blocks():
    """Two query heads a key head, the documents' borders within blocks and at their edge."""
    (q, do), (k, v) = (
        (normal(seed, 2, 7, 4, 5) for seed in (0, 9)),
        (normal(seed, 2, 7, 2, 5) for seed in (1, 2)),
    )
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 1, 1, 1]], jnp.int32)
    o, saved = blockwise_fwd(q, k, v, segments=segments, block_size=3)
    o2, saved2 = materialised_fwd(q, k, v, visible=causal(7, segments))
    assert relative_l2(o, o2) <= 1e-12
    assert_same_gradients(
        blockwise_bwd(saved, do), attention_bwd("materialised", saved2, do), (q, k, v)
    )


@given(shape=shapes, rate=st.sampled_from([0.0, 0.3]), block_size=st.integers(1, 10))
def test_blockwise_backward_equals_vjp(shape, rate, block_size):
    """Blocks that divide T, that do not, and one block larger than T."""
    args, do = qkv(*shape), normal(9, *shape)
    _, saved = blockwise_fwd(*args, rate, KEY, block_size=block_size)
    reference = vjp_of(
        lambda *x: blockwise_fwd(*x, rate, KEY, block_size=block_size)[0], *args, dy=do
    )
    assert_same_gradients(blockwise_bwd(saved, do, rate), reference, tuple(args))


@given(shape=shapes, block_size=st.integers(1, 10))
def test_blockwise_equals_materialised(shape, block_size):
    args, do = qkv(*shape), normal(9, *shape)
    o, saved = blockwise_fwd(*args, block_size=block_size)
    o2, saved2 = materialised_fwd(*args)
    assert relative_l2(o, o2) <= 1e-12
    assert_same_gradients(
        blockwise_bwd(saved, do), attention_bwd("materialised", saved2, do), tuple(args)
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(sign):
    """Scores of about +-10,000, and in one key's column far above the rest: softmax is
    shift-invariant, row by row.
    """
    q = jnp.full((1, 7, 1, 4), 100.0)
    k = sign * jnp.full((1, 7, 1, 4), 50.0).at[0, 2].set(40.0 if sign == 1 else 60.0)
    v = normal(2, 1, 7, 1, 4)
    o, saved = blockwise_fwd(q, k, v, block_size=3)
    o2, saved2 = materialised_fwd(q, k, v)
    np.testing.assert_allclose(o, o2, rtol=1e-9)
    assert jnp.isfinite(o).all()
    for ours, theirs in zip(
        blockwise_bwd(saved, v), attention_bwd("materialised", saved2, v), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("T", "blocks"), [(1, 1), (6, 2), (7, 3), (8, 3), (9, 3), (10, 4)])
def test_blocks_are_as_few_and_as_short_as_hold_the_sequence(T, blocks):
    _, saved = blockwise_fwd(*qkv(1, T, 1, 2), block_size=3)
    N, _, _, length, _ = saved.q.shape
    assert (N, length) == (blocks, math.ceil(T / blocks))


def test_blocks_of_later_keys_are_left_out():
    """What is masked is multiplied by zero, which would let a NaN through."""
    q, k, v = qkv(1, 6, 1, 2)
    k, v = (x.at[:, 3:].set(jnp.nan) for x in (k, v))
    o, saved = blockwise_fwd(q, k, v, block_size=3)
    assert jnp.isfinite(o[:, :3]).all()
    dq, _, _ = blockwise_bwd(saved, jnp.ones_like(o).at[:, 3:].set(0))
    assert jnp.isfinite(dq[:, :3]).all()


def test_every_pair_of_blocks_has_its_own_dropout_mask():
    """Uniform probabilities and values that tell the keys apart show what was dropped: no two
    blocks of it are alike.
    """
    T, R, heads = 12, 3, 6
    q = k = jnp.zeros((1, T, heads, T))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (1, T, heads, T))
    kept = np.asarray(blockwise_fwd(q, k, v, 0.5, KEY, block_size=R)[0] > 0)
    pairs = [(i, j) for i in range(T // R) for j in range(i)]
    masks = {kept[0, i * R : (i + 1) * R, :, j * R : (j + 1) * R].tobytes() for i, j in pairs}
    assert len(masks) == len(pairs) == 6


def test_blockwise_memory_is_linear_in_t():
    """Doubling T doubles the temporaries of forward and backward; materialised ones far more."""

    def temporaries(name: str, T: int) -> int:
        def both(q, k, v, do):
            o, saved = attention_fwd(name, q, k, v)
            return o, attention_bwd(name, saved, do)

        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        return jax.jit(both).lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("blockwise", 2048) < 2.3 * temporaries("blockwise", 1024)
    assert temporaries("materialised", 2048) > 2.5 * temporaries("materialised", 1024)
    assert temporaries("blockwise", 2048) < temporaries("materialised", 2048) / 10
