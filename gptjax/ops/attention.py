"""Causal multi-head attention: one interface, four implementations.

``materialised`` stores the (T, S) probabilities; ``blockwise`` never does (memory linear in T);
``cudnn`` is NVIDIA's fused kernel; ``splash`` is JAX's TPU kernel. `attention_fwd` and
`attention_bwd` select one by name.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd
from gptjax.ops.dropout import dropout_bwd, dropout_fwd
from gptjax.ops.heads import heads_of_rows, rows_of_groups
from gptjax.ops.splash import splash, splash_fwd
from gptjax.xla.products import accumulation_dtype, contract

Heads = Float[Array, "B T H D"]
KeyHeads = Float[Array, "B S K D"]
Segments = Int[Array, "B T"]
ATTENTION_IMPLEMENTATIONS = ("materialised", "blockwise", "cudnn", "splash")


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention_fwd(
    implementation: str,
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    segments: Segments | None = None,
) -> tuple[Heads, Any]:
    """Causal self-attention with the chosen implementation; `materialised_fwd` has the equation.

    Args:
        implementation: one of `ATTENTION_IMPLEMENTATIONS`. All compute the same function, up to
            rounding and, with dropout, up to which probabilities are dropped.
        q: queries (B, T, H, D).
        k: keys (B, T, K, D), each for a group of H / K query heads.
        v: values (B, T, K, D).
        rate: dropout rate of the attention probabilities; 0 for ``cudnn`` and ``splash``, which do
            not support dropout.
        key: dropout's random key; None disables dropout.
        segments: (B, T), the number of each token's document, if several are packed into a
            sequence: a token attends only to its own document. ``cudnn`` does not support them.

    Raises:
        ValueError: the implementation is unknown or does not support the dropout or the segments.

    """
    match implementation:
        case "materialised":
            return materialised_fwd(q, k, v, rate, key, causal(q.shape[1], segments))
        case "blockwise":
            return blockwise_fwd(q, k, v, rate, key, segments)
        case "cudnn" | "splash":
            if rate and key is not None:
                raise ValueError(
                    f"{implementation} attention does not support dropout: "
                    "use attention materialised or blockwise, or dropout 0"
                )
            if implementation == "splash":
                return splash_fwd(q, k, v, segments)
            if segments is not None:
                raise ValueError(
                    "cudnn attention does not support segments: "
                    "use attention materialised or blockwise"
                )
            return cudnn_fwd(q, k, v)
    raise ValueError(
        f"attention must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, not {implementation}"
    )


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention(
    implementation: str,
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    segments: Segments | None = None,
) -> tuple[Heads, None]:
    """`attention_fwd` for JAX to differentiate: it saves nothing, and kernels use their own
    derivative rules.
    """
    if not (rate and key is not None):
        if implementation == "splash":
            return splash(q, k, v, segments), None
        if implementation == "cudnn" and segments is None:
            return _cudnn(q, k, v), None
    return attention_fwd(implementation, q, k, v, rate, key, segments)[0], None


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention_bwd(
    implementation: str, saved: Any, do: Heads, rate: float = 0.0
) -> tuple[Heads, KeyHeads, KeyHeads]:
    """(dq, dk, dv) of `attention_fwd`; ``do`` is the gradient of its output."""
    match implementation:
        case "materialised":
            return materialised_bwd(saved, do, rate)
        case "blockwise":
            return blockwise_bwd(saved, do, rate)
        case _:
            return saved(do)


class MaterialisedSaved(NamedTuple):
    """What `materialised_bwd` needs: the inputs, the probabilities p, and dropout's mask, which
    keeps where it is True. Queries have R = T G rows.
    """

    q: Float[Array, "B R K D"]
    k: KeyHeads
    v: KeyHeads
    p: Float[Array, "B K R S"]
    keep: Bool[Array, "B K R S"] | None


def causal(T: int, segments: Segments | None = None) -> Bool[Array, "*B T T"]:
    """Mask of the keys that each query attends to: its own and earlier ones in its segment."""
    triangle = jnp.tri(T, dtype=bool)
    if segments is None:
        return triangle
    own = segments[:, :, None] == segments[:, None, :]
    return own & jnp.broadcast_to(triangle, own.shape)


def materialised_fwd(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    visible: Bool[Array, "*B T S"] | None = None,
) -> tuple[Heads, MaterialisedSaved]:
    """``o = dropout(p) v``, ``p = softmax(s)`` over the keys, ``s = q k^T / sqrt(D)``.

    Each of the K heads of keys and values serves G = H / K query heads, which are treated as
    further rows of queries (`rows_of_groups`). Scores that are not ``visible`` are -inf.
    ``visible`` defaults to the causal triangle; packed documents and decoding, whose keys come from
    a cache, pass their own mask.

    Derivation of the backward, with r = dropout(p):

        dv = r^T do
        dr = do v^T,   dp = dr through the same dropout mask
        ds = p (dp - sum_s dp p)            the softmax's Jacobian, diag(p) - p p^T, applied to dp
        dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

    dk and dv are sums over rows, and so over a group's heads. A masked score has p = 0 and
    therefore ds = 0, so the backward needs no mask.

    Saved: q, k, v, the probabilities and the dropout mask: O(T^2) memory, no recomputation.
    """
    (_, T, H, D), K, acc = q.shape, k.shape[2], accumulation_dtype(q)
    if visible is None:
        visible = jnp.tri(T, k.shape[1], dtype=bool)
    q = rows_of_groups(q, K)
    s = jnp.einsum("brkd,bskd->bkrs", q, k, preferred_element_type=acc) / math.sqrt(D)
    visible = jnp.repeat(visible.reshape(-1, 1, *visible.shape[-2:]), H // K, axis=2)
    s = jnp.where(jnp.broadcast_to(visible, s.shape), s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    r, keep = dropout_fwd(p, rate, key)
    o = contract("bkrs,bskd->brkd", r, v)
    return heads_of_rows(o, H), MaterialisedSaved(q, k, v, p, keep)


def materialised_bwd(
    saved: MaterialisedSaved, do: Heads, rate: float = 0.0
) -> tuple[Heads, KeyHeads, KeyHeads]:
    """(dq, dk, dv) of `materialised_fwd`."""
    q, k, v, p, keep = saved
    acc, H = accumulation_dtype(q), do.shape[2]
    do = rows_of_groups(do, k.shape[2])
    r = dropout_bwd(keep, rate, p)
    dv = contract("bkrs,brkd->bskd", r, do)
    dr = jnp.einsum("brkd,bskd->bkrs", do, v, preferred_element_type=acc)
    dp = dropout_bwd(keep, rate, dr)
    pf = p.astype(acc)
    ds = pf * (dp - (dp * pf).sum(-1, keepdims=True)) / math.sqrt(q.shape[3])
    ds = ds.astype(q.dtype)
    dq = contract("bkrs,bskd->brkd", ds, k)
    dk = contract("bkrs,brkd->bskd", ds, q)
    return heads_of_rows(dq, H), dk, dv


def cudnn_fwd(q: Heads, k: KeyHeads, v: KeyHeads) -> tuple[Heads, Any]:
    """`materialised_fwd` by cuDNN's flash-attention kernel.

    Needs a CUDA GPU of compute capability 8.0 or later, a 16-bit dtype, and D a multiple of 8 and
    at most 128.

    Saved: the function of `jax.vjp` that runs the kernel's own backward.
    """
    return jax.vjp(_cudnn, q, k, v)


def _cudnn(q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
