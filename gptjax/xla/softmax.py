"""Log-sum-exp with as few reads of the scores as the compiler allows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.xla.forms import form_of


def log_sum_exp(x: Float[Array, "N V"]) -> Float[Array, " N"]:
    """``log sum_v exp(x[n, v])``; a row of -inf gives the smallest finite number instead of -inf.

    CUDA makes one pass over x with a running maximum. XLA's CPU compiler vectorises only the
    two-pass form.
    """
    return lax.platform_dependent(x, cuda=_one_pass, default=_two_passes)


def _two_passes(x: Float[Array, "N V"]) -> Float[Array, " N"]:
    least = jnp.finfo(x.dtype)
    # The shift cancels, so no gradient flows through it
    peak = lax.stop_gradient(jnp.maximum(x.max(-1), least.min))
    return peak + jnp.log(jnp.maximum(jnp.exp(x - peak[:, None]).sum(-1), least.tiny))


@form_of(_two_passes)
def _one_pass(x: Float[Array, "N V"]) -> Float[Array, " N"]:
    """Reduce pairs of a peak and a sum of exponentials, in any order."""
    least = jnp.finfo(x.dtype)

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (peak_a, sum_a), (peak_b, sum_b) = a, b
        shrunk = jnp.exp(-jnp.abs(peak_a - peak_b))
        a_is_higher = peak_a > peak_b
        return (
            jnp.maximum(peak_a, peak_b),
            jnp.where(a_is_higher, sum_a, sum_a * shrunk)
            + jnp.where(a_is_higher, sum_b * shrunk, sum_b),
        )

    pairs = jnp.maximum(x, least.min), jnp.ones_like(x)
    none = jnp.asarray(least.min, x.dtype), jnp.zeros((), x.dtype)
    peak, total = lax.reduce(pairs, none, add, (1,))
    return peak + jnp.log(total)
