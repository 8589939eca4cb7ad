"""Attention of new positions over a cache of keys and values."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

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
    begin: Int[Array, " B"],
) -> tuple[Heads, LayerCache]:
    """Causal attention of T new positions to the cache's ``begin <= slot' < slot`` and themselves.

    Computes the new positions' own scores separately and writes the cache only after reading it.
    XLA then updates the cache in place instead of copying all of it for each token.

    Args:
        q: queries of the new positions.
        k: their keys.
        v: their values.
        cache: keys and values of the positions before; later slots may hold anything.
        slot: of the first new position. The cache must have T slots from there.
        begin: each row's first slot. New positions before it, which are padding, see themselves
            alone.

    Returns:
        The output, and the cache with the new keys and values from ``slot`` on.

    """
    acc, (B, T, H, D), (S, K) = accumulation_dtype(q), q.shape, (cache.k.shape[2], k.shape[2])
    place, new = jnp.arange(S, dtype=jnp.int32), jnp.arange(T, dtype=jnp.int32)
    seen = (place[None] >= begin[:, None]) & (place[None] < slot)
    seen_new = (new[None] <= new[:, None])[None] & (slot + new[None] >= begin[:, None])[:, None]
    seen_new |= jnp.eye(T, dtype=bool)[None]
    seen = jnp.concatenate([jnp.broadcast_to(seen[:, None], (B, T, S)), seen_new], 2)

    qg = q.reshape(B, T, K, H // K, D)
    s_old = jnp.einsum("bksd,btkgd->bkgts", cache.k, qg, preferred_element_type=acc)
    s_new = jnp.einsum("bukd,btkgd->bkgtu", k, qg, preferred_element_type=acc)
    s = jnp.concatenate([s_old, s_new], 4) / math.sqrt(D)
    s = jnp.where(jnp.broadcast_to(seen[:, None, None], s.shape), s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    o = jnp.einsum("bkgts,bksd->btkgd", p[..., :S], cache.v, preferred_element_type=acc)
    o = o + jnp.einsum("bkgtu,bukd->btkgd", p[..., S:], v, preferred_element_type=acc)
    o = o.astype(q.dtype).reshape(q.shape)
    k, v = cpu_barrier(o, k), cpu_barrier(o, v)
    return o, LayerCache(
        *(
            lax.dynamic_update_slice_in_dim(c, x.transpose(0, 2, 1, 3), slot, 2)
            for c, x in zip(cache, (k, v), strict=True)
        )
    )
