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
from gptjax.ops.kv_cache import LayerCache, cached_attention
from gptjax.ops.quantized import OutIn, product, quantize

CHUNK = 128  # tokens of a prompt that are read at a time


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
    round_layer = partial(quantize, kind=how, inputs=weight.inputs)
    return jax.vmap(round_layer)(w) if w.ndim > len(weight.axes) else round_layer(w)


def prefill(
    params: Any, tokens: Int[Array, "B P"], padding: Int[Array, " B"], slots: int, cfg: ModelConfig
) -> tuple[Float[Array, "B V"], Any]:
    """Read the prompts: (logits of the next token, a cache with its first P slots written).

    Args:
        params: parameters, or the output of `store_for_decoding`.
        tokens: ids, each row's padding first; the padding's ids are ignored. P is at most `CHUNK`
            or a multiple of it, and is read in such parts.
        padding: length of each row's padding, less than P.
        slots: slots of the cache, at least P.
        cfg: resolved.

    """
    P = tokens.shape[1]
    if P % CHUNK and P > CHUNK:
        raise ValueError(f"prompts of {P} tokens are no multiple of {CHUNK}")

    def read(tokens: Array, cache: Any, slot: Any) -> tuple[Array, Any]:
        h, cache = _forward(params, tokens, padding, cache, slot, slots, cfg)
        return h[:, -1], cache

    if P <= CHUNK:
        last, cache = read(tokens, None, jnp.int32(0))
    else:
        chunks = tokens.reshape(len(tokens), -1, CHUNK)
        shapes = jax.eval_shape(read, chunks[:, 0], None, jnp.int32(0))
        last, cache = lax.fori_loop(
            0,
            P // CHUNK,
            lambda i, x: read(chunks[:, i], x[1], CHUNK * i),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        )
    return _logits(params, last[:, None], cfg)[:, 0], cache


def decode(
    params: Any,
    tokens: Int[Array, "B T"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Int[Array, ""],
    cfg: ModelConfig,
) -> tuple[Float[Array, "B T V"], Any]:
    """Read T more tokens per row, into the slots from ``slot``: (logits after each, the cache)."""
    h, cache = _forward(params, tokens, padding, cache, slot, 0, cfg)
    return _logits(params, h, cfg), cache


def _forward(
    params: Any,
    tokens: Int[Array, "B T"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Any,
    slots: int,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B T C"], Any]:
    """(output of the final norm, each layer's cache); without a cache one of ``slots`` is made."""
    family = family_of(cfg)
    place = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.maximum(place[None] - padding[:, None], 0)
    x = family.embed_fwd(params, tokens, positions, cfg)

    def attend(past: LayerCache | None, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        if past is None:
            empty = jnp.zeros((k.shape[0], k.shape[2], slots, k.shape[3]), k.dtype)
            past = LayerCache(empty, empty)
        return cached_attention(q, k, v, past, slot, padding)

    def body(x: Array, w_past: Any) -> tuple[Array, Any]:
        w, past = w_past
        x, saved = family.block_fwd(w, x, positions, cfg, partial(attend, past))
        return x, saved.att

    x, cache = over_layers(body, x, (params.blocks, cache), cfg)
    return family.norm_fwd(params, x, cfg)[0], cache


def _logits(params: Any, h: Float[Array, "B T C"], cfg: ModelConfig) -> Float[Array, "B T V"]:
    # Pad rows are computed too: slicing the table would copy it.
    scores = product(h.reshape(-1, h.shape[2]), head_of(params, cfg))
    return scores.reshape(*h.shape[:2], -1)[..., : cfg.vocab_size]
