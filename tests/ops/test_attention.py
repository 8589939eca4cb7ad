import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import attention, attention_bwd, attention_fwd
from gptjax.ops.attention import materialised_fwd
from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd
from tests.compare import assert_same_gradients, normal, relative_l2, vjp_of

KEY = jax.random.key(3)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))  # B, T, H, D


def qkv(B, T, H, D):
    return [normal(seed, B, T, H, D) for seed in range(3)]


def test_forward_against_a_loop_over_queries():
    q, k, v = (np.asarray(x) for x in qkv(2, 5, 3, 4))
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(2, 5, 3):
        scores = np.array([q[b, t, h] @ k[b, s, h] / 2 for s in range(t + 1)])  # 2 = sqrt(D)
        p = np.exp(scores) / np.exp(scores).sum()
        expected[b, t, h] = p @ v[b, : t + 1, h]
    for name in ("materialised", "blockwise"):
        ours, _ = attention_fwd(name, *map(jnp.asarray, (q, k, v)))
        np.testing.assert_allclose(ours, expected, rtol=1e-12, err_msg=name)


@given(shape=shapes, rate=st.sampled_from([0.0, 0.3]))
def test_materialised_backward_equals_vjp(shape, rate):
    args, do = qkv(*shape), normal(9, *shape)
    _, saved = attention_fwd("materialised", *args, rate, KEY)
    reference = vjp_of(lambda *x: attention_fwd("materialised", *x, rate, KEY)[0], *args, dy=do)
    assert_same_gradients(attention_bwd("materialised", saved, do, rate), reference, tuple(args))


@given(shape=shapes, rate=st.sampled_from([0.0, 0.3]), block_size=st.integers(1, 10))
def test_blockwise_backward_equals_vjp(shape, rate, block_size):
    """Blocks that divide T, that do not, and one block larger than T."""
    args, do = qkv(*shape), normal(9, *shape)
    _, saved = blockwise_fwd(*args, rate, KEY, block_size)
    reference = vjp_of(lambda *x: blockwise_fwd(*x, rate, KEY, block_size)[0], *args, dy=do)
    assert_same_gradients(blockwise_bwd(saved, do, rate), reference, tuple(args))


@given(shape=shapes, block_size=st.integers(1, 10))
def test_blockwise_equals_materialised(shape, block_size):
    args, do = qkv(*shape), normal(9, *shape)
    o, saved = blockwise_fwd(*args, block_size=block_size)
    o2, saved2 = materialised_fwd(*args)
    assert relative_l2(o, o2) <= 1e-12
    assert_same_gradients(blockwise_bwd(saved, do), attention_bwd("materialised", saved2, do), tuple(args))


