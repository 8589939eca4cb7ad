"""GPT-2 (Radford et al. 2019): the forward, and its backward derived by hand.

`loss` is the plain forward: differentiating it with JAX is the reference. `loss_and_grad` is the backward written out.
`loss_manual` binds the two, so that ``jax.grad(loss_manual)`` runs the hand-written backward; nothing else does.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from gptjax.models.batch import Batch, Ids, checked_batch, checked_ids
from gptjax.models.config import GPT2Config
from gptjax.models.params import Block, Params, join_layers, split_layers
from gptjax.models.pieces import join_pieces, row_pieces, sum_of_shares, total
from gptjax.ops import (
    attention,
    attention_bwd,
    attention_fwd,
    by_heads,
    contract,
    cross_entropy_bwd,
    cross_entropy_fwd,
    dropout_bwd,
    dropout_fwd,
    embedding_bwd,
    embedding_fwd,
    from_heads,
    gelu_bwd,
    gelu_fwd,
    in_turn,
    join_heads,
    layernorm_bwd,
    layernorm_fwd,
    linear_bwd,
    linear_fwd,
    not_before,
    split_heads,
)
from gptjax.sharding import as_used

QKV, ATTPROJ, FC, FCPROJ = ("C", "HD"), ("HD", "C"), ("C", "F"), ("F", "C")  # the linear layers' logical axes


# --- One block ---


class BlockSaved(NamedTuple):
    """What `block_bwd` needs, in the order of the forward."""

    ln1: Any
    qkv: Any
    att: Any
    attproj: Any
    drop1: Any
    ln2: Any
    fc: Any
    gelu: Any
    fcproj: Any
    drop2: Any


def block_fwd(
    w: Block, x: Float[Array, "B T C"], cfg: GPT2Config, attend: Any, key: Any = None, linear: Any = linear_fwd
) -> tuple[Float[Array, "B T C"], BlockSaved]:
    """One pre-norm transformer block: ``x += attention(layernorm(x))``, then ``x += mlp(layernorm(x))``.

    The only block body there is. ``attend(q, k, v) -> (o, saved)`` says what the queries look at: the sequence itself
    in training and evaluation, a cache in decoding, where ``saved`` is the updated cache. Decoding brings a ``linear``, too.
    """
    B, T, C = x.shape
    key1, key2 = (None, None) if key is None else jax.random.split(key)
    h1, ln1 = layernorm_fwd(x, w.ln1w, w.ln1b)
    qkv, qkv_saved = linear(h1, by_heads(w.qkvw), by_heads(w.qkvb), axes=QKV)
    o, att = attend(*split_heads(qkv, cfg.num_heads))
    a, attproj = linear(o.reshape(B, T, C), w.attprojw, w.attprojb, axes=ATTPROJ)
    a, drop1 = dropout_fwd(a, cfg.dropout, key1)
    x = x + a
    h2, ln2 = layernorm_fwd(x, w.ln2w, w.ln2b)
    f, fc = linear(h2, w.fcw, w.fcb, axes=FC)
    g, gelu = gelu_fwd(f)
    g = checkpoint_name(g, "gelu")
    m, fcproj = linear(g, w.fcprojw, w.fcprojb, axes=FCPROJ)
    m, drop2 = dropout_fwd(m, cfg.dropout, key2)
    x = x + m
    return x, BlockSaved(ln1, qkv_saved, att, attproj, drop1, ln2, fc, gelu, fcproj, drop2)


def block_bwd(
    w: Block, saved: BlockSaved, dx: Float[Array, "B T C"], cfg: GPT2Config, attend_bwd: Any
) -> tuple[Float[Array, "B T C"], Block]:
    """(dx, dw) of `block_fwd`: its lines from the last to the first. A residual branch adds its gradient to the stream's."""
    B, T, _ = dx.shape
    dm = dropout_bwd(saved.drop2, cfg.dropout, dx)
    dg, dfcprojw, dfcprojb = linear_bwd(saved.fcproj, w.fcprojw, dm, axes=FCPROJ)
    df = gelu_bwd(saved.gelu, dg)
    dh2, dfcw, dfcb = linear_bwd(saved.fc, w.fcw, df, axes=FC)
    dx2, dln2w, dln2b = layernorm_bwd(saved.ln2, w.ln2w, dh2)
    dx = dx + dx2
    da = dropout_bwd(saved.drop1, cfg.dropout, dx)
    do, dattprojw, dattprojb = linear_bwd(saved.attproj, w.attprojw, da, axes=ATTPROJ)
    dq, dk, dv = attend_bwd(saved.att, do.reshape(B, T, cfg.num_heads, -1))
    dh1, dqkvw, dqkvb = linear_bwd(saved.qkv, by_heads(w.qkvw), join_heads(dq, dk, dv), axes=QKV)
    dqkvw, dqkvb = from_heads(dqkvw), from_heads(dqkvb)
    dx1, dln1w, dln1b = layernorm_bwd(saved.ln1, w.ln1w, dh1)
    dx = dx + dx1
    grads = (dln1w, dln1b, dqkvw, dqkvb, dattprojw, dattprojb, dln2w, dln2b, dfcw, dfcb, dfcprojw, dfcprojb)
    return dx, Block(*grads)


