"""Decoding with a key-value cache, for any family, through the blocks that training uses.

All sequences of a batch end in the same slot of the cache: shorter ones are padded on the left, and
position = slot - padding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.models.family import family_of
from gptjax.models.params import head_of, is_stacked, is_weight, weight_table
from gptjax.models.transformer import over_layers
from gptjax.ops.attention import materialised_fwd
from gptjax.ops.kv_cache import LayerCache, cached_attention
from gptjax.ops.quantized import OutIn, product, quantize


@partial(jax.jit, static_argnames=("cfg", "int8"))
def store_for_decoding(params: Any, cfg: ModelConfig, int8: bool = False) -> Any:
    """Store the matrices as (out, in), which decoding reads fastest.

    Args:
        params: in the layout of ``cfg.layers``, which is preserved.
        cfg: resolved; matrices are stored in its compute dtype.
        int8: store 8 bits and one scale per output instead (`gptjax.ops.quantized.Quantized`).

    """

    def store(w: Array, inputs: int) -> Any:
        return quantize(w, inputs) if int8 else OutIn(w.astype(cfg.compute_dtype))

    def turn(weight: Any, w: Array) -> Any:
        if weight.kind != "matrix":
            return w
        first = w.ndim - len(weight.axes)  # the first input axis, after the layers'
        inputs = range(first, first + weight.inputs)
        return store(jnp.moveaxis(w, list(inputs), list(range(-weight.inputs, 0))), weight.inputs)

    table = weight_table(cfg, layered=False)
    turn_block = partial(jax.tree.map, turn, table.blocks, is_leaf=is_weight)
    blocks = (
        turn_block(params.blocks)
        if is_stacked(params.blocks)
        else tuple(map(turn_block, params.blocks))
    )
    return params._replace(
        blocks=blocks, **{family_of(cfg).head_name(cfg): store(head_of(params, cfg), 1)}
    )


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
