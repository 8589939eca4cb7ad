"""When XLA computes what: how the backward decides what is stored and what is computed again."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from gptjax.sharding import parts


@jax.jit
def not_before(first: Any, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """x, available only once the arrays of ``first`` are.

    XLA merges equal expressions: what a backward means to compute again from x is otherwise taken from the forward and
    stored in between. `jax.lax.optimization_barrier` would prevent that too, but XLA's CPU compiler drops it. An infinity or
    NaN in the first place of an array of ``first`` makes all of x NaN. On a mesh that place is one device's, and telling the
    others takes time, so there it is the barrier.
    """
    if parts() > 1:
        return lax.optimization_barrier((first, x))[1]
    nothing = jnp.zeros((), x.dtype)
    for a in jax.tree.leaves(first):
        if a.size:
            nothing += (0 * a[(0,) * a.ndim]).astype(x.dtype)  # 0 times a number may be NaN, so it is not simplified away
    return x + nothing


def in_turn(first: Any, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """x, on CPU `not_before` ``first``: XLA's CPU scheduler leaves weight gradients for last, and their operands in memory."""
    return lax.platform_dependent(first, x, cpu=not_before, default=lambda first, x: x)
