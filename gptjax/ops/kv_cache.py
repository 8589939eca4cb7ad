"""Attention of new positions over a cache of keys and values."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.ops.attention import Heads
from gptjax.ops.stacks import InStack, alone, stack_of
from gptjax.xla import native
from gptjax.xla.barrier import cpu_barrier
from gptjax.xla.products import accumulation_dtype

KeyHeads = Float[Array, "B T K D"]
CPP_DTYPES = (jnp.float32, jnp.float16)  # of a cache that C++ reads
FEW = 8  # new positions that one call of C++ attends to; of more, XLA multiplies matrices


class LayerCache(NamedTuple):
    """Keys and values of a layer, or of all L, in S slots, some not yet written.

    In the compute dtype, or, to read half as much, in float16 where that is float32.
    """

    k: Float[Array, "*L B K S D"]
    v: Float[Array, "*L B K S D"]


def cached_attention(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    cache: LayerCache | InStack,
    slot: Int[Array, ""],
    begin: Int[Array, " B"],
) -> tuple[Heads, LayerCache]:
    """Causal attention of T new positions to themselves and to the slots from ``begin`` up to
    ``slot``.

    Scores their own keys apart and writes the cache only after reading it. XLA then updates the
    cache in place instead of copying all of it for each token. Their keys and values are first
    rounded to the cache's dtype, as those that came before were.

    Args:
        q: queries (B, T, H, D) of the new positions.
        k: their keys (B, T, K, D).
        v: their values (B, T, K, D).
        cache: what came before, alone or among the caches of all layers.
        slot: where the first new position goes; there are at least T slots from there.
        begin: each row's first slot. New positions before it, which are padding, see only
            themselves.

    Returns:
        The output, and the cache, of all layers if it was among them, with the new keys and values
        in ``slot`` and the T - 1 after it.

    """
    caches, layer = stack_of(cache)
    k, v = (_as_cached(x, caches.k.dtype) for x in (k, v))
    arguments = q, k, v, caches, layer, slot, begin
    if q.shape[1] <= FEW and q.dtype == jnp.float32 and caches.k.dtype in CPP_DTYPES:
        o = native.on_cpu("attention", native.attention, _attend, *arguments)
    else:
        o = _attend(*arguments)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    k, v = cpu_barrier(o, k), cpu_barrier(o, v)
    at = list(map(jnp.int32, (layer, 0, 0, slot, 0)))
    new = LayerCache(
        *(lax.dynamic_update_slice(c, x[None], at) for c, x in zip(caches, (k, v), strict=True))
    )
    return o, new if isinstance(cache, InStack) else jax.tree.map(lambda x: x[0], new)


def _as_cached(x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Round to a cache's dtype. What is beyond its range becomes its largest number, unless it is
    infinite.
    """
    if dtype == x.dtype:
        return x
    largest = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(dtype)


def _attend(
    q: Heads, k: KeyHeads, v: KeyHeads, caches: LayerCache, layer: Any, slot: Any, begin: Array
) -> Heads:
    """The output of `cached_attention`, by XLA; see `gptjax.xla.native.attention`."""
    cache = jax.tree.map(lambda x: x.astype(q.dtype), alone(InStack(caches, layer)))
    acc, K = accumulation_dtype(q), k.shape[2]
    B, T, H, D = q.shape
    k, v = (x.astype(q.dtype).swapaxes(1, 2) for x in (k, v))
    q = q.reshape(B, T, K, H // K, D)
    rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)
    past = jnp.einsum("bksd,bkrd->bkrs", cache.k, rows, preferred_element_type=acc)
    new = jnp.einsum("bktd,bkrd->bkrt", k, rows, preferred_element_type=acc)
    S = cache.k.shape[2]
    place, t = jnp.arange(S, dtype=jnp.int32), jnp.arange(T, dtype=jnp.int32)
    visible = (place[None] >= begin[:, None]) & (place[None] < slot)
    causal = (t[None] <= t[:, None])[None] & (slot + t[None] >= begin[:, None])[:, None]
    causal = jnp.repeat(causal | jnp.eye(T, dtype=bool)[None], H // K, axis=1)
    past = jnp.where(jnp.broadcast_to(visible[:, None, None], past.shape), past, -jnp.inf)
    new = jnp.where(jnp.broadcast_to(causal[:, None], new.shape), new, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([past, new], -1) / math.sqrt(D), -1).astype(v.dtype)
    o = jnp.einsum("bkrs,bksd->bkrd", p[..., :S], cache.v, preferred_element_type=acc)
    o += jnp.einsum("bkrt,bktd->bkrd", p[..., S:], v, preferred_element_type=acc)
    o = o.astype(rows.dtype).reshape(B, K, T, -1, D)
    return o.transpose(0, 2, 1, 3, 4).reshape(B, T, H, D)
