"""Decoding with a key-value cache, for any family, through the blocks that training uses.

All sequences of a batch end in the same slot of the cache: shorter ones are padded on the left, and
position = slot - padding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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


@partial(jax.jit, static_argnames=("weight", "cfg", "how"))
def store(w: Array, weight: Weight, cfg: ModelConfig, how: Storage) -> Any:
    """Store one tensor: matrices and the tables of the vocabulary, which a classifier may be, as
    ``how`` says; others remain as they are.

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
    elif weight.axes[0] != "Vp":
        return w
    if how == "bfloat16" or (how == "as_stored" and w.dtype == jnp.bfloat16):
        return OutIn(w.astype(jnp.bfloat16))
    if how in ("float32", "as_stored"):
        return OutIn(w.astype(cfg.compute_dtype))
    round_layer = partial(quantize, kind=how, inputs=weight.inputs)
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

    return _forward(
        params, tokens, jnp.maximum(slot[None] - padding[:, None], 0), None, attend, cfg
    )


def decode(
    params: Any,
    token: Int[Array, " B"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Int[Array, ""],
    cfg: ModelConfig,
) -> tuple[Float[Array, "B V"], Any]:
    """Read one more token per row, in ``slot``: (logits of the next, the updated cache)."""

    def attend(past: LayerCache, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        places = jnp.arange(past.k.shape[-2], dtype=jnp.int32)[None]
        return cached_attention(q, k, v, past, slot, (places >= padding[:, None]) & (places < slot))

    return _forward(params, token[:, None], (slot - padding)[:, None], cache, attend, cfg)


def _forward(
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Any,
    attend: Any,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after the last position, and each layer's cache.

    ``attend(past, q, k, v) -> (o, cache)`` updates the cache.
    """
    family = family_of(cfg)
    x = family.embed_fwd(params, tokens, positions, cfg)

    def body(x: Array, w_past: Any) -> tuple[Array, Any]:
        w, past = w_past
        x, saved = family.block_fwd(w, x, positions, cfg, partial(attend, past))
        return x, saved.att

    x, cache = over_layers(body, x, (params.blocks, cache), cfg)
    h, _ = family.norm_fwd(params, x[:, -1:], cfg)
    # Pad rows are computed too: slicing the table would copy it.
    logits = product(h[:, 0], head_of(params, cfg))
    return logits[:, : cfg.vocab_size], cache
