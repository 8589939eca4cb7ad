"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.xla.products import accumulation_dtype


@partial(jax.jit, static_argnames="theta")
def rotary_fwd(
    x: Float[Array, "B T H D"], positions: Int[Array, "*B T"], theta: float
) -> Float[Array, "B T H D"]:
    """Rotate each pair (x_i, x_{i + D/2}) of a head by the angle ``position theta^(-2i/D)``.

        y_i       = x_i cos a - x_{i + D/2} sin a
        y_{i+D/2} = x_i sin a + x_{i + D/2} cos a

    The product of a query, rotated by a, and a key, rotated by b, depends on a - b alone, and so on
    their distance. The two of a pair are D/2 apart, as in Hugging Face's Llama; llama2.c and GGUF
    rotate neighbours instead, which is the same function after a permutation of the weights.

    Derivation of the backward: y = R x with an orthogonal R, so dx = R^T dy, the rotation by the
    opposite angle.

    Saved: nothing; the angles follow from the positions.

    Args:
        x: queries or keys; D is even.
        positions: (T), or (B, T) with a row for each sequence.
        theta: base of the wavelengths, which grow from 2 pi to almost 2 pi theta.

    """
    return _rotate(x, positions, theta, 1)


@partial(jax.jit, static_argnames="theta")
def rotary_bwd(
    positions: Int[Array, "*B T"], theta: float, dy: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """``dx`` of `rotary_fwd`: the rotation the other way."""
    return _rotate(dy, positions, theta, -1)


def _rotate(
    x: Float[Array, "B T H D"], positions: Int[Array, "*B T"], theta: float, sign: int
) -> Float[Array, "B T H D"]:
    acc, half = accumulation_dtype(x), x.shape[3] // 2
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), acc)
    shape = (*positions.shape, half)
    angles = jnp.broadcast_to(positions[..., None].astype(acc), shape) * jnp.broadcast_to(
        frequencies, shape
    )
    cos, sin = (
        jnp.broadcast_to(y[..., None, :], (*x.shape[:3], half))
        for y in (jnp.cos(angles), sign * jnp.sin(angles))
    )
    a, b = x[..., :half].astype(acc), x[..., half:].astype(acc)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
