"""How products are summed, rounded and laid out for the compiler."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.xla.barrier import barrier


def accumulation_dtype(x: Array) -> jnp.dtype:
    """float32 for 16-bit inputs, the input's own dtype otherwise: a sum never loses more than its
    terms did.
    """
    return jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype


def contract(subscripts: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays of one dtype, summed in `accumulation_dtype` and rounded once to
    theirs.

    XLA's CPU compiler has 16-bit kernels (AVX512-BF16) only for products that stay float32, so
    there the rounding is an operation of its own; elsewhere it is the product's. JAX's derivative
    of a contraction is made of float32 products.
    """

    def rounded_by_product(x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=x.dtype)

    def rounded_after(x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x)).astype(
            x.dtype
        )

    if accumulation_dtype(x) == x.dtype:
        return rounded_by_product(x, y)
    return lax.platform_dependent(x, y, cpu=rounded_after, default=rounded_by_product)


def sum_of_outer_products(
    x: Float[Array, "B T I"], dy: Float[Array, "B T O"]
) -> Float[Array, "I O"]:
    """``sum over b, t of x[b, t] dy[b, t]^T`` in `accumulation_dtype`: the gradient of a weight."""
    return lax.platform_dependent(
        x, dy, cpu=_sum_of_outer_products_on_cpu, default=_sum_of_outer_products
    )


def _sum_of_outer_products(
    x: Float[Array, "B T I"], dy: Float[Array, "B T O"]
) -> Float[Array, "I O"]:
    return jnp.einsum("bti,bto->io", x, dy, preferred_element_type=accumulation_dtype(x))


def _sum_of_outer_products_on_cpu(
    x: Float[Array, "B T I"], dy: Float[Array, "B T O"]
) -> Float[Array, "I O"]:
    """The same; XLA's CPU compiler stores the left operand transposed, so that is the narrower one,
    once dy is there.
    """
    (B, T, inputs), outputs = x.shape, dy.shape[2]
    if B * T * outputs + inputs * outputs >= x.size:
        return _sum_of_outer_products(barrier(dy, x), dy)
    dwt = _sum_of_outer_products(dy, x)
    # XLA would merge a bare transpose with the product, and has no 16-bit kernel for that
    return barrier(dy, dwt).T
