"""The norm of a tree of arrays, in the form that the compiler handles best."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from gptjax.parallel.sharding import num_shards

SMALL = 1 << 15  # elements of an array that is not summed by itself


def global_norm(tree: Any) -> Float[Array, ""]:
    """The L2 norm of all elements.

    On CUDA, XLA sums each array by itself, in two kernels if it is large. On one device, a matrix
    there is summed to rows instead, and the rows of all matrices and all vectors in one sum.
    """
    if num_shards() > 1:
        return optax.tree.norm(tree)
    return lax.platform_dependent(tree, cuda=_in_one_sum, default=optax.tree.norm)


def _in_one_sum(tree: Any) -> Float[Array, ""]:
    squares = [jnp.square(x) for x in jax.tree.leaves(tree)]
    parts = [x.ravel() if x.size <= SMALL else x.reshape(len(x), -1).sum(-1) for x in squares]
    # XLA would make a sum for each part again
    return jnp.sqrt(lax.optimization_barrier(jnp.concatenate(parts)).sum())
