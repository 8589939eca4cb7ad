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
from gptjax.ops.quantized import BLOCK_KINDS, Blocks, OutIn, is_stored, product, quantize
from gptjax.ops.stacks import InStack, alone
from gptjax.xla import native

PART = 128  # tokens of a prompt that are read at a time


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


def reads_stacks(how: Storage, cfg: ModelConfig) -> bool:
    """True if kernels in C++ read a layer's weights, stored so, out of the stack of all layers.

    One layer's program, run L times, is then faster than that of L layers. XLA would copy the
    weights out of the stack first.
    """
    narrow = how == "bfloat16" and cfg.dtype == "float32"
    return (narrow or how in BLOCK_KINDS) and native.available("product")


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
        tokens: ids, each row's padding first; the padding's ids are ignored. They are read in parts
            of `PART` tokens, of which P is a multiple if it is larger.
        padding: length of each row's padding, less than P.
        slots: slots of the cache, at least P.
        cfg: resolved.

    """
    B, P = tokens.shape
    if P > PART and P % PART:
        raise ValueError(f"prompts of {P} tokens are no multiple of {PART}")
    parts = tokens.reshape(B, -1, min(P, PART))

    def read(i: Any, x_cache: Any) -> Any:
        x, cache = _read(params, parts[:, i], padding, x_cache[1], parts.shape[2] * i, cfg)
        return x[:, -1:], cache

    first = None, empty_cache(params, cfg, B, slots)
    if parts.shape[1] == 1:
        x, cache = read(jnp.int32(0), first)
    else:
        # A family without attention keeps no cache
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read, jnp.int32(0), first)
        )
        x, cache = lax.fori_loop(0, parts.shape[1], read, empty)
    return _logits(params, x, cfg)[:, 0], cache


def empty_cache(params: Any, cfg: ModelConfig, rows: int, slots: int) -> Any:
    """A cache of so many slots in which nothing is written yet.

    It is in the compute dtype; in float16 instead of float32 beside weights in blocks, which round
    more.
    """
    weights, dtype = jax.tree.leaves(params, is_leaf=is_stored), cfg.compute_dtype
    if dtype == jnp.float32 and any(isinstance(w, Blocks) for w in weights):
        dtype = jnp.dtype(jnp.float16)
    layers = (cfg.num_layers,) if cfg.layers == "scan" else ()
    shape = (*layers, rows, cfg.num_kv_heads, slots, cfg.head_dim)

    def empty() -> LayerCache:
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

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
    x, cache = _read(params, tokens, padding, cache, slot, cfg)
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


def _read(
    params: Any,
    tokens: Int[Array, "B T"],
    padding: Int[Array, " B"],
    cache: Any,
    slot: Any,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B T C"], Any]:
    """Hidden states, and each layer's updated cache."""
    family = family_of(cfg)
    new = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    # Those of padding and of fillers do not matter
    positions = jnp.clip(new[None] - padding[:, None], 0, cfg.max_seq_len - 1)
    x = family.embed_fwd(params, tokens, positions, cfg)

    def attend(past: Any, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        return cached_attention(q, k, v, past, slot, padding)

    @jax.jit  # traced once for all layers
    def block(x: Array, w_past: Any) -> tuple[Array, Any]:
        w, past = w_past
        x, saved = family.block_fwd(w, x, positions, cfg, partial(attend, past))
        return x, saved.att

    if cfg.layers == "unroll":
        return over_layers(block, x, (params.blocks, cache), cfg)

    def layer(i: Array, x_cache: Any) -> tuple[Array, Any]:
        x, cache = x_cache
        x, new = block(x, (_at(params.blocks, i), InStack(cache, i)))
        return x, cache if new is None else new  # a family without attention has no new one

    return lax.fori_loop(jnp.int32(0), jnp.int32(cfg.num_layers), layer, (x, cache))


def _at(blocks: Any, layer: Array) -> Any:
    """The weights of one layer; those stored for decoding stay in the stack."""
    return jax.tree.map(
        lambda w: InStack(w, layer) if is_stored(w) else alone(InStack(w, layer)),
        blocks,
        is_leaf=is_stored,
    )


def _logits(params: Any, x: Float[Array, "B T C"], cfg: ModelConfig) -> Float[Array, "B T V"]:
    """Logits of what follows each position."""
    h, _ = family_of(cfg).norm_fwd(params, x, cfg)
    # Pad rows are computed too: slicing the table would copy it.
    logits = product(h.reshape(-1, h.shape[-1]), head_of(params, cfg))
    return logits[:, : cfg.vocab_size].reshape(*h.shape[:2], -1)
