"""Sampling of the next token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from gptjax.config import Sampler
from gptjax.xla.products import accumulation_dtype

BLOCK = 128  # neighbouring ids


def choose(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], sampler: Sampler
) -> Int[Array, " B"]:
    """The next id of each row, drawn with the row's key."""
    logits = logits.astype(accumulation_dtype(logits))
    if sampler.temperature == 0:
        return likeliest(logits)
    # Before dividing, or a low temperature magnifies the rounding of the largest
    below = logits - logits.max(-1, keepdims=True)
    return draw(keys, filtered(below / sampler.temperature, sampler))


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The id of each row with the largest logit, the first of equals; faster than argmax on CPU."""
    best = logits == logits.max(-1, keepdims=True)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    return jnp.where(best, ids[None], ids[-1]).min(-1)


def filtered(logits: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """The logits after top-k, top-p and min-p: -inf for the tokens that are left out."""
    if 0 < sampler.top_k < logits.shape[1]:
        p = jax.nn.softmax(logits, -1)
        least = _least_kept(_with_largest(p, sampler.top_k), jnp.ones_like, sampler.top_k)
        logits = jnp.where(p >= least[:, None], logits, -jnp.inf)
    if sampler.top_p < 1:
        p = jax.nn.softmax(logits, -1)
        least = _least_kept(_blocks(p, 0), lambda p: p, sampler.top_p)
        logits = jnp.where(p >= least[:, None], logits, -jnp.inf)
    if sampler.min_p > 0:
        least = logits.max(-1, keepdims=True) + math.log(sampler.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _with_largest(p: Float[Array, "B V"], k: int) -> Float[Array, "B N K"]:
    """Blocks that hold the k largest of each row: the k blocks whose largest are the largest."""
    blocks = _blocks(p, 0)
    if k >= blocks.shape[1]:
        return blocks
    best = lax.top_k(blocks.max(-1), k)[1]
    return jnp.take_along_axis(blocks, best[..., None], 1)


def _least_kept(
    p: Float[Array, "B N K"], weigh: Callable[[Array], Array], limit: float
) -> Float[Array, " B"]:
    """The least of a row's probabilities of which the larger ones together weigh less than
    ``limit``; ``weigh`` maps probabilities to weights.

    It is found by bisecting its bit pattern, which is ordered like the numbers: 31 passes over the
    probabilities. On CPU that takes a fortieth of the time of `jax.lax.top_k` with the 49,152 of
    SmolLM2.
    """
    integer = jnp.dtype(f"int{8 * p.dtype.itemsize}")
    bits, weights = lax.bitcast_convert_type(p, integer), weigh(p)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        # Over blocks first: XLA's CPU compiler is faster at many sums at once than at one
        above = jnp.where(bits > middle[:, None, None], weights, 0).sum(1).sum(1)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    high = bits.max((1, 2))
    least, _ = lax.fori_loop(0, jnp.iinfo(integer).bits - 1, halve, (jnp.zeros_like(high), high))
    return lax.bitcast_convert_type(least, p.dtype)


def _blocks(x: Array, fill: float) -> Array:
    """(B, V) -> (B, N, `BLOCK`), padded with ``fill``."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=fill).reshape(
        x.shape[0], -1, BLOCK
    )


def draw(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Draw an id for each row from softmax(logits): first a block of `BLOCK` ids, then one in it.

    For GPT-2's vocabulary that takes 521 random numbers instead of one for each of 50,257 ids.
    """

    def one(key: Key[Array, ""], row: Float[Array, "N K"]) -> Int[Array, ""]:
        block_key, id_key = jax.random.split(key)
        block = jax.random.categorical(block_key, jax.nn.logsumexp(row, -1))
        return (block * BLOCK + jax.random.categorical(id_key, row[block])).astype(jnp.int32)

    return jax.vmap(one)(keys, _blocks(logits, -jnp.inf))
