import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import attention, attention_bwd, attention_fwd
from gptjax.ops.attention import causal, materialised_fwd
from gptjax.ops.blockwise import blockwise_fwd
from tests.compare import assert_same_gradients, normal, relative_l2, vjp_of

KEY = jax.random.key(3)
# B, T, H, D
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))


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


def test_a_query_sees_earlier_keys_of_its_own_document():
    segments = [[0, 0, 1, 1, 1], [4, 2, 2, 0, 3]]
    visible = causal(5, jnp.array(segments))
    assert visible.dtype == bool
    for row, ids in enumerate(segments):
        for t, s in np.ndindex(5, 5):
            assert visible[row, t, s] == (s <= t and ids[s] == ids[t])
    np.testing.assert_array_equal(causal(5), np.tri(5, dtype=bool))


def test_each_row_has_a_mask_of_its_own():
    q, k, v = (normal(seed, 3, 4, 2, 5) for seed in range(3))
    random = np.random.default_rng(0).random((3, 4, 4)) < 0.5
    visible = jnp.array(random | np.eye(4, dtype=bool))
    together, _ = materialised_fwd(q, k, v, visible=visible)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = materialised_fwd(q[one], k[one], v[one], visible=visible[row])
        np.testing.assert_allclose(together[one], alone, rtol=1e-12)


@given(shape=shapes, rate=st.sampled_from([0.0, 0.3]))
def test_materialised_backward_equals_vjp(shape, rate):
    args, do = qkv(*shape), normal(9, *shape)
    _, saved = attention_fwd("materialised", *args, rate, KEY)
    reference = vjp_of(lambda *x: attention_fwd("materialised", *x, rate, KEY)[0], *args, dy=do)
    assert_same_gradients(attention_bwd("materialised", saved, do, rate), reference, tuple(args))


@pytest.mark.parametrize("name", ["materialised", "blockwise"])
def test_no_query_sees_a_later_key(name):
    """The gradient of output t with respect to the keys and values after t is exactly zero, and not
    before.
    """
    q, k, v = qkv(1, 6, 1, 4)
    for t in range(6):
        dk, dv = jax.grad(lambda k, v, t=t: attention_fwd(name, q, k, v)[0][0, t].sum(), (0, 1))(
            k, v
        )
        assert (dk[0, t + 1 :] == 0).all()
        assert (dv[0, t + 1 :] == 0).all()
        assert (dv[0, : t + 1] != 0).all()


@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_the_wrapper_around_cudnns_kernel_is_right(monkeypatch, num_kv_heads):
    """XLA's implementation stands in for the kernel, to check layout, scale and the saved backward."""
    monkeypatch.setattr(
        "jax.nn.dot_product_attention",
        lambda *args, implementation, **kwargs: ORIGINAL(*args, implementation="xla", **kwargs),
    )
    q, *kv = (x.astype(jnp.float32) for x in qkv(2, 5, 3, 8))
    args = [q, *(x[:, :, :num_kv_heads] for x in kv)]
    do = normal(9, 2, 5, 3, 8).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        o, saved = attention_fwd("cudnn", *args)
        ours = attention_bwd("cudnn", saved, do)
    o2, saved2 = materialised_fwd(*args)
    assert relative_l2(o, o2) < 1e-6
    assert_same_gradients(
        ours, attention_bwd("materialised", saved2, do), tuple(args), tolerance=1e-5
    )


ORIGINAL = jax.nn.dot_product_attention


@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_cudnn_forward_and_backward_lower_to_the_kernel(monkeypatch, num_kv_heads):
    """What is sent to a CUDA GPU holds cuDNN's own forward and backward calls: seen without owning
    one.
    """
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    x, kv = (jax.ShapeDtypeStruct((2, 128, n, 64), jnp.bfloat16) for n in (3, num_kv_heads))

    def both(q, k, v, do):
        o, saved = attention_fwd("cudnn", q, k, v)
        return o, attention_bwd("cudnn", saved, do)

    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        text = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=allowed)(
            x, kv, kv, x
        ).mlir_module()
    for name in calls:
        assert text.count(f"@{name}(") == 1 or text.count(f'"{name}"') == 1, name


def test_unsupported_requests_are_rejected():
    args = qkv(1, 2, 1, 8)
    with pytest.raises(ValueError, match="materialised, blockwise, cudnn, splash, not flash"):
        attention_fwd("flash", *args)
    for function in (attention, attention_fwd):
        with pytest.raises(ValueError, match="does not support dropout"):
            function("cudnn", *args, 0.1, KEY)
        with pytest.raises(ValueError, match="splash attention does not support dropout"):
            function("splash", *args, 0.1, KEY)
        with pytest.raises(ValueError, match="cudnn attention does not support segments"):
            function("cudnn", *args, segments=jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("name", ["materialised", "blockwise"])
@pytest.mark.parametrize(("rate", "key"), [(0.0, None), (0.0, KEY), (0.3, None), (0.3, KEY)])
def test_attention_equals_attention_fwd_and_saves_nothing(name, rate, key):
    args = qkv(2, 5, 3, 4)
    o, saved = attention(name, *args, rate, key)
    assert saved is None
    np.testing.assert_array_equal(o, attention_fwd(name, *args, rate, key)[0])
    if not rate:
        # No dropout unless asked for
        np.testing.assert_array_equal(o, attention(name, *args, key=key)[0])
        np.testing.assert_array_equal(o, attention_fwd(name, *args, key=key)[0])


def test_attention_by_cudnn_is_differentiated_by_jax(monkeypatch):
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
            by_jax = jax.vjp(
                lambda *x, rate=rate, key=key: attention("cudnn", *x, rate, key)[0], *args
            )[1](do)
            ours = attention_bwd("materialised", attention_fwd("materialised", *args)[1], do)
            assert_same_gradients(ours, by_jax, tuple(args), tolerance=1e-5)


def test_dropout_rates_of_both_implementations_agree():
    """The masks differ, their statistics do not: the mean output over many heads equals that
    without dropout.
    """
    q, k, v = normal(0, 1, 8, 4000, 2), normal(1, 1, 8, 4000, 2), jnp.ones((1, 8, 4000, 2))
    for fwd in (materialised_fwd, functools.partial(blockwise_fwd, block_size=4)):
        o, _ = fwd(q, k, v, 0.4, KEY)
        assert abs(float(o.mean()) - 1) < 0.01
