"""One layer's arrays, left among those of all layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class InStack(NamedTuple):
    """A layer's weight or cache, which kernels in C++ read where it lies.

    XLA would copy it out of the stack for them.
    """

    stack: Any
    """Its arrays for all layers, (L, ...)."""
    layer: Int[Array, ""]


def stack_of(x: Any) -> InStack:
    """x, or arrays of one layer as a stack of one."""
    if isinstance(x, InStack):
        return x
    return InStack(jax.tree.map(lambda a: a[None], x), jnp.int32(0))


def alone(x: Any) -> Any:
    """The arrays of one layer, taken out of the stack if they are in one."""
    if not isinstance(x, InStack):
        return x
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, x.layer, keepdims=False), x.stack)
