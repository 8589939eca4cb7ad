"""GPT-2's table and pairs, through the network: the forward against NumPy's, and what its blocks
are made of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.models import gpt2, transformer
from gptjax.models.params import rows
from tests import reference
from tests.compare import assert_same_gradients
from tests.models import tiny

KEY = jax.random.key(5)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_forward_against_numpy(layers):
    cfg = tiny.config(layers=layers, num_layers=3)
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    ours = transformer.logits(params, batch.inputs, cfg)
    for row, scores in zip(batch.inputs, ours, strict=True):
        expected = reference.logits(params, np.asarray(row), cfg.vocab_size)
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-13)
    inputs, targets = (np.asarray(x) for x in batch[:2])
    expected = reference.loss(params, inputs, targets, cfg.vocab_size)
    assert transformer.loss(params, batch, cfg) == pytest.approx(float(expected), rel=1e-13)


@given(
    num_heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    hidden=st.integers(1, 9),
    T=st.integers(1, 12),
    vocab_size=st.sampled_from([1, 11, 128]),
)
def test_queries_keys_and_values_equal_numpys_joint_product(
    num_heads, head_dim, hidden, T, vocab_size
):
    sizes = {
        "num_heads": num_heads,
        "channels": num_heads * head_dim,
        "hidden": hidden,
        "vocab_size": vocab_size,
    }
    cfg = tiny.config(**sizes)
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=1, T=T)
    expected = reference.logits(params, np.asarray(batch.inputs[0]), vocab_size)
    ours = jax.jit(transformer.logits, static_argnums=2)(params, batch.inputs, cfg)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_no_position_learns_from_the_future():
    """The loss at position t has no gradient with respect to the position embeddings after t, and
    some at t.
    """
    cfg = tiny.config()
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=1, T=6)
    gradient = jax.jit(transformer.loss_and_grad, static_argnums=2)
    for t in range(6):
        only_t = batch._replace(mask=jnp.zeros((1, 6)).at[0, t].set(1.0))
        _, grads = gradient(params, only_t, cfg)
        size = jnp.abs(grads.wpe).sum(-1)
        assert (size[t + 1 :] == 0).all()
        assert (size[: t + 1] > 0).all()


def test_the_pairs_of_forward_and_backward_agree_with_autodiff():
    """Embedding, block and norm, each against JAX's gradient of its own forward, with every dropout
    on.
    """
    cfg = tiny.config(dropout=0.2, dropout_mlp=0.3)
    params, tokens = tiny.params(cfg), tiny.batch(cfg).inputs
    positions = transformer.positions_of(tokens)
    x = gpt2.embed_fwd(params, tokens, positions, cfg)
    dy = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape))
    head = jnp.ones_like(params.wte)

    tables = jax.vjp(
        lambda wte, wpe: gpt2.embed_fwd(params._replace(wte=wte, wpe=wpe), tokens, positions, cfg),
        *params[:2],
    )
    found = gpt2.embed_bwd(params, tokens, positions, head, dy)
    assert_same_gradients((found["wte"] - head, found["wpe"]), tables[1](dy), params[:2])
    by_row = jnp.broadcast_to(positions, tokens.shape)
    found = gpt2.embed_bwd(params, tokens, by_row, head, dy)
    assert_same_gradients((found["wte"] - head, found["wpe"]), tables[1](dy), params[:2])

    attend = functools.partial(transformer.attention_fwd, cfg.attention, rate=cfg.dropout, key=KEY)
    attend_bwd = functools.partial(transformer.attention_bwd, cfg.attention, rate=cfg.dropout)
    forward = lambda w, x: gpt2.block_fwd(w, x, positions, cfg, attend, KEY)  # noqa: E731
    w = params.blocks[0]
    dw, dx = jax.vjp(lambda w, x: forward(w, x)[0], w, x)[1](dy)
    found = gpt2.block_bwd(w, forward(w, x)[1], dy, positions, cfg, attend_bwd)
    assert_same_gradients(found, (dx, dw), (x, w))

    dlnfw, dlnfb, dx = jax.vjp(
        lambda *w: gpt2.norm_fwd(params._replace(lnfw=w[0], lnfb=w[1]), w[2], cfg)[0],
        *params[3:],
        x,
    )[1](dy)
    found = gpt2.norm_bwd(params, gpt2.norm_fwd(params, x, cfg)[1], dy)
    assert_same_gradients(
        found, (dx, {"lnfw": dlnfw, "lnfb": dlnfb}), (x, {"lnfw": dlnfw, "lnfb": dlnfb})
    )


def test_dropout_in_the_mlp_drops_its_activations_and_nothing_else():
    """With a projection that passes one hidden unit on, a position is moved by it in that share of
    the cases, and scaled.
    """
    cfg = tiny.config(dropout_mlp=0.25, max_seq_len=1000)
    params = tiny.params(cfg)
    w = params.blocks[0]._replace(fcprojw=jnp.zeros_like(params.blocks[0].fcprojw).at[0].set(1.0))
    x = jnp.ones((1, 1000, cfg.channels)) * jnp.arange(8.0)[None, None]
    attend = lambda q, k, v: (0 * q, None)  # noqa: E731

    def mlp(key):
        whole, without = (
            gpt2.block_fwd(w, x, None, cfg, attend, key)[0]
            for w in (w, w._replace(fcprojw=0 * w.fcprojw))
        )
        return whole - without

    kept = np.asarray(mlp(KEY) / mlp(None))[0]
    assert (abs(kept[:, :1] - kept) < 1e-12).all()
    np.testing.assert_allclose(kept[kept > 0.5], 1 / 0.75, rtol=1e-12)
    assert abs(kept.mean() - 1) < 5 * (0.25 / 0.75 / 1000) ** 0.5


def test_recompute_restores_what_discard_drops():
    cfg = tiny.config(dropout_mlp=0.3)
    params, tokens = tiny.params(cfg), tiny.batch(cfg).inputs
    positions = transformer.positions_of(tokens)
    x = gpt2.embed_fwd(params, tokens, positions, cfg)
    attend = functools.partial(transformer.attention_fwd, cfg.attention)
    _, saved = gpt2.block_fwd(params.blocks[0], x, positions, cfg, attend, KEY)
    assert gpt2.discard(saved).fcproj is None
    np.testing.assert_allclose(
        gpt2.recompute(gpt2.discard(saved), x, cfg).fcproj, saved.fcproj, rtol=1e-14
    )


def test_the_table_lists_each_tensor_once_with_its_shape():
    cfg = tiny.config()
    shapes = {name: shape for name, _, _, shape in rows(cfg)}
    assert len(shapes) == 20
    assert shapes["qw"] == shapes["kw"] == shapes["vw"] == (8, 2, 4)
    assert shapes["attprojw"] == (2, 4, 8)
    assert (shapes["wte"], shapes["wpe"]) == ((128, 8), (12, 8))
