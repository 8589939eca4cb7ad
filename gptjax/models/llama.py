"""Llama (Touvron et al. 2023): its weights, its block, and the block's backward derived by hand.

It differs from GPT-2 in these: RMSNorm instead of LayerNorm, rotary positions in each layer instead
of a table of positions, SwiGLU instead of GELU, groups of query heads that share keys and values,
no biases, and a classifier that may have its own matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.config import Architecture, ModelConfig
from gptjax.errors import ConfigError
from gptjax.models.family import RECOMPUTED, Weight
from gptjax.models.layers import (
    add,
    dropout_bwd,
    dropout_fwd,
    embedding_bwd,
    embedding_fwd,
    linear_bwd,
    linear_fwd,
    linears_fwd,
    rmsnorm_bwd,
    rmsnorm_fwd,
    rotary_bwd,
    rotary_fwd,
    swiglu_again,
    swiglu_bwd,
    swiglu_fwd,
)

OPTIONS = ("num_kv_heads", "rope_theta", "norm_eps", "tied")


class Block(NamedTuple):
    """One layer's weights, or anything shaped like them: gradients, moments, a decay mask.

    att_norm and ffn_norm are the RMSNorms before attention and before the MLP; wq, wk, wv and wo
    are attention's projections; w1 (gate), w3 (up) and w2 (down) are the MLP's.
    """

    att_norm: Any
    wq: Any
    wk: Any
    wv: Any
    wo: Any
    ffn_norm: Any
    w1: Any
    w3: Any
    w2: Any


class Params(NamedTuple):
    """All weights, or anything shaped like them.

    ``blocks`` is a tuple of L `Block`s, or a single `Block` of (L, ...) arrays. ``wcls`` is None if
    the classifier is tied to the token embeddings.
    """

    tok_emb: Any
    blocks: Any
    final_norm: Any
    wcls: Any = None


def weights(cfg: Architecture) -> Params:
    """The weight table, with llama2.c's names and (in, out) matrices.

    The MLP is ``w2(silu(w1 h) * w3 h)``. The projections into the residual stream are wo and w2;
    llama2.c scales the initial w3 in place of w2.

    Raises:
        ConfigError: the heads have an odd number of channels, which cannot be rotated in pairs.

    """
    if cfg.head_dim % 2:
        raise ConfigError(
            f"model.channels {cfg.channels} and model.num_heads {cfg.num_heads} give heads of "
            f"{cfg.head_dim} channels, but a rotary embedding needs an even number"
        )
    return Params(
        tok_emb=Weight(("Vp", "C"), "table", "normal"),
        blocks=Block(
            att_norm=Weight(("C",), "vector", "ones"),
            wq=Weight(("C", "H", "D"), "matrix", "normal"),
            wk=Weight(("C", "K", "D"), "matrix", "normal"),
            wv=Weight(("C", "K", "D"), "matrix", "normal"),
            wo=Weight(("H", "D", "C"), "matrix", "residual", inputs=2),
            ffn_norm=Weight(("C",), "vector", "ones"),
            w1=Weight(("C", "F"), "matrix", "normal"),
            w3=Weight(("C", "F"), "matrix", "normal"),
            w2=Weight(("F", "C"), "matrix", "residual"),
        ),
        final_norm=Weight(("C",), "vector", "ones"),
        wcls=None if cfg.tied else Weight(("Vp", "C"), "table", "normal"),
    )


def head_name(cfg: Architecture) -> str:
    """The token embeddings, or the classifier's own matrix."""
    return "tok_emb" if cfg.tied else "wcls"


def embed_fwd(params: Params, tokens: Int[Array, "B T"], positions: Any, cfg: ModelConfig) -> Array:
    """``x[b, t] = tok_emb[tokens[b, t]]``, in the compute dtype; positions enter in each block."""
    return embedding_fwd(tokens, params.tok_emb).astype(cfg.compute_dtype)


def embed_bwd(
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Any,
    dhead: Array,
    dx: Float[Array, "B T C"],
) -> dict[str, Any]:
    """Gradients of tok_emb and of wcls; if tied, tok_emb's includes the classifier's, ``dhead``."""
    dx = dx.astype(dhead.dtype)
    if params.wcls is None:
        return {"tok_emb": embedding_bwd(tokens, dhead, dx)}
    return {"tok_emb": embedding_bwd(tokens, jnp.zeros_like(dhead), dx), "wcls": dhead}


class BlockSaved(NamedTuple):
    """What `block_bwd` needs, in the order of the forward."""

    att_norm: Any
    qkv: Any
    att: Any
    o: Any
    drop1: Any
    ffn_norm: Any
    ffn: Any
    swiglu: Any
    drop_mlp: Any
    down: Any
    drop2: Any


