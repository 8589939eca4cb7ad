"""Llama's table and pairs, through the network: the forward against NumPy's, and what its blocks are
made of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError
from gptjax.models import llama, transformer
from gptjax.models.batch import Batch
from gptjax.models.params import rows, unstack
from tests import reference
from tests.compare import assert_same_gradients
from tests.models import tiny

KEY = jax.random.key(5)
gradient = jax.jit(transformer.loss_and_grad, static_argnames="cfg")
autodiff = jax.jit(jax.value_and_grad(transformer.loss), static_argnames="cfg")


def config(**changes):
    return tiny.config(**{"family": "llama", "num_heads": 4, "channels": 16} | changes)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_forward_against_numpy(layers, tied, num_kv_heads):
    cfg = config(
        layers=layers, tied=tied, num_kv_heads=num_kv_heads, rope_theta=100.0, norm_eps=1e-3
    )
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    ours = jax.jit(transformer.logits, static_argnums=2)(params, batch.inputs, cfg)
    for row, scores in zip(batch.inputs, ours, strict=True):
        expected = reference.llama_logits(params, np.asarray(row), cfg)
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-13)


@given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 3),
    hidden=st.integers(1, 9),
    T=st.integers(1, 12),
    tied=st.booleans(),
    attention=st.sampled_from(["materialised", "blockwise"]),
    segments=st.booleans(),
)
def test_the_gradient_equals_jaxs_for_any_shape(
    num_kv_heads, group, half, hidden, T, tied, attention, segments
):
    H = num_kv_heads * group
    cfg = config(
        num_heads=H,
        num_kv_heads=num_kv_heads,
        channels=2 * half * H,
        hidden=hidden,
        tied=tied,
        attention=attention,
    )
    params, batch = tiny.params(cfg), tiny.batch(cfg, T=T)
    if segments:
        batch = batch._replace(segments=packed(T))
    value, grads = gradient(params, batch, cfg=cfg)
    expected, theirs = autodiff(params, batch, cfg=cfg)
    assert value == pytest.approx(float(expected), rel=1e-13)
    assert_same_gradients(grads, theirs, params)


def packed(T):
    """Two sequences of documents of random lengths."""
    breaks = np.random.default_rng(T).integers(0, 2, (2, T))
    return jnp.asarray(np.cumsum(breaks, 1), jnp.int32)


@pytest.mark.parametrize("attention", ["materialised", "blockwise"])
def test_packed_documents_are_computed_independently(attention):
    """Their losses, and the gradient: the mean over both is that of a batch of the two."""
    cfg = config(num_kv_heads=2, attention=attention)
    params, ids = tiny.params(cfg), np.asarray(tiny.batch(cfg, B=1, T=9).inputs)[0]
    lengths, cuts = (4, 5), ((0, 4), (4, 9))
    targets = np.roll(ids, -1)
    packing = Batch(
        jnp.asarray(ids[None]),
        jnp.asarray(targets[None]),
        segments=jnp.asarray([[0] * 4 + [7] * 5], jnp.int32),
    )
    _, joint = gradient(params, packing, cfg=cfg)
    losses = transformer.token_losses(params, packing, cfg)
    total = jax.tree.map(jnp.zeros_like, params)
    for length, (a, b) in zip(lengths, cuts, strict=True):
        alone = Batch(jnp.asarray(ids[None, a:b]), jnp.asarray(targets[None, a:b]))
        np.testing.assert_allclose(
            losses[:, a:b], transformer.token_losses(params, alone, cfg), rtol=1e-12
        )
        _, part = gradient(params, alone, cfg=cfg)
        total = jax.tree.map(lambda t, g, n=length: t + g * n / 9, total, part)
    assert_same_gradients(joint, total, params)


def test_the_pairs_of_forward_and_backward_agree_with_autodiff():
    """Embedding, block and norm, each against JAX's gradient of its own forward, with every dropout
    on.
    """
    cfg = config(dropout=0.2, dropout_mlp=0.3, num_kv_heads=2, tied=False)
    params, tokens = tiny.params(cfg), tiny.batch(cfg).inputs
    positions = transformer.positions_of(tokens)
    x = llama.embed_fwd(params, tokens, positions, cfg)
    dy = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape))
    head = jnp.ones_like(params.tok_emb)

    (table,) = jax.vjp(
        lambda table: llama.embed_fwd(params._replace(tok_emb=table), tokens, positions, cfg),
        params.tok_emb,
    )[1](dy)
    untied = llama.embed_bwd(params, tokens, positions, head, dy)
    assert_same_gradients(untied, {"tok_emb": table, "wcls": head}, {"tok_emb": head, "wcls": head})
    tied = llama.embed_bwd(params._replace(wcls=None), tokens, positions, head, dy)
    assert_same_gradients(tied, {"tok_emb": table + head}, {"tok_emb": head})

    attend = functools.partial(transformer.attention_fwd, cfg.attention, rate=cfg.dropout, key=KEY)
    attend_bwd = functools.partial(transformer.attention_bwd, cfg.attention, rate=cfg.dropout)
    forward = lambda w, x: llama.block_fwd(w, x, positions, cfg, attend, KEY)  # noqa: E731
    w = params.blocks[0]
    dw, dx = jax.vjp(lambda w, x: forward(w, x)[0], w, x)[1](dy)
    found = llama.block_bwd(w, forward(w, x)[1], dy, positions, cfg, attend_bwd)
    assert_same_gradients(found, (dx, dw), (x, w))

    norm = lambda w, x: llama.norm_fwd(params._replace(final_norm=w), x, cfg)[0]  # noqa: E731
    dnorm, dx = jax.vjp(norm, params.final_norm, x)[1](dy)
    found = llama.norm_bwd(params, llama.norm_fwd(params, x, cfg)[1], dy)
    assert_same_gradients(found, (dx, {"final_norm": dnorm}), (x, {"final_norm": dnorm}))


@pytest.mark.parametrize("recompute", ["gelu", "block"])
@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_recomputation_and_layout_do_not_change_the_gradient(recompute, layers):
    cfg = config(dropout=0.1, dropout_mlp=0.3, num_kv_heads=2)
    params, batch = tiny.params(cfg), tiny.batch(cfg)
    expected = gradient(params, batch, cfg=cfg, key=KEY)
    changed = config(
        dropout=0.1, dropout_mlp=0.3, num_kv_heads=2, recompute=recompute, layers=layers
    )
    params = tiny.params(changed)
    value, grads = gradient(params, batch, cfg=changed, key=KEY)
    assert value == pytest.approx(float(expected[0]), rel=1e-13)
    assert_same_gradients(unstack(grads), expected[1], unstack(params))


def test_only_differences_of_positions_matter():
    """Shifting all positions changes nothing, which no table of positions would give."""
    cfg = config()
    params, tokens = tiny.params(cfg), tiny.batch(cfg).inputs
    attend = functools.partial(transformer.attention_fwd, cfg.attention)
    x = llama.embed_fwd(params, tokens, None, cfg)
    y, shifted = (
        llama.block_fwd(params.blocks[0], x, transformer.positions_of(tokens) + shift, cfg, attend)[
            0
        ]
        for shift in (0, 5)
    )
    np.testing.assert_allclose(y, shifted, rtol=1e-11, atol=1e-13)


def test_the_table_has_the_names_of_llama2c_and_a_classifier_of_its_own_if_untied():
    names = [name for name, *_ in rows(config())]
    assert names == [
        "tok_emb",
        "att_norm",
        "wq",
        "wk",
        "wv",
        "wo",
        "ffn_norm",
        "w1",
        "w3",
        "w2",
        "final_norm",
    ]
    assert [name for name, *_ in rows(config(tied=False))] == [*names, "wcls"]


def test_heads_of_an_odd_number_of_channels_are_refused():
    with pytest.raises(ConfigError, match="heads of 3 channels, but a rotary embedding needs"):
        rows(config(channels=12))
