"""Decoding with a cache of keys and values, through the same block body that trains.

The sequences of a batch end in the same slot of the cache and begin where their length puts them: shorter ones are padded
on the left, and position = slot - padding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import block_fwd, over_layers
from gptjax.models.params import Params, split_layers
from gptjax.ops import layernorm_fwd
from gptjax.ops.attention import materialised_fwd
from gptjax.ops.cached import LayerCache, cached_attention
from gptjax.ops.stored import OutIn, product, quantize, stored_linear, table_rows

LINEAR = ("qkvw", "attprojw", "fcw", "fcprojw")


@partial(jax.jit, static_argnames=("cfg", "int8"))
def store_for_decoding(params: Params, cfg: GPT2Config, int8: bool = False) -> Params:
    """The same parameters with every product's weights stored as decoding reads them fastest: (out, in).

    Args:
        params: in the layout of ``cfg.layers``, which stays.
        cfg: resolved; its compute dtype is what the weights are kept in.
        int8: in 8 bits instead, and one scale an output (`gptjax.ops.stored.Quantized`).

    """

    def store(w: Array) -> Any:
        return quantize(w) if int8 else OutIn(w.astype(cfg.compute_dtype))

    turned = {name: jax.tree.map(lambda w: store(jnp.swapaxes(w, -1, -2)), getattr(params, name)) for name in LINEAR}
    return params._replace(wte=store(params.wte), **turned)


def prefill(
    params: Params, tokens: Int[Array, "B P"], padding: Int[Array, " B"], slots: int, cfg: GPT2Config
) -> tuple[Float[Array, "B V"], Any]:
    """Read the prompts: what comes next, and a cache of ``slots`` >= P slots, of which the first P are written.

    Args:
        params: parameters, or what `store_for_decoding` makes of them.
        tokens: ids, each row's padding first; what it holds is never looked at.
        padding: of each row, less than P.
        slots: places in the cache.
        cfg: resolved.

    """
    P = tokens.shape[1]
    slot = jnp.arange(P, dtype=jnp.int32)
    visible = (slot[None, :] <= slot[:, None])[None] & (slot[None, None, :] >= padding[:, None, None])
    visible |= jnp.eye(P, dtype=bool)[None]  # so that the padding, too, sees something, and is a number

    def attend(past: None, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        o, _ = materialised_fwd(q, k, v, visible=visible[:, None])
        room = (0, 0), (0, 0), (0, slots - P), (0, 0)
        return o, LayerCache(*(jnp.pad(x.transpose(0, 2, 1, 3), room) for x in (k, v)))

    return _forward(params, tokens, jnp.maximum(slot[None] - padding[:, None], 0), None, attend, cfg)


def decode(
    params: Params, token: Int[Array, " B"], padding: Int[Array, " B"], cache: Any, slot: Int[Array, ""], cfg: GPT2Config
) -> tuple[Float[Array, "B V"], Any]:
    """Read one more token a row, in ``slot``: what comes next, and the cache that includes it."""
    slots = jax.tree.leaves(cache)[0].shape[-2]
    places = jnp.arange(slots, dtype=jnp.int32)[None]
    seen = (places >= padding[:, None]) & (places < slot)

    def attend(past: LayerCache, q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
        return cached_attention(q, k, v, past, slot, seen)

    return _forward(params, token[:, None], (slot - padding)[:, None], cache, attend, cfg)


def _forward(
    params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Any, attend: Any, cfg: GPT2Config
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after the last position, and each layer's cache as ``attend(past, q, k, v) -> (o, cache)`` leaves it."""
    x = table_rows(params.wte, tokens).astype(params.wpe.dtype) + params.wpe[positions]
    x = x.astype(cfg.compute_dtype)

    def body(x: Array, w_past: Any) -> tuple[Array, LayerCache]:
        w, past = w_past
        x, saved = block_fwd(w, x, cfg, partial(attend, past), None, stored_linear)
        return x, saved.att

    x, cache = over_layers(body, x, (split_layers(params), cache), cfg)
    h, _ = layernorm_fwd(x[:, -1:], params.lnfw, params.lnfb)
    logits = product(h[:, 0], params.wte)  # the pad rows too: to leave them out copies the rest
    return logits[:, : cfg.vocab_size], cache
