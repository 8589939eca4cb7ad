"""Decoding with a key-value cache, for any family, through the blocks that training uses.

All sequences of a batch end in the same slot of the cache: shorter ones are padded on the left, and
position = slot - padding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig, Storage
from gptjax.models.family import Weight, family_of
from gptjax.models.params import head_of, is_weight, per_tensor
from gptjax.models.transformer import over_layers
from gptjax.ops.attention import materialised_fwd
from gptjax.ops.kv_cache import LayerCache, cached_attention
from gptjax.ops.quantized import OutIn, product, quantize


def store_for_decoding(params: Any, cfg: ModelConfig, how: Storage = "as_stored") -> Any:
    """Store the matrices as (out, in), which decoding reads fastest; see `store`.

    Args:
        params: in the layout of ``cfg.layers``, which is preserved.
        cfg: resolved.
        how: to store them.

    """
    weights = per_tensor(lambda weight: weight, params, cfg)
    return jax.tree.map(
        lambda weight, w: store(w, weight, cfg, how), weights, params, is_leaf=is_weight
    )


def is_storable(weight: Weight) -> bool:
    """True for matrices and the tables of the vocabulary, one of which is the classifier."""
    return weight.kind == "matrix" or weight.axes[0] == "Vp"


@partial(jax.jit, static_argnames=("weight", "cfg", "how"))
def store(w: Array, weight: Weight, cfg: ModelConfig, how: Storage) -> Any:
    """Store one tensor as ``how`` says if it `is_storable`; others remain as they are.

    Args:
        w: the tensor, with the layers' axis in front if they are stacked.
        weight: its row in the family's table.
        cfg: resolved. Matrices in float32 are stored in its compute dtype.
        how: ``as_stored`` is bfloat16 for tensors that have it, which keeps every number, and
            float32 for others.

    """
    if weight.kind == "matrix":
        first = w.ndim - len(weight.axes)  # the first input axis, after the layers'
        inputs = range(first, first + weight.inputs)
        w = jnp.moveaxis(w, list(inputs), list(range(-weight.inputs, 0)))
    elif not is_storable(weight):
        return w
    if how == "bfloat16" or (how == "as_stored" and w.dtype == jnp.bfloat16):
        return OutIn(w.astype(jnp.bfloat16))
    if how in ("float32", "as_stored"):
        return OutIn(w.astype(cfg.compute_dtype))
    kind: Any = how
    round_layer = partial(quantize, kind=kind, inputs=weight.inputs)
    return jax.vmap(round_layer)(w) if w.ndim > len(weight.axes) else round_layer(w)


def prefill(
    params: Any, tokens: Int[Array, "B P"], padding: Int[Array, " B"], slots: int, cfg: ModelConfig
) -> tuple[Float[Array, "B V"], Any]:
    """Read the prompts: (logits of the next token, a cache with its first P slots written).

    Args:
        params: parameters, or the output of `store_for_decoding`.
        tokens: ids, each row's padding first; the padding's ids are ignored.
        padding: length of each row's padding, less than P.
        slots: slots of the cache, at least P.
        cfg: resolved.

    """
    P = tokens.shape[1]
    slot = jnp.arange(P, dtype=jnp.int32)
    visible = (slot[None, :] <= slot[:, None])[None] & (
        slot[None, None, :] >= padding[:, None, None]
    )
    # Padding sees itself: a softmax over nothing would be NaN.
    visible |= jnp.eye(P, dtype=bool)[None]

    def attend(past: None, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        o, _ = materialised_fwd(q, k, v, visible=visible)
        empty = (0, 0), (0, 0), (0, slots - P), (0, 0)
        return o, LayerCache(*(jnp.pad(x.transpose(0, 2, 1, 3), empty) for x in (k, v)))

    positions = jnp.maximum(slot[None] - padding[:, None], 0)
    x, cache = _forward(params, tokens, positions, None, attend, cfg)
    return _logits(params, x[:, -1:], cfg)[:, 0], cache


def empty_cache(cfg: ModelConfig, rows: int, slots: int) -> Any:
    """A cache of so many slots in which nothing is written yet."""
    layers = (cfg.num_layers,) if cfg.layers == "scan" else ()
    shape = (*layers, rows, cfg.num_kv_heads, slots, cfg.head_dim)

    def empty() -> LayerCache:
        return LayerCache(jnp.zeros(shape, cfg.compute_dtype), jnp.zeros(shape, cfg.compute_dtype))

    return empty() if layers else tuple(empty() for _ in range(cfg.num_layers))


def with_slots(cache: Any, slots: int) -> Any:
    """The cache with at least so many slots; the new ones come last."""

    def longer(x: Array) -> Array:
        more = max(0, slots - x.shape[-2])
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) if more else x

    return jax.tree.map(longer, cache)


def extend(
    params: Any,
    tokens: Int[Array, "B P"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Int[Array, ""],
    cfg: ModelConfig,
    only: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B _ V"], Any]:
    """Read P more tokens per row: (logits of what follows each, the updated cache).

    Tokens at the end may be there to fill up: what comes before does not see them, and what is
    read next in their slots replaces them.

    Args:
        params: parameters, or the output of `store_for_decoding`.
        tokens: ids.
        padding: length of each row's padding, before its first token.
        cache: of at least slot + P slots.
        slot: where the first of them goes.
        cfg: resolved.
        only: the one of the P whose logits are wanted, (B, 1, V); None: all of them.

    """

    def attend(past: LayerCache, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        places = jnp.arange(past.k.shape[-2], dtype=jnp.int32)[None]
        return cached_attention(q, k, v, past, slot, (places >= padding[:, None]) & (places < slot))

    new = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.minimum(new[None] - padding[:, None], cfg.max_seq_len - 1)  # of fillers
    x, cache = _forward(params, tokens, positions, cache, attend, cfg)
    if only is not None:
        x = lax.dynamic_slice_in_dim(x, only, 1, 1)
    return _logits(params, x, cfg), cache


def decode(
    params: Any,
    token: Int[Array, " B"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Int[Array, ""],
    cfg: ModelConfig,
) -> tuple[Float[Array, "B V"], Any]:
    """Read one more token per row, in ``slot``: (logits of the next, the updated cache)."""
    logits, cache = extend(params, token[:, None], padding, cache, slot, cfg)
    return logits[:, 0], cache


def _forward(
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Any,
    attend: Any,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B T C"], Any]:
    """Hidden states, and each layer's cache.

    ``attend(past, q, k, v) -> (o, cache)`` updates the cache.
    """
    family = family_of(cfg)
    x = family.embed_fwd(params, tokens, positions, cfg)

    def body(x: Array, w_past: Any) -> tuple[Array, Any]:
        w, past = w_past
        x, saved = family.block_fwd(w, x, positions, cfg, partial(attend, past))
        return x, saved.att

    return over_layers(body, x, (params.blocks, cache), cfg)


def _logits(params: Any, x: Float[Array, "B T C"], cfg: ModelConfig) -> Float[Array, "B T V"]:
    """Logits of what follows each position."""
    h, _ = family_of(cfg).norm_fwd(params, x, cfg)
    # Pad rows are computed too: slicing the table would copy it.
    logits = product(h.reshape(-1, h.shape[-1]), head_of(params, cfg))
    return logits[:, : cfg.vocab_size].reshape(*h.shape[:2], -1)
