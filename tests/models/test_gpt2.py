import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.models import gpt2
from gptjax.models.params import stack
from gptjax.ops import IGNORE_INDEX, blockwise, cross_entropy_fwd
from tests import reference
from tests.compare import assert_same_gradients, relative_l2
from tests.models import tiny

KEY = jax.random.key(5)


def both_gradients(cfg, batch, key=None, count=None, params=None):
    """(parameters, (loss, gradient) by hand, (loss, gradient) by JAX)."""
    params = tiny.params(cfg) if params is None else params
    by_hand = jax.jit(functools.partial(gpt2.loss_and_grad, cfg=cfg))(params, batch, key=key, count=count)
    by_jax = jax.jit(jax.value_and_grad(functools.partial(gpt2.loss, cfg=cfg)))(params, batch, key=key, count=count)
    return params, by_hand, by_jax


def assert_same(cfg, batch, key=None, count=None):
    params, (loss, grads), (loss2, grads2) = both_gradients(cfg, batch, key, count)
    assert loss == pytest.approx(float(loss2), rel=1e-13)
    assert_same_gradients(grads, grads2, params)


# The forward


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_forward_against_numpy(layers):
    cfg = tiny.config(layers=layers, num_layers=3)
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    ours = gpt2.logits(params, batch.inputs, cfg)
    for row, scores in zip(batch.inputs, ours, strict=True):
        expected = reference.logits(stack(params), np.asarray(row), cfg.num_heads, cfg.vocab_size)
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-13)
    inputs, targets = (np.asarray(x) for x in batch[:2])
    expected = reference.loss(stack(params), inputs, targets, cfg.num_heads, cfg.vocab_size)
    assert gpt2.loss(params, batch, cfg) == pytest.approx(float(expected), rel=1e-13)


def test_no_position_learns_from_the_future():
    """The loss at position t has no gradient with respect to the position embeddings after t, and some at t."""
    cfg = tiny.config()
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=1, T=6)
    for t in range(6):
        only_t = batch._replace(mask=jnp.zeros((1, 6)).at[0, t].set(1.0))
        _, grads = gpt2.loss_and_grad(params, only_t, cfg)
        size = jnp.abs(grads.wpe).sum(-1)
        assert (size[t + 1 :] == 0).all()
        assert (size[: t + 1] > 0).all()


# The backward, against JAX's own gradient of the plain forward


@pytest.mark.parametrize(
    ("attention", "layers", "recompute"),
    list(itertools.product(["materialised", "blockwise"], ["unroll", "scan"], ["none", "gelu", "block"])),
)
def test_backward_equals_autodiff_in_every_setting(monkeypatch, attention, layers, recompute):
    """With dropout on, a target ignored, a padded vocabulary, and classifier rows in uneven pieces."""
    monkeypatch.setattr(blockwise, "BLOCK", 3)  # several blocks within T = 7
    cfg = tiny.config(attention=attention, layers=layers, recompute=recompute, dropout=0.2, loss_chunks=3)
    batch = tiny.batch(cfg)
    assert_same(cfg, batch._replace(targets=batch.targets.at[0, 2].set(IGNORE_INDEX)), KEY)


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 12),
    num_heads=st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 11, 128]),
    dropout=st.sampled_from([0.0, 0.3]),
    loss_chunks=st.integers(1, 4),
)
def test_backward_equals_autodiff_at_any_shape(B, T, num_heads, num_layers, vocab_size, dropout, loss_chunks):
    cfg = tiny.config(
        num_heads=num_heads, num_layers=num_layers, vocab_size=vocab_size, dropout=dropout, loss_chunks=loss_chunks
    )
    assert_same(cfg, tiny.batch(cfg, B, T), KEY)


def test_backward_equals_autodiff_with_mask_and_given_count():
    cfg = tiny.config()
    batch = tiny.batch(cfg)
    mask = jnp.asarray(np.random.default_rng(2).random(batch.targets.shape))
    assert_same(cfg, batch._replace(mask=mask), count=jnp.asarray(20.0))


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
def test_nothing_counts(recompute):
    """All targets ignored: loss and gradient are zero, not NaN."""
    cfg = tiny.config(recompute=recompute)
    batch = tiny.batch(cfg)
    loss, grads = gpt2.loss_and_grad(tiny.params(cfg), batch._replace(targets=jnp.full_like(batch.targets, IGNORE_INDEX)), cfg)
    assert loss == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(("loss_chunks", "rows"), [(1, [14]), (2, [7, 7]), (3, [5, 5, 4]), (14, [1] * 14), (99, [1] * 14)])
