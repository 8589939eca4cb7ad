"""Queries, keys and values side by side -> heads, and back, so that a mesh can cut them between heads."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.sharding import as_kept, as_used, parts

Heads = Float[Array, "B T H D"]


def by_heads(x: Any) -> Any:
    """(..., 3 C): columns q k v -> q1 k1 v1 q2 k2 v2 ..., where part n holds the heads that the n-th device computes.

    A cut of what GPT-2 keeps, all of q, then k, then v, would give one device q's heads and another k's. So the weight is kept
    cut along its rows, and dealt out between the devices each time. Without a mesh there is one part, and x, or a weight
    stored in another way, is returned.
    """
    n = parts("tensor")
    if n == 1:
        return x
    x = x.reshape(*x.shape[:-1], 3, n, -1).swapaxes(-3, -2).reshape(x.shape)
    return as_kept(as_kept(x, "CQ", None), "C", "HD") if x.ndim == 2 else as_used(x, "HD")


def from_heads(dx: Float[Array, "*rest QKV"]) -> Float[Array, "*rest QKV"]:
    """The gradient of `by_heads`, which is its inverse."""
    n = parts("tensor")
    if n == 1:
        return dx
    dx = as_kept(as_kept(dx, "C", "HD"), "CQ", None) if dx.ndim == 2 else as_used(dx, None)
    return dx.reshape(*dx.shape[:-1], n, 3, -1).swapaxes(-3, -2).reshape(dx.shape)


def split_heads(qkv: Float[Array, "B T QKV"], num_heads: int) -> tuple[Heads, ...]:
    """Columns as `by_heads` orders them -> q, k and v."""
    B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
    n = parts("tensor")
    if n > 1:
        cut = qkv.reshape(B, T, n, 3, -1)
        return tuple(as_used(cut[..., i, :].reshape(B, T, num_heads, -1), "B", None, "H", None) for i in range(3))
    return tuple(qkv[..., i * C : (i + 1) * C].reshape(B, T, num_heads, -1) for i in range(3))


def join_heads(q: Heads, k: Heads, v: Heads) -> Float[Array, "B T QKV"]:
    """`split_heads` undone."""
    B, T = q.shape[:2]
    n = parts("tensor")
    if n > 1:
        cut = jnp.stack([x.reshape(B, T, n, -1) for x in (q, k, v)], axis=3)
        return as_used(cut.reshape(B, T, -1), "B", None, "HD")
    return jnp.concatenate([x.reshape(B, T, -1) for x in (q, k, v)], axis=-1)
