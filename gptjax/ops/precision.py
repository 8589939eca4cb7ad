"""The one place that says in which precision a product is summed and rounded."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def accumulation_dtype(x: Array) -> jnp.dtype:
    """float32 for 16-bit inputs, the input's own dtype otherwise: a sum never loses more than its terms did."""
    return jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype


def contract(subscripts: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays of one dtype, summed in `accumulation_dtype` and rounded once, to theirs.

    XLA's CPU compiler has 16-bit kernels (AVX512-BF16, where there is) only for products that stay float32, so there the
    rounding is an operation of its own; elsewhere it is the product's. Only what is written with it gets those kernels: of
    JAX's derivative of it, the products are of float32.
    """

    def rounded_by_product(x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=x.dtype)

    def rounded_after(x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x)).astype(x.dtype)

    if accumulation_dtype(x) == x.dtype:
        return rounded_by_product(x, y)
    return lax.platform_dependent(x, y, cpu=rounded_after, default=rounded_by_product)
