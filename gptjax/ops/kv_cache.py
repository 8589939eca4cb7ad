"""Attention of one new position over a cache of keys and values."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptjax.ops.attention import Heads, KeyHeads
from gptjax.xla.barrier import cpu_barrier
from gptjax.xla.products import accumulation_dtype


class LayerCache(NamedTuple):
    """Keys and values of one layer in S slots, some not yet written."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]


def cached_attention(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    cache: LayerCache,
    slot: Int[Array, ""],
    visible: Bool[Array, "B S"],
) -> tuple[Heads, LayerCache]:
    """Attention of one position, T = 1, to itself and to the ``visible`` slots.

    Computes the position's own score separately and writes the cache only after reading it. XLA
    then updates the cache in place instead of copying all of it for each token.

    Returns:
        The output, and the cache with the position's own key and value in ``slot``.

    """
    acc, K = accumulation_dtype(q), k.shape[2]
    B, _, H, D = q.shape
    q1, k1, v1 = q.reshape(B, K, H // K, D), k[:, 0], v[:, 0]
    s = jnp.einsum("bksd,bkgd->bkgs", cache.k, q1, preferred_element_type=acc) / math.sqrt(D)
    s = jnp.where(jnp.broadcast_to(visible[:, None, None], s.shape), s, -jnp.inf)
    k_own, v_own = (jnp.broadcast_to(x[:, :, None].astype(acc), q1.shape) for x in (k1, v1))
    own = (q1.astype(acc) * k_own).sum(-1, keepdims=True) / math.sqrt(D)
    top = jnp.maximum(s.max(-1, keepdims=True), own)
    e, e_own = jnp.exp(s - top), jnp.exp(own - top)
    total = e.sum(-1, keepdims=True) + e_own
    o = jnp.einsum(
        "bkgs,bksd->bkgd", (e / total).astype(v.dtype), cache.v, preferred_element_type=acc
    )
    o = (o + e_own / total * v_own).astype(q.dtype).reshape(q.shape)
    k1, v1 = cpu_barrier(o, k1), cpu_barrier(o, v1)
    return o, LayerCache(
        *(
            lax.dynamic_update_slice_in_dim(c, x[:, :, None], slot, 2)
            for c, x in zip(cache, (k1, v1), strict=True)
        )
    )