def training_block(
    attend: Any, w: Block, x: Float[Array, "B T C"], cfg: GPT2Config, key: Key[Array, ""] | None
) -> tuple[Float[Array, "B T C"], BlockSaved]:
    """`block_fwd` attending to its own sequence by ``attend``, `attention_fwd` or `attention`; ``key`` turns dropout on."""
    att_key, key = (None, None) if key is None else jax.random.split(key)
    return block_fwd(w, x, cfg, partial(attend, cfg.attention, rate=cfg.dropout, key=att_key), key)


# --- The stack of blocks, with what each recompute setting keeps ---


def blocks_fwd(
    blocks: Any, x: Float[Array, "B T C"], cfg: GPT2Config, keys: Key[Array, " L"] | None
) -> tuple[Float[Array, "B T C"], Any]:
    """All layers in turn. Saved: per layer, what ``cfg.recompute`` says to keep."""

    def body(x: Array, w_key: tuple[Block, Any]) -> tuple[Array, Any]:
        w, key = w_key
        y, saved = training_block(attention_fwd, w, x, cfg, key)
        if cfg.recompute == "block":
            return y, x
        return y, saved._replace(fcproj=None) if cfg.recompute == "gelu" else saved

    return over_layers(body, x, (blocks, keys), cfg)


def blocks_bwd(
    blocks: Any, saved: Any, dx: Float[Array, "B T C"], cfg: GPT2Config, keys: Key[Array, " L"] | None
) -> tuple[Float[Array, "B T C"], Any]:
    """(dx, dblocks) of `blocks_fwd`, from the last layer to the first."""

    def body(dx: Array, w_key_saved: tuple[Block, Any, Any]) -> tuple[Array, Block]:
        w, key, saved = w_key_saved
        dx = as_used(dx, "B", None, None)
        if cfg.recompute == "block":
            _, saved = training_block(attention_fwd, w, not_before(dx, saved), cfg, key)
        elif cfg.recompute == "gelu":
            saved = saved._replace(fcproj=gelu_fwd(not_before(dx, saved.gelu))[0])
        return block_bwd(w, saved, dx, cfg, partial(attention_bwd, cfg.attention, rate=cfg.dropout))

    return over_layers(body, dx, (blocks, keys, saved), cfg, reverse=True)


