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
from jaxtyping import Array, Bool, Float, Key

from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd
from gptjax.ops.dropout import dropout_bwd, dropout_fwd
from gptjax.ops.splash import splash, splash_fwd
from gptjax.xla.products import accumulation_dtype, contract

Heads = Float[Array, "B T H D"]
KeyHeads = Float[Array, "B S H D"]
ATTENTION_IMPLEMENTATIONS = ("materialised", "blockwise", "cudnn", "splash")


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention_fwd(
    implementation: str,
    q: Heads,
    k: Heads,
    v: Heads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> tuple[Heads, Any]:
    """Causal self-attention with the chosen implementation; `materialised_fwd` has the equation.

    Args:
        implementation: one of `ATTENTION_IMPLEMENTATIONS`. All compute the same function, up to
            rounding and, with dropout, up to which probabilities are dropped.
        q: queries (B, T, H, D).
        k: keys (B, T, H, D).
        v: values (B, T, H, D).
        rate: dropout on the attention probabilities; ``cudnn`` and ``splash`` do not support it.
        key: dropout's random key; None disables dropout.

    Raises:
        ValueError: the implementation is unknown or does not support the requested dropout.

    """
    match implementation:
        case "materialised":
            return materialised_fwd(q, k, v, rate, key)
        case "blockwise":
            return blockwise_fwd(q, k, v, rate, key)
        case "cudnn" | "splash":
            if rate and key is not None:
                raise ValueError(
                    f"{implementation} attention has no dropout: "
                    "use attention materialised or blockwise, or dropout 0"
                )
            return cudnn_fwd(q, k, v) if implementation == "cudnn" else splash_fwd(q, k, v)
    raise ValueError(
        f"attention must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, not {implementation}"
    )


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention(
    implementation: str,
    q: Heads,
    k: Heads,
    v: Heads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> tuple[Heads, None]:
    """`attention_fwd` for JAX to differentiate: it saves nothing, and kernels use their own
    rules.
    """
    kernels = {"cudnn": _cudnn, "splash": splash}
    if implementation in kernels and not (rate and key is not None):
        return kernels[implementation](q, k, v), None
    return attention_fwd(implementation, q, k, v, rate, key)[0], None


@partial(jax.jit, static_argnames=("implementation", "rate"))
def attention_bwd(
    implementation: str, saved: Any, do: Heads, rate: float = 0.0
) -> tuple[Heads, Heads, Heads]:
    """(dq, dk, dv) of `attention_fwd`; ``do`` is the gradient of its output."""
    match implementation:
        case "materialised":
            return materialised_bwd(saved, do, rate)
        case "blockwise":
            return blockwise_bwd(saved, do, rate)
        case _:
            return saved(do)


class MaterialisedSaved(NamedTuple):
    """What `materialised_bwd` needs."""

    q: Heads
    k: KeyHeads
    v: KeyHeads
    p: Float[Array, "B H T S"]
    keep: Bool[Array, "B H T S"] | None


def materialised_fwd(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    visible: Bool[Array, "*any T S"] | None = None,
) -> tuple[Heads, MaterialisedSaved]:
    """``o = dropout(p) v``, ``p = softmax(s)`` over the keys, ``s = q k^T / sqrt(D)``.

    Scores that are not ``visible`` are -inf. ``visible`` defaults to the causal triangle; decoding
    passes its own, because its keys come from a cache.

    Derivation of the backward, with r = dropout(p):

        dv = r^T do
        dr = do v^T,   dp = dr through the same dropout mask
        ds = p (dp - sum_s dp p)            the softmax's Jacobian, diag(p) - p p^T, applied to dp
        dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

    Saved: q, k, v, the probabilities and the dropout mask: O(T^2) memory, no recomputation.
    """
    if visible is None:
        visible = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
    acc = accumulation_dtype(q)
    s = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=acc) / math.sqrt(q.shape[3])
    s = jnp.where(jnp.broadcast_to(visible, s.shape), s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    r, keep = dropout_fwd(p, rate, key)
    return contract("bhts,bshd->bthd", r, v), MaterialisedSaved(q, k, v, p, keep)


def materialised_bwd(
    saved: MaterialisedSaved, do: Heads, rate: float = 0.0
) -> tuple[Heads, Heads, Heads]:
    """(dq, dk, dv) of `materialised_fwd`."""
    q, k, v, p, keep = saved
    acc = accumulation_dtype(q)
    r = dropout_bwd(keep, rate, p)
    dv = contract("bhts,bthd->bshd", r, do)
    dr = jnp.einsum("bthd,bshd->bhts", do, v, preferred_element_type=acc)
    dp = dropout_bwd(keep, rate, dr)
    pf = p.astype(acc)
    ds = pf * (dp - (dp * pf).sum(-1, keepdims=True)) / math.sqrt(q.shape[3])
    ds = ds.astype(q.dtype)
    dq = contract("bhts,bshd->bthd", ds, k)
    dk = contract("bhts,bthd->bshd", ds, q)
    return dq, dk, dv


def cudnn_fwd(q: Heads, k: Heads, v: Heads) -> tuple[Heads, Any]:
    """`materialised_fwd` by cuDNN's flash-attention kernel.

    Needs a CUDA GPU of compute capability 8.0 or later, a 16-bit dtype, and D a multiple of 8 and
    at most 128.

    Saved: JAX's handle on the kernel's own backward.
    """
    return jax.vjp(_cudnn, q, k, v)


def _cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