def test_scores_are_made_in_chunks_of_equal_size(monkeypatch, loss_chunks, rows):
    cfg = tiny.config(loss_chunks=loss_chunks)
    seen = []

    def record(scores, *rest):
        seen.append(len(scores))
        return cross_entropy_fwd(scores, *rest)

    monkeypatch.setattr(gpt2, "cross_entropy_fwd", record)
    gpt2.loss_and_grad(tiny.params(cfg), tiny.batch(cfg), cfg)
    assert seen == rows


def test_pad_rows_of_the_vocabulary_get_no_gradient():
    cfg = tiny.config()
    _, (_, grads), _ = both_gradients(cfg, tiny.batch(cfg))
    assert (grads.wte[cfg.vocab_size :] == 0).all()
    assert (grads.wte[: cfg.vocab_size] != 0).any(axis=1).all()


def test_float32_gradient_is_close_and_float32():
    cfg = tiny.config(dtype="float32")
    params = tiny.params(cfg, jnp.float32)
    _, exact = gpt2.loss_and_grad(jax.tree.map(lambda x: x.astype(jnp.float64), params), tiny.batch(cfg), tiny.config())
    _, (_, grads), _ = both_gradients(cfg, tiny.batch(cfg), params=params)
    assert_same_gradients(grads, exact, params, tolerance=3e-6)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_bfloat16_gradient_is_float32_and_no_further_from_float64_than_autodiffs(layers):
    cfg = tiny.config(dtype="bfloat16", layers=layers, channels=32, num_layers=3)
    params, batch = tiny.params(cfg, jnp.float32), tiny.batch(cfg, B=4, T=12)
    exact_cfg = tiny.config(layers=layers, channels=32, num_layers=3)
    _, exact = gpt2.loss_and_grad(jax.tree.map(lambda x: x.astype(jnp.float64), params), batch, exact_cfg)
    _, (_, ours), (_, jaxs) = both_gradients(cfg, batch, params=params)
    assert_same_gradients(ours, exact, params, tolerance=0.1)
    errors = [[relative_l2(g, e) for g, e in zip(map_leaves(t), map_leaves(exact), strict=True)] for t in (ours, jaxs)]
    assert np.mean(errors[0]) <= np.mean(errors[1])


map_leaves = jax.tree.leaves


# The binding


def test_jax_grad_of_the_binding_runs_the_hand_written_backward(monkeypatch):
    cfg = tiny.config()
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    _, by_hand = gpt2.loss_and_grad(params, batch, cfg)
    loss, through_binding = jax.value_and_grad(lambda p: 3 * gpt2.loss_manual(p, batch, cfg))(params)
    assert loss == pytest.approx(float(3 * gpt2.loss(params, batch, cfg)))
    assert_same_gradients(through_binding, jax.tree.map(lambda g: 3 * g, by_hand), params, tolerance=1e-15)
    monkeypatch.setattr(gpt2, "gelu_bwd", lambda saved, dy: 1.1 * dy)
    wrong = jax.grad(lambda p: gpt2.loss_manual(p, batch, cfg))(params)
    assert relative_l2(wrong.fcb[0], by_hand.fcb[0]) > 0.01
    plain = jax.grad(lambda p: gpt2.loss(p, batch, cfg))(params)  # the oracle does not hear of it
    assert_same_gradients(plain, by_hand, params)


@pytest.mark.parametrize(
    "op", ["linear_bwd", "layernorm_bwd", "gelu_bwd", "attention_bwd", "cross_entropy_bwd", "embedding_bwd", "dropout_bwd"]
)
def test_an_error_planted_in_any_op_is_caught(monkeypatch, op):
    """One part in 10^8 too much in an op's input gradient, and the comparison with autodiff fails."""
    cfg = tiny.config(dropout=0.1)
    right = getattr(gpt2, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return jax.tree.map(lambda x: x * (1 + 1e-8), result)

    monkeypatch.setattr(gpt2, op, wrong)
    with pytest.raises(AssertionError):
        assert_same(cfg, tiny.batch(cfg), KEY)


# What a step costs


def temporaries(cfg, backward: str) -> int:
    batch = tiny.batch(cfg, B=4, T=64)
    f = gpt2.loss_and_grad if backward == "manual" else jax.value_and_grad(gpt2.loss)
    return jax.jit(functools.partial(f, cfg=cfg)).lower(tiny.params(cfg), batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_hand_written_backward_and_recomputation_save_memory(layers):
    sizes = {"num_layers": 6, "channels": 64, "max_seq_len": 64, "layers": layers}
    cfg = tiny.config(**sizes)
    assert temporaries(cfg, "manual") < temporaries(cfg, "autodiff")
    none, gelu, block = (temporaries(tiny.config(**sizes, recompute=r), "manual") for r in ("none", "gelu", "block"))
    assert block < none / 2
    assert gelu < none