def over_layers(body: Any, carry: Any, xs: Any, cfg: GPT2Config, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan` of ``body`` over the layers, or the same unrolled.

    ``xs`` is a tuple whose entries hold one value a layer, stacked when scanned, in a sequence when unrolled, or None.
    """
    if cfg.layers == "scan":
        return lax.scan(body, carry, xs, reverse=reverse)
    ys: list[Any] = [None] * cfg.num_layers
    for i in reversed(range(cfg.num_layers)) if reverse else range(cfg.num_layers):
        carry, ys[i] = body(carry, tuple(None if x is None else x[i] for x in xs))
    return carry, ys


# --- The network ---


def _split_key(key: Key[Array, ""] | None, cfg: GPT2Config) -> tuple[Any, Any]:
    """Keys of the embedding's dropout and of each layer."""
    if key is None or cfg.dropout == 0:
        return None, None
    key, block_key = jax.random.split(key)
    return key, jax.random.split(block_key, cfg.num_layers)


def hidden(params: Params, inputs: Ids, cfg: GPT2Config, key: Key[Array, ""] | None = None) -> Array:
    """(B, T) ids -> (B, T, C), the final LayerNorm's output: the plain forward up to the classifier."""
    inputs = checked_ids("inputs", inputs, cfg)
    key, keys = _split_key(key, cfg)
    x = embedding_fwd(inputs, jnp.arange(inputs.shape[1], dtype=jnp.int32), params.wte, params.wpe, cfg.compute_dtype)
    x, _ = dropout_fwd(x, cfg.dropout, key)

    def body(x: Array, w_key: tuple[Block, Any]) -> tuple[Array, None]:
        return training_block(attention, w_key[0], x, cfg, w_key[1])[0], None

    if cfg.recompute == "block":
        body = jax.checkpoint(body)
    elif cfg.recompute == "gelu":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_anything_except_these_names("gelu"))
    x, _ = over_layers(body, x, (split_layers(params), keys), cfg)
    return layernorm_fwd(x, params.lnfw, params.lnfb)[0]


def logits(params: Params, inputs: Ids, cfg: GPT2Config) -> Float[Array, "B T V"]:
    """(B, T) ids -> (B, T, V) scores of the next token, without dropout."""
    return hidden(params, inputs, cfg) @ params.wte[: cfg.vocab_size].T.astype(cfg.compute_dtype)


def loss(
    params: Params, batch: Batch, cfg: GPT2Config, key: Key[Array, ""] | None = None, count: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of the targets in nats: the plain forward, free of custom derivatives.

    Args:
        params: in the layout of ``cfg.layers``.
        batch: ids below ``cfg.vocab_size``; at most ``cfg.max_seq_len`` long.
        cfg: `GPT2Config.resolve`d; static under jit.
        key: turns dropout on.
        count: divides the summed loss in place of this batch's own count of targets; see `target_weights`.

    Raises:
        ValueError: a sequence is too long, or a NumPy array holds an id outside the vocabulary; see `checked_batch`.

    """
    batch = checked_batch(batch, cfg)
    x = hidden(params, batch.inputs, cfg, key)

    def piece(x: Array, targets: Array, weights: Array) -> Array:
        scores = contract("nc,vc->nv", x, as_used(params.wte.astype(x.dtype), "Vp", "C"))
        return cross_entropy_fwd(scores, targets, weights, cfg.vocab_size)[0]

    rows = row_pieces(x, batch.targets, batch.mask, cfg.loss_chunks, count)
    pieces = [jax.checkpoint(piece)(*r) if cfg.loss_chunks > 1 else piece(*r) for r in rows]
    return sum(pieces[1:], pieces[0])


def loss_and_grad(
    params: Params, batch: Batch, cfg: GPT2Config, key: Key[Array, ""] | None = None, count: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], Params]:
    """`loss` and its gradient with respect to every parameter, by the backward derived by hand. Arguments as in `loss`."""
    batch = checked_batch(batch, cfg)
    key, keys = _split_key(key, cfg)
    blocks = split_layers(params)
    positions = jnp.arange(batch.inputs.shape[1], dtype=jnp.int32)

    x = embedding_fwd(batch.inputs, positions, params.wte, params.wpe, cfg.compute_dtype)
    x, drop = dropout_fwd(x, cfg.dropout, key)
    x, saved = blocks_fwd(blocks, x, cfg, keys)
    h, lnf = layernorm_fwd(x, params.lnfw, params.lnfb)

    value, dh, dwte = _classifier_and_grad(params.wte, h, batch, cfg, count)

    dx, dlnfw, dlnfb = layernorm_bwd(lnf, params.lnfw, dh)
    dx, dblocks = blocks_bwd(blocks, saved, dx, cfg, keys)
    dx = dropout_bwd(drop, cfg.dropout, dx)
    dwte, dwpe = embedding_bwd(batch.inputs, positions, dwte, jnp.zeros_like(params.wpe), dx)
    return value, Params(wte=dwte, wpe=dwpe, lnfw=dlnfw, lnfb=dlnfb, **join_layers(dblocks)._asdict())


def _classifier_and_grad(
    wte: Float[Array, "Vp C"], h: Float[Array, "B T C"], batch: Batch, cfg: GPT2Config, count: Any
) -> tuple[Float[Array, ""], Float[Array, "B T C"], Float[Array, "Vp C"]]:
    """(loss, dh, dwte) of the tied classifier ``scores = h wte^T`` and the cross-entropy.

    Forward and backward of one piece of rows follow each other, so a piece's scores live only as long as the piece.
    """
    value: list[Array] = []
    dh: list[Array] = []
    dwte: Any = None
    w = as_used(wte.astype(h.dtype), "Vp", "C")
    for x, targets, weights in row_pieces(h, batch.targets, batch.mask, cfg.loss_chunks, count):
        scores = contract("nc,vc->nv", in_turn((dh[-1], dwte), x) if dh else x, w)
        nll, saved = cross_entropy_fwd(scores, targets, weights, cfg.vocab_size)
        dscores = cross_entropy_bwd(saved, cfg.vocab_size)
        dh.append(contract("nv,vc->nc", dscores, w))
        dw = sum_of_shares(lambda dscores, x: jnp.einsum("nv,nc->vc", dscores, x, preferred_element_type=wte.dtype), dscores, x)
        dwte = dw if dwte is None else dwte + dw
        value.append(nll)
    return sum(value[1:], value[0]), join_pieces(dh, h), total(dwte)


# --- The binding ---


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def loss_manual(
    params: Params, batch: Batch, cfg: GPT2Config, key: Key[Array, ""] | None = None, count: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """`loss`, whose derivative under `jax.grad` is `loss_and_grad`'s."""
    return loss(params, batch, cfg, key, count)


loss_manual.defvjp(
    lambda params, batch, cfg, key=None, count=None: loss_and_grad(params, batch, cfg, key, count),
    lambda cfg, grads, dloss: (jax.tree.map(lambda g: g * dloss.astype(g.dtype), grads), None, None, None),
)
