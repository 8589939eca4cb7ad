"""Inverted dropout (Srivastava et al. 2014), with the random key as an argument."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from gptjax.xla.random import bernoulli


@partial(jax.jit, static_argnames="rate")
def dropout_fwd(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"] | None]:
    """``y = x keep / (1 - rate)``, ``keep`` being 1 with probability 1 - rate and otherwise 0.

    With ``key=None`` (evaluation) or ``rate=0`` this is the identity and nothing is saved.

    Derivation of the backward: the map is linear and diagonal in x, so ``dx = dy keep / (1 -
    rate)``.

    Saved: keep, one byte per element, so that the random bits are drawn only once.

    Raises:
        ValueError: the rate is outside [0, 1).

    """
    if not 0 <= rate < 1:
        raise ValueError(f"the dropout rate must be in [0, 1), not {rate}")
    if key is None or rate == 0:
        return x, None
    keep = bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x * (1 / (1 - rate)), jnp.zeros((), x.dtype)), keep


@partial(jax.jit, static_argnames="rate")
def dropout_bwd(
    keep: Bool[Array, "*shape"] | None, rate: float, dy: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``dx`` of `dropout_fwd`."""
    if keep is None:
        return dy
    return jnp.where(keep, dy * (1 / (1 - rate)), jnp.zeros((), dy.dtype))
