"""The network over a family: its hand-written backward against JAX's gradient of the plain forward,
in every setting.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.models import gpt2, transformer
from gptjax.models.batch import Batch
from gptjax.models.params import param_shapes
from gptjax.ops import IGNORE_INDEX, blockwise, cross_entropy_fwd
from tests.compare import assert_same_gradients, relative_l2
from tests.models import tiny

KEY = jax.random.key(5)


def both_gradients(cfg, batch, key=None, count=None, params=None):
    """(parameters, (loss, gradient) by hand, (loss, gradient) by JAX)."""
    params = tiny.params(cfg) if params is None else params
    by_hand = jax.jit(functools.partial(transformer.loss_and_grad, cfg=cfg))
    by_jax = jax.jit(jax.value_and_grad(functools.partial(transformer.loss, cfg=cfg)))
    return (
        params,
        by_hand(params, batch, key=key, count=count),
        by_jax(params, batch, key=key, count=count),
    )


def assert_same(cfg, batch, key=None, count=None):
    params, (loss, grads), (loss2, grads2) = both_gradients(cfg, batch, key, count)
    assert loss == pytest.approx(float(loss2), rel=1e-13)
    assert_same_gradients(grads, grads2, params)


@pytest.mark.parametrize(
    ("attention", "layers", "recompute"),
    list(
        itertools.product(
            ("materialised", "blockwise"), ("unroll", "scan"), ("none", "gelu", "block")
        )
    ),
)
def test_backward_equals_autodiff_in_every_setting(monkeypatch, attention, layers, recompute):
    """With every dropout on, a target ignored, a padded vocabulary, and classifier rows in uneven
    chunks.
    """
    monkeypatch.setattr(blockwise, "BLOCK", 3)  # several blocks within T = 7
    dropout = {"dropout": 0.2, "dropout_mlp": 0.3}
    cfg = tiny.config(
        attention=attention, layers=layers, recompute=recompute, loss_chunks=3, **dropout
    )
    batch = tiny.batch(cfg)
    assert_same(cfg, batch._replace(targets=batch.targets.at[0, 2].set(IGNORE_INDEX)), KEY)


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 12),
    num_heads=st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 11, 128]),
    dropout=st.sampled_from([0.0, 0.3]),
    dropout_mlp=st.sampled_from([0.0, 0.4]),
    loss_chunks=st.integers(1, 4),
)
def test_backward_equals_autodiff_at_any_shape(B, T, loss_chunks, **changes):
    cfg = tiny.config(loss_chunks=loss_chunks, **changes)
    assert_same(cfg, tiny.batch(cfg, B, T), KEY)


def test_backward_equals_autodiff_with_mask_and_given_count():
    cfg = tiny.config()
    batch = tiny.batch(cfg)
    mask = jnp.asarray(np.random.default_rng(2).random(batch.targets.shape))
    assert_same(cfg, batch._replace(mask=mask), count=jnp.asarray(20.0))


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
def test_if_no_target_counts_loss_and_gradient_are_zero(recompute):
    """All targets ignored: loss and gradient are zero, not NaN."""
    cfg = tiny.config(recompute=recompute)
    batch = tiny.batch(cfg)
    batch = batch._replace(targets=jnp.full_like(batch.targets, IGNORE_INDEX))
    loss, grads = jax.jit(transformer.loss_and_grad, static_argnums=2)(tiny.params(cfg), batch, cfg)
    assert loss == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("rates", "drops"), [((0.0, 0.0), False), ((0.2, 0.0), True), ((0.0, 0.2), True)]
)
def test_a_key_turns_dropout_on_if_a_rate_is_positive(rates, drops):
    cfg = tiny.config(dropout=rates[0], dropout_mlp=rates[1])
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    with_key, without = (transformer.loss(params, batch, cfg, key) for key in (KEY, None))
    assert (with_key != without) == drops


@pytest.mark.parametrize(
    ("loss_chunks", "rows"),
    [(1, [14]), (2, [7, 7]), (3, [5, 5, 4]), (14, [1] * 14), (99, [1] * 14)],
)
def test_scores_are_made_in_chunks_of_equal_size(monkeypatch, loss_chunks, rows):
    cfg = tiny.config(loss_chunks=loss_chunks)
    seen = []

    def record(scores, *rest):
        seen.append(len(scores))
        return cross_entropy_fwd(scores, *rest)

    monkeypatch.setattr(transformer, "cross_entropy_fwd", record)
    jax.eval_shape(
        functools.partial(transformer.loss_and_grad, cfg=cfg), tiny.params(cfg), tiny.batch(cfg)
    )
    assert seen == rows


def test_pad_rows_of_the_vocabulary_get_no_gradient():
    cfg = tiny.config()
    _, (_, grads), _ = both_gradients(cfg, tiny.batch(cfg))
    assert (grads.wte[cfg.vocab_size :] == 0).all()
    assert (grads.wte[: cfg.vocab_size] != 0).any(axis=1).all()


def in_float64(params):
    return jax.tree.map(lambda x: x.astype(jnp.float64), params)


def test_float32_gradient_is_close_and_float32():
    cfg = tiny.config(dtype="float32")
    params = tiny.params(cfg, jnp.float32)
    _, exact = transformer.loss_and_grad(in_float64(params), tiny.batch(cfg), tiny.config())
    _, (_, grads), _ = both_gradients(cfg, tiny.batch(cfg), params=params)
    assert_same_gradients(grads, exact, params, tolerance=3e-6)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_bfloat16_gradient_is_as_accurate_as_autodiffs(layers):
    sizes = {"layers": layers, "channels": 32, "num_layers": 3}
    cfg = tiny.config(dtype="bfloat16", **sizes)
    params, batch = tiny.params(cfg, jnp.float32), tiny.batch(cfg, B=4, T=12)
    _, exact = transformer.loss_and_grad(in_float64(params), batch, tiny.config(**sizes))
    _, (_, ours), (_, jaxs) = both_gradients(cfg, batch, params=params)
    assert_same_gradients(ours, exact, params, tolerance=0.1)
    leaves = jax.tree.leaves
    errors = [
        [relative_l2(g, e) for g, e in zip(leaves(t), leaves(exact), strict=True)]
        for t in (ours, jaxs)
    ]
    assert np.mean(errors[0]) <= np.mean(errors[1])


# The binding


def test_jax_grad_of_the_binding_runs_the_hand_written_backward(monkeypatch):
    cfg = tiny.config()
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    _, by_hand = transformer.loss_and_grad(params, batch, cfg)
    loss, through_binding = jax.value_and_grad(
        lambda p: 3 * transformer.loss_manual(p, batch, cfg)
    )(params)
    assert loss == pytest.approx(float(3 * transformer.loss(params, batch, cfg)))
    assert_same_gradients(
        through_binding, jax.tree.map(lambda g: 3 * g, by_hand), params, tolerance=1e-15
    )
    monkeypatch.setattr(gpt2, "gelu_bwd", lambda saved, dy: 1.1 * dy)
    wrong = jax.grad(lambda p: transformer.loss_manual(p, batch, cfg))(params)
    assert relative_l2(wrong.blocks[0].fcb, by_hand.blocks[0].fcb) > 0.01
    # The oracle does not hear of it
    plain = jax.grad(lambda p: transformer.loss(p, batch, cfg))(params)
    assert_same_gradients(plain, by_hand, params)


# The loss of each token


LOSSES = jax.jit(transformer.token_losses, static_argnums=2)


def test_token_losses_are_the_cross_entropy_of_the_logits():
    """Without dropout, and their mean is the training loss."""
    cfg = tiny.config(dropout=0.5, dropout_mlp=0.5)
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=3)
    batch = batch._replace(targets=batch.targets.at[1, 2].set(IGNORE_INDEX))
    scores = np.asarray(jax.jit(transformer.logits, static_argnums=2)(params, batch.inputs, cfg))
    expected = (
        np.log(np.exp(scores).sum(-1))
        - np.take_along_axis(scores, np.asarray(batch.targets)[..., None], 2)[..., 0]
    )
    expected[1, 2] = 0
    losses = LOSSES(params, batch, cfg)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    trained = jax.jit(transformer.loss, static_argnums=2)(params, batch, cfg)
    assert losses.sum() / (batch.targets.size - 1) == pytest.approx(trained.item(), rel=1e-13)


def test_a_bfloat16_model_gives_float32_losses():
    cfg = tiny.config(dtype="bfloat16")
    params = tiny.params(tiny.CONFIG)
    losses = LOSSES(jax.tree.map(lambda x: x.astype(jnp.float32), params), tiny.batch(cfg), cfg)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, LOSSES(params, tiny.batch(cfg), tiny.CONFIG), atol=0.1)


def test_one_sequence_of_scores_is_held_at_a_time():
    """8 sequences would take 8 x 12 x 50304 x 4 bytes = 19 MB at once."""
    cfg = tiny.config(num_layers=1, vocab_size=50257, dtype="float32", layers="scan")
    shapes = param_shapes(cfg)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    ids = jax.ShapeDtypeStruct((8, 12), jnp.int32)
    compiled = LOSSES.lower(params, Batch(ids, ids), cfg).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 12 * 50304 * 4


# What a step costs


def temporaries(cfg, backward: str) -> int:
    batch = tiny.batch(cfg, B=4, T=64)
    f = transformer.loss_and_grad if backward == "manual" else jax.value_and_grad(transformer.loss)
    return (
        jax.jit(functools.partial(f, cfg=cfg))
        .lower(tiny.params(cfg), batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_hand_written_backward_and_recomputation_save_memory(layers):
    sizes = {"num_layers": 6, "channels": 64, "max_seq_len": 64, "layers": layers}
    cfg = tiny.config(**sizes)
    assert temporaries(cfg, "manual") < temporaries(cfg, "autodiff")
    none, gelu, block = (
        temporaries(tiny.config(**sizes, recompute=r), "manual") for r in ("none", "gelu", "block")
    )
    assert block < none / 2
    assert gelu < none


def test_a_config_resolves_itself_and_is_static_under_jit():
    cfg = tiny.config(dtype="auto", attention="auto")
    ready = cfg.resolve("cpu", 7)
    params, batch = tiny.params(ready, jnp.float32), tiny.batch(ready)
    expected = transformer.loss(params, batch, ready)
    assert jax.jit(transformer.loss)(params, batch, cfg) == pytest.approx(expected)
    value, grads = jax.jit(transformer.loss_and_grad)(params, batch, cfg)
    assert value == pytest.approx(expected)
    assert grads.wte.shape == params.wte.shape
    for of_text in (
        transformer.logits(params, batch.inputs, cfg),
        transformer.token_losses(params, batch, cfg),
    ):
        assert of_text.dtype == jnp.float32
