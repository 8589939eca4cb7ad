"""The one place that says in which precision a sum is accumulated."""

import jax.numpy as jnp
from jaxtyping import Array


def accumulation_dtype(x: Array) -> jnp.dtype:
    """float32 for 16-bit inputs, the input's own dtype otherwise: a sum never loses more than its terms did."""
    return jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype
