"""A family that the package does not know: an MLP at each position, without attention, with a
classifier of its own.

It has what `gptjax.models.family.Family` asks for, and no more. `registered` adds it for the length
of a block.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.models import FAMILIES
from gptjax.models.family import RECOMPUTED, Weight
from gptjax.models.layers import (
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
)

NAME = "mlp"
OPTIONS = ()


class Block(NamedTuple):
    normw: Any
    normb: Any
    upw: Any
    downw: Any


class Params(NamedTuple):
    embed: Any
    blocks: Any
    normw: Any
    normb: Any
    head: Any


def weights(cfg: Any) -> Params:
    return Params(
        embed=Weight(("Vp", "C"), "table", "normal"),
        blocks=Block(
            normw=Weight(("C",), "vector", "ones"),
            normb=Weight(("C",), "vector", "zeros"),
            upw=Weight(("C", "F"), "matrix", "normal"),
            downw=Weight(("F", "C"), "matrix", "residual"),
        ),
        normw=Weight(("C",), "vector", "ones"),
        normb=Weight(("C",), "vector", "zeros"),
        head=Weight(("Vp", "C"), "table", "normal"),
    )


def head_name(cfg: Any) -> str:
    return "head"


def embed_fwd(params: Params, tokens: Any, positions: Any, cfg: Any) -> Any:
    return embedding_fwd(tokens, params.embed).astype(cfg.compute_dtype)


def embed_bwd(params: Params, tokens: Any, positions: Any, dhead: Any, dx: Any) -> dict[str, Any]:
    dembed = jnp.zeros_like(params.embed)
    return {"embed": embedding_bwd(tokens, dembed, dx.astype(dembed.dtype)), "head": dhead}


class BlockSaved(NamedTuple):
    norm: Any
    up: Any
    gelu: Any
    drop: Any
    down: Any
    att: None = None


def block_fwd(w: Block, x: Any, positions: Any, cfg: Any, attend: Any, key: Any = None) -> Any:
    h, norm = layernorm_fwd(x, w.normw, w.normb)
    f, up = linear_fwd(h, w.upw)
    g, gelu = gelu_fwd(f)
    g = checkpoint_name(g, RECOMPUTED)
    g, drop = dropout_fwd(g, cfg.dropout_mlp, key)
    m, down = linear_fwd(g, w.downw)
    return x + m, BlockSaved(norm, up, gelu, drop, down)


def block_bwd(
    w: Block, saved: BlockSaved, dx: Any, positions: Any, cfg: Any, attend_bwd: Any
) -> Any:
    dg, ddownw, _ = linear_bwd(saved.down, w.downw, dx)
    dg = dropout_bwd(saved.drop, cfg.dropout_mlp, dg)
    df = gelu_bwd(saved.gelu, dg)
    dh, dupw, _ = linear_bwd(saved.up, w.upw, df)
    dx2, dnormw, dnormb = layernorm_bwd(saved.norm, w.normw, dh)
    return dx + dx2, Block(dnormw, dnormb, dupw, ddownw)


def discard(saved: BlockSaved) -> BlockSaved:
    return saved._replace(down=None)


def recompute(saved: BlockSaved, dx: Any, cfg: Any) -> BlockSaved:
    return saved._replace(down=dropout_bwd(saved.drop, cfg.dropout_mlp, gelu_again(dx, saved.gelu)))


def norm_fwd(params: Params, x: Any, cfg: Any) -> Any:
    return layernorm_fwd(x, params.normw, params.normb)


def norm_bwd(params: Params, saved: Any, dh: Any) -> Any:
    dx, dnormw, dnormb = layernorm_bwd(saved, params.normw, dh)
    return dx, {"normw": dnormw, "normb": dnormb}


@contextlib.contextmanager
def registered() -> Iterator[str]:
    """Let configurations name this family until the block ends."""
    import sys

    FAMILIES[NAME] = sys.modules[__name__]
    try:
        yield NAME
    finally:
        del FAMILIES[NAME]
