"""Decoding with a cache of keys and values, through the same block body that trains."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import block_fwd, over_layers
from gptjax.models.params import Params, split_layers
from gptjax.ops import contract, embedding_fwd, layernorm_fwd
from gptjax.ops.attention import materialised_fwd


class LayerCache(NamedTuple):
    """Keys and values of one layer's positions so far; the rest is not yet written."""

    k: Float[Array, "B S H D"]
    v: Float[Array, "B S H D"]


def init_cache(cfg: GPT2Config, batch_size: int, length: int) -> Any:
    """An empty cache for sequences of up to ``length`` positions: one `LayerCache` a layer, stacked for scanned layers."""
    zeros = jnp.zeros((batch_size, length, cfg.num_heads, cfg.channels // cfg.num_heads), cfg.compute_dtype)
    layers = [LayerCache(zeros, zeros)] * cfg.num_layers
    return layers if cfg.layers == "unroll" else jax.tree.map(lambda *x: jnp.stack(x), *layers)


def decode(
    params: Params, tokens: Int[Array, "B T"], cache: Any, start: Int[Array, ""], cfg: GPT2Config
) -> tuple[Float[Array, "B T V"], Any]:
    """Feed T more tokens at positions start..start+T-1; return their logits and the cache that includes them."""
    T = tokens.shape[1]
    S = jax.tree.leaves(cache)[0].shape[-3]
    positions = start + jnp.arange(T, dtype=jnp.int32)
    visible = jnp.arange(S, dtype=jnp.int32)[None, :] <= positions[:, None]
    x = embedding_fwd(tokens, positions, params.wte, params.wpe, cfg.compute_dtype)

    def body(x: Array, w_cache: Any) -> tuple[Array, LayerCache]:
        w, past = w_cache

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
            k = lax.dynamic_update_slice_in_dim(past.k, k, start, axis=1)
            v = lax.dynamic_update_slice_in_dim(past.v, v, start, axis=1)
            return materialised_fwd(q, k, v, visible=visible)[0], LayerCache(k, v)

        x, saved = block_fwd(w, x, cfg, attend, None)
        return x, saved.att

    x, cache = over_layers(body, x, (split_layers(params), cache), cfg)
    h, _ = layernorm_fwd(x, params.lnfw, params.lnfb)
    logits = contract("btc,vc->btv", h, params.wte.astype(h.dtype))  # the pad rows too: to leave them out copies the rest
    return logits[..., : cfg.vocab_size], cache