@pytest.mark.parametrize("name", ["materialised", "blockwise"])
def test_no_query_sees_a_later_key(name):
    """The gradient of output t with respect to the keys and values after t is exactly zero, and not before."""
    q, k, v = qkv(1, 6, 1, 4)
    for t in range(6):
        dk, dv = jax.grad(lambda k, v, t=t: attention_fwd(name, q, k, v)[0][0, t].sum(), (0, 1))(k, v)
        assert (dk[0, t + 1 :] == 0).all()
        assert (dv[0, t + 1 :] == 0).all()
        assert (dv[0, : t + 1] != 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_any_size_neither_overflow_nor_vanish(sign):
    """Scores of about +-10,000, and in one key's column far above the rest: softmax is shift-invariant, row by row."""
    q = jnp.full((1, 7, 1, 4), 100.0)
    k = sign * jnp.full((1, 7, 1, 4), 50.0).at[0, 2].set(40.0 if sign == 1 else 60.0)
    v = normal(2, 1, 7, 1, 4)
    o, saved = blockwise_fwd(q, k, v, block_size=3)
    o2, saved2 = materialised_fwd(q, k, v)
    np.testing.assert_allclose(o, o2, rtol=1e-9)
    assert jnp.isfinite(o).all()
    for ours, theirs in zip(blockwise_bwd(saved, v), attention_bwd("materialised", saved2, v), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("T", "blocks"), [(1, 1), (7, 3), (8, 3), (9, 3), (10, 4)])
def test_blocks_are_as_few_as_hold_the_sequence(T, blocks):
    _, saved = blockwise_fwd(*qkv(1, T, 1, 2), block_size=3)
    assert saved.q.shape[0] == blocks


def test_every_pair_of_blocks_drops_by_a_mask_of_its_own():
    """Uniform probabilities and values that tell the keys apart show what was dropped: no two blocks of it are alike."""
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


def test_cudnn_glue_is_right_around_the_kernel(monkeypatch):
    """With XLA's implementation in the kernel's place, layout, scale and the handle on the backward are checked here."""
    monkeypatch.setattr(
        "jax.nn.dot_product_attention",
        lambda *args, implementation, **kwargs: ORIGINAL(*args, implementation="xla", **kwargs),
    )
    args = [x.astype(jnp.float32) for x in qkv(2, 5, 3, 8)]
    do = normal(9, 2, 5, 3, 8).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        o, saved = attention_fwd("cudnn", *args)
        ours = attention_bwd("cudnn", saved, do)
    o2, saved2 = materialised_fwd(*args)
    assert relative_l2(o, o2) < 1e-6
    assert_same_gradients(ours, attention_bwd("materialised", saved2, do), tuple(args), tolerance=1e-5)


ORIGINAL = jax.nn.dot_product_attention


def test_cudnn_forward_and_backward_lower_to_the_kernel(monkeypatch):
    """What is sent to a CUDA GPU holds cuDNN's own forward and backward calls: seen without owning one."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.bfloat16)

    def both(q, k, v, do):
        o, saved = attention_fwd("cudnn", q, k, v)
        return o, attention_bwd("cudnn", saved, do)

    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        text = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=allowed)(x, x, x, x).mlir_module()
    for name in calls:
        assert text.count(f"@{name}(") == 1 or text.count(f'"{name}"') == 1, name


def test_requests_that_cannot_be_served():
    args = qkv(1, 2, 1, 8)
    with pytest.raises(ValueError, match="materialised, blockwise, cudnn, splash, not flash"):
        attention_fwd("flash", *args)
    for function in (attention, attention_fwd):
        with pytest.raises(ValueError, match="no dropout"):
            function("cudnn", *args, 0.1, KEY)
        with pytest.raises(ValueError, match="splash attention has no dropout"):
            function("splash", *args, 0.1, KEY)


@pytest.mark.parametrize("name", ["materialised", "blockwise"])
@pytest.mark.parametrize(("rate", "key"), [(0.0, None), (0.0, KEY), (0.3, None), (0.3, KEY)])
def test_the_plain_forward_is_the_forward_with_nothing_saved(name, rate, key):
    args = qkv(2, 5, 3, 4)
    o, saved = attention(name, *args, rate, key)
    assert saved is None
    np.testing.assert_array_equal(o, attention_fwd(name, *args, rate, key)[0])
    if not rate:
        np.testing.assert_array_equal(o, attention(name, *args, key=key)[0])  # no dropout unless asked for
        np.testing.assert_array_equal(o, attention_fwd(name, *args, key=key)[0])


def test_the_plain_forward_of_cudnn_is_differentiated_by_jax(monkeypatch):
    monkeypatch.setattr(
        "jax.nn.dot_product_attention",
        lambda *args, implementation, **kwargs: ORIGINAL(*args, implementation="xla", **kwargs),
    )
    args = [x.astype(jnp.float32) for x in qkv(2, 6, 3, 8)]
    do = normal(9, 2, 6, 3, 8).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for rate, key in ((0.0, None), (0.0, KEY), (0.3, None)):
            o, saved = attention("cudnn", *args, rate, key)
            assert saved is None
            assert relative_l2(o, attention_fwd("materialised", *args)[0]) < 1e-6
            assert relative_l2(o, attention_fwd("cudnn", *args, rate, key)[0]) < 1e-6
            by_jax = jax.vjp(lambda *x, rate=rate, key=key: attention("cudnn", *x, rate, key)[0], *args)[1](do)
            ours = attention_bwd("materialised", attention_fwd("materialised", *args)[1], do)
            assert_same_gradients(ours, by_jax, tuple(args), tolerance=1e-5)


def test_dropout_rates_of_both_implementations_agree():
    """The masks differ, their statistics do not: the mean output over many heads equals that without dropout."""
    q, k, v = normal(0, 1, 8, 4000, 2), normal(1, 1, 8, 4000, 2), jnp.ones((1, 8, 4000, 2))
    for fwd in (materialised_fwd, functools.partial(blockwise_fwd, block_size=4)):
        o, _ = fwd(q, k, v, 0.4, KEY)
        assert abs(float(o.mean()) - 1) < 0.01
