"""GPT-2 (Radford et al. 2019): its weights, its block, and the block's backward derived by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.config import Architecture, ModelConfig
from gptjax.models.family import RECOMPUTED, Weight
from gptjax.models.layers import (
    add,
    dropout_bwd,
    dropout_fwd,
    embedding_bwd,
    embedding_fwd,
    gelu_again,
    gelu_bwd,
    gelu_fwd,
    layernorm_bwd,
    layernorm_fwd,
    linear_bwd,
    linear_fwd,
    linears_fwd,
)

OPTIONS = ()


class Block(NamedTuple):
    """One layer's weights, or anything shaped like them: gradients, moments, a decay mask.

    Names end in w for a weight and b for a bias. ln1 and ln2 are the LayerNorms before attention
    and before the MLP; q, k, v and attproj are attention's projections; fc and fcproj are the MLP's
    two layers.
    """

    ln1w: Any
    ln1b: Any
    qw: Any
    qb: Any
    kw: Any
    kb: Any
    vw: Any
    vb: Any
    attprojw: Any
    attprojb: Any
    ln2w: Any
    ln2b: Any
    fcw: Any
    fcb: Any
    fcprojw: Any
    fcprojb: Any


class Params(NamedTuple):
    """All weights, or anything shaped like them.

    wte and wpe embed tokens and positions; lnfw and lnfb are the final LayerNorm. ``blocks`` is a
    tuple of L `Block`s, or a single `Block` of (L, ...) arrays.
    """

    wte: Any
    wpe: Any
    blocks: Any
    lnfw: Any
    lnfb: Any


def weights(cfg: Architecture) -> Params:
    """The weight table, with llm.c's names and Hugging Face's (in, out) linear weights."""
    return Params(
        wte=Weight(("Vp", "C"), "table", "normal"),
        wpe=Weight(("T", "C"), "table", "normal"),
        blocks=Block(
            ln1w=Weight(("C",), "vector", "ones"),
            ln1b=Weight(("C",), "vector", "zeros"),
            qw=Weight(("C", "H", "D"), "matrix", "normal"),
            qb=Weight(("H", "D"), "vector", "zeros"),
            kw=Weight(("C", "H", "D"), "matrix", "normal"),
            kb=Weight(("H", "D"), "vector", "zeros"),
            vw=Weight(("C", "H", "D"), "matrix", "normal"),
            vb=Weight(("H", "D"), "vector", "zeros"),
            attprojw=Weight(("H", "D", "C"), "matrix", "residual", inputs=2),
            attprojb=Weight(("C",), "vector", "zeros"),
            ln2w=Weight(("C",), "vector", "ones"),
            ln2b=Weight(("C",), "vector", "zeros"),
            fcw=Weight(("C", "F"), "matrix", "normal"),
            fcb=Weight(("F",), "vector", "zeros"),
            fcprojw=Weight(("F", "C"), "matrix", "residual"),
            fcprojb=Weight(("C",), "vector", "zeros"),
        ),
        lnfw=Weight(("C",), "vector", "ones"),
        lnfb=Weight(("C",), "vector", "zeros"),
    )


def head_name(cfg: Architecture) -> str:
    """The classifier is tied to the token embeddings."""
    return "wte"


def embed_fwd(
    params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "..."], cfg: ModelConfig
) -> Array:
    """``x[b, t] = wte[tokens[b, t]] + wpe[positions[t]]``, in the compute dtype."""
    x = embedding_fwd(tokens, params.wte)
    p = embedding_fwd(positions, params.wpe)
    return (x.astype(p.dtype) + jnp.broadcast_to(p, x.shape)).astype(cfg.compute_dtype)


def embed_bwd(
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "*B T"],
    dhead: Array,
    dx: Float[Array, "B T C"],
) -> dict[str, Array]:
    """Gradients of wpe and of wte; the latter includes ``dhead``, since wte is the classifier."""
    dx = dx.astype(dhead.dtype)
    dp = dx.sum(0) if positions.ndim == 1 else dx
    dwpe = embedding_bwd(positions, jnp.zeros_like(params.wpe), dp)
    dwte = embedding_bwd(tokens, dhead, dx)
    return {"wte": dwte, "wpe": dwpe}


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
    dropmlp: Any
    fcproj: Any
    drop2: Any


def block_fwd(
    w: Block,
    x: Float[Array, "B T C"],
    positions: Any,
    cfg: ModelConfig,
    attend: Any,
    key: Any = None,
) -> tuple[Float[Array, "B T C"], BlockSaved]:
    """A pre-norm block: ``x += attention(layernorm(x))``, then ``x += mlp(layernorm(x))``."""
    key1, key2, key3 = (None,) * 3 if key is None else jax.random.split(key, 3)
    h1, ln1 = layernorm_fwd(x, w.ln1w, w.ln1b)
    (q, k, v), qkv = linears_fwd(h1, (w.qw, w.kw, w.vw), (w.qb, w.kb, w.vb))
    o, att = attend(q, k, v)
    a, attproj = linear_fwd(o, w.attprojw, w.attprojb)
    a, drop1 = dropout_fwd(a, cfg.dropout, key1)
    x = add(x, a)
    h2, ln2 = layernorm_fwd(x, w.ln2w, w.ln2b)
    f, fc = linear_fwd(h2, w.fcw, w.fcb)
    g, gelu = gelu_fwd(f)
    g = checkpoint_name(g, RECOMPUTED)
    g, dropmlp = dropout_fwd(g, cfg.dropout_mlp, key3)
    m, fcproj = linear_fwd(g, w.fcprojw, w.fcprojb)
    m, drop2 = dropout_fwd(m, cfg.dropout, key2)
    x = add(x, m)
    return x, BlockSaved(ln1, qkv, att, attproj, drop1, ln2, fc, gelu, dropmlp, fcproj, drop2)


def block_bwd(
    w: Block,
    saved: BlockSaved,
    dx: Float[Array, "B T C"],
    positions: Any,
    cfg: ModelConfig,
    attend_bwd: Any,
) -> tuple[Float[Array, "B T C"], Block]:
    """(dx, dw) of `block_fwd`, whose lines it mirrors from the last to the first.

    A residual branch adds its gradient to the stream's.
    """
    dm = dropout_bwd(saved.drop2, cfg.dropout, dx)
    dg, dfcprojw, dfcprojb = linear_bwd(saved.fcproj, w.fcprojw, dm)
    dg = dropout_bwd(saved.dropmlp, cfg.dropout_mlp, dg)
    df = gelu_bwd(saved.gelu, dg)
    dh2, dfcw, dfcb = linear_bwd(saved.fc, w.fcw, df)
    dx2, dln2w, dln2b = layernorm_bwd(saved.ln2, w.ln2w, dh2)
    dx = dx + dx2
    da = dropout_bwd(saved.drop1, cfg.dropout, dx)
    do, dattprojw, dattprojb = linear_bwd(saved.attproj, w.attprojw, da)
    dq, dk, dv = attend_bwd(saved.att, do)
    dhv, dvw, dvb = linear_bwd(saved.qkv, w.vw, dv)
    dhk, dkw, dkb = linear_bwd(saved.qkv, w.kw, dk)
    dhq, dqw, dqb = linear_bwd(saved.qkv, w.qw, dq)
    dx1, dln1w, dln1b = layernorm_bwd(saved.ln1, w.ln1w, add(dhq, dhk, dhv))
    dx = dx + dx1
    return dx, Block(
        ln1w=dln1w,
        ln1b=dln1b,
        qw=dqw,
        qb=dqb,
        kw=dkw,
        kb=dkb,
        vw=dvw,
        vb=dvb,
        attprojw=dattprojw,
        attprojb=dattprojb,
        ln2w=dln2w,
        ln2b=dln2b,
        fcw=dfcw,
        fcb=dfcb,
        fcprojw=dfcprojw,
        fcprojb=dfcprojb,
    )


def discard(saved: BlockSaved) -> BlockSaved:
    """Drop GELU's output, which `recompute` restores."""
    return saved._replace(fcproj=None)


def recompute(saved: BlockSaved, dx: Float[Array, "B T C"], cfg: ModelConfig) -> BlockSaved:
    """Recompute GELU's output from its input."""
    g = gelu_again(dx, saved.gelu)
    return saved._replace(fcproj=dropout_bwd(saved.dropmlp, cfg.dropout_mlp, g))


def norm_fwd(
    params: Params, x: Float[Array, "B T C"], cfg: ModelConfig
) -> tuple[Float[Array, "B T C"], Any]:
    """The final LayerNorm."""
    return layernorm_fwd(x, params.lnfw, params.lnfb)


def norm_bwd(
    params: Params, saved: Any, dh: Float[Array, "B T C"]
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """(dx, gradients) of `norm_fwd`."""
    dx, dlnfw, dlnfb = layernorm_bwd(saved, params.lnfw, dh)
    return dx, {"lnfw": dlnfw, "lnfb": dlnfb}
