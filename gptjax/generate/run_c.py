"""The sampler of llama2.c's run.c: its random numbers, and its way to draw with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config import Sampler
from gptjax.generate.sampling import likeliest

MASK = 2**64 - 1


def coins(seed: int, count: int) -> np.ndarray:
    """(count,) float32 in [0, 1): xorshift64* (Vigna 2016) from the state ``seed``.

    Raises:
        ValueError: the seed is 0, from which all numbers are 0.

    """
    if seed % 2**64 == 0:
        raise ValueError("xorshift64* needs a seed other than 0")
    state, numbers = seed & MASK, np.empty(count, np.uint32)
    for i in range(count):
        state ^= state >> 12
        state ^= state << 25 & MASK
        state ^= state >> 27
        numbers[i] = (state * 0x2545F4914F6CDD1D & MASK) >> 32
    return (numbers >> 8).astype(np.float32) / np.float32(2**24)


def choose(
    coin: Float[Array, " B"], logits: Float[Array, "B V"], sampler: Sampler
) -> Int[Array, " B"]:
    """The first id of each row whose cumulative probability exceeds the coin; the likeliest at
    temperature 0.

    With ``top_p`` below 1, the ids are first sorted by their probability, without those below
    ``(1 - top_p) / (V - 1)``, and kept up to the one with which their sum exceeds ``top_p``; the
    coin is of that sum.
    """
    if sampler.temperature == 0:
        return likeliest(logits)
    p = jax.nn.softmax(logits.astype(jnp.float32) / sampler.temperature, -1)
    V = p.shape[1]
    if sampler.top_p >= 1:
        sums = jnp.cumsum(p, -1)
        return _first(sums > coin[:, None], V - 1).astype(jnp.int32)
    # The likeliest stays even where none reaches the cut-off, from which run.c reads past its array
    least = jnp.minimum((1 - sampler.top_p) / max(1, V - 1), p.max(-1, keepdims=True))
    likely = jnp.where(p >= least, p, 0)
    ids = jnp.argsort(-likely, axis=-1, stable=True)
    sums = jnp.cumsum(jnp.take_along_axis(likely, ids, -1), -1)
    last = _first(sums > sampler.top_p, (likely > 0).sum(-1) - 1)
    total = jnp.take_along_axis(sums, last[:, None], -1)
    place = jnp.minimum(_first(sums > coin[:, None] * total, last), last)
    return jnp.take_along_axis(ids, place[:, None], -1)[:, 0].astype(jnp.int32)


def _first(true: Array, otherwise: Array | int) -> Array:
    """The first place of each row that is true, else ``otherwise``."""
    return jnp.where(true.any(-1), true.argmax(-1), otherwise)