def block_fwd(
    w: Block,
    x: Float[Array, "B T C"],
    positions: Int[Array, "*B T"],
    cfg: ModelConfig,
    attend: Any,
    key: Any = None,
) -> tuple[Float[Array, "B T C"], BlockSaved]:
    """A pre-norm block: ``x += attention(rmsnorm(x))``, then ``x += mlp(rmsnorm(x))``."""
    key1, key2, key3 = (None,) * 3 if key is None else jax.random.split(key, 3)
    h1, att_norm = rmsnorm_fwd(x, w.att_norm, cfg.norm_eps)
    (q, k, v), qkv = linears_fwd(h1, (w.wq, w.wk, w.wv))
    q = rotary_fwd(q, positions, cfg.rope_theta)
    k = rotary_fwd(k, positions, cfg.rope_theta)
    o, att = attend(q, k, v)
    a, o = linear_fwd(o, w.wo)
    a, drop1 = dropout_fwd(a, cfg.dropout, key1)
    x = add(x, a)
    h2, ffn_norm = rmsnorm_fwd(x, w.ffn_norm, cfg.norm_eps)
    (gate, up), ffn = linears_fwd(h2, (w.w1, w.w3))
    g, swiglu = swiglu_fwd(gate, up)
    g = checkpoint_name(g, RECOMPUTED)
    g, drop_mlp = dropout_fwd(g, cfg.dropout_mlp, key3)
    m, down = linear_fwd(g, w.w2)
    m, drop2 = dropout_fwd(m, cfg.dropout, key2)
    x = add(x, m)
    return x, BlockSaved(att_norm, qkv, att, o, drop1, ffn_norm, ffn, swiglu, drop_mlp, down, drop2)


def block_bwd(
    w: Block,
    saved: BlockSaved,
    dx: Float[Array, "B T C"],
    positions: Int[Array, "*B T"],
    cfg: ModelConfig,
    attend_bwd: Any,
) -> tuple[Float[Array, "B T C"], Block]:
    """(dx, dw) of `block_fwd`, whose lines it mirrors from the last to the first.

    A residual branch adds its gradient to the stream's.
    """
    dm = dropout_bwd(saved.drop2, cfg.dropout, dx)
    dg, dw2, _ = linear_bwd(saved.down, w.w2, dm)
    dg = dropout_bwd(saved.drop_mlp, cfg.dropout_mlp, dg)
    dgate, dup = swiglu_bwd(saved.swiglu, dg)
    dh3, dw3, _ = linear_bwd(saved.ffn, w.w3, dup)
    dh2, dw1, _ = linear_bwd(saved.ffn, w.w1, dgate)
    dx2, dffn_norm = rmsnorm_bwd(saved.ffn_norm, w.ffn_norm, add(dh2, dh3))
    dx = dx + dx2
    da = dropout_bwd(saved.drop1, cfg.dropout, dx)
    do, dwo, _ = linear_bwd(saved.o, w.wo, da)
    dq, dk, dv = attend_bwd(saved.att, do)
    dk = rotary_bwd(positions, cfg.rope_theta, dk)
    dq = rotary_bwd(positions, cfg.rope_theta, dq)
    dhv, dwv, _ = linear_bwd(saved.qkv, w.wv, dv)
    dhk, dwk, _ = linear_bwd(saved.qkv, w.wk, dk)
    dhq, dwq, _ = linear_bwd(saved.qkv, w.wq, dq)
    dx1, datt_norm = rmsnorm_bwd(saved.att_norm, w.att_norm, add(dhq, dhk, dhv))
    dx = dx + dx1
    return dx, Block(
        att_norm=datt_norm,
        wq=dwq,
        wk=dwk,
        wv=dwv,
        wo=dwo,
        ffn_norm=dffn_norm,
        w1=dw1,
        w3=dw3,
        w2=dw2,
    )


def discard(saved: BlockSaved) -> BlockSaved:
    """Drop SwiGLU's output, which `recompute` restores."""
    return saved._replace(down=None)


def recompute(saved: BlockSaved, dx: Float[Array, "B T C"], cfg: ModelConfig) -> BlockSaved:
    """Recompute SwiGLU's output from its inputs."""
    g = swiglu_again(dx, saved.swiglu)
    return saved._replace(down=dropout_bwd(saved.drop_mlp, cfg.dropout_mlp, g))


def norm_fwd(
    params: Params, x: Float[Array, "B T C"], cfg: ModelConfig
) -> tuple[Float[Array, "B T C"], Any]:
    """The final RMSNorm."""
    return rmsnorm_fwd(x, params.final_norm, cfg.norm_eps)


def norm_bwd(
    params: Params, saved: Any, dh: Float[Array, "B T C"]
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """(dx, gradients) of `norm_fwd`."""
    dx, dfinal_norm = rmsnorm_bwd(saved, params.final_norm, dh)
    return dx, {"final_norm": dfinal_norm}
