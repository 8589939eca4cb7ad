"""Barriers: force XLA to compute some values before others."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from gptjax.parallel.sharding import num_shards


@jax.jit
def barrier(first: Any, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """``x``, available only after the arrays of ``first``.

    XLA merges equal expressions, so a value that the backward recomputes from x would otherwise be
    taken from the forward and kept in memory until then. `jax.lax.optimization_barrier` prevents
    that, too, but XLA's CPU compiler drops it. There, zeros that depend on ``first`` are added to
    x. An infinity or NaN in the first element of an array of ``first`` therefore makes all of x
    NaN. On a mesh, that element is on one device and would have to be sent, so JAX's barrier is
    used there, too.
    """
    if num_shards() > 1:
        return _barrier(first, x)
    return lax.platform_dependent(first, x, cpu=_add_zeros, default=_barrier)


def _barrier(first: Any, x: Array) -> Array:
    return lax.optimization_barrier((first, x))[1]


def _add_zeros(first: Any, x: Array) -> Array:
    nothing = jnp.zeros((), x.dtype)
    for a in jax.tree.leaves(first):
        if a.size:
            # XLA keeps the product, since 0 times a number may be NaN
            nothing += (0 * a[(0,) * a.ndim]).astype(x.dtype)
    return x + nothing


def cpu_barrier(first: Any, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """``x``, on CPU behind a `barrier` after ``first``.

    XLA's CPU scheduler computes weight gradients last and keeps their operands in memory until
    then.
    """
    return lax.platform_dependent(first, x, cpu=barrier, default=lambda first, x: x)


def barrier_except_tpu(first: Any, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """``x``, behind a `barrier` after ``first`` except on TPU.

    XLA's TPU compiler recomputes cheap values by itself. There, a barrier after a product would
    only keep it from computing, while it writes the product, what follows from it.
    """
    return lax.platform_dependent(first, x, tpu=lambda first, x: x, default=barrier)
