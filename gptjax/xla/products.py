"""Matrix products in the form that the compiler handles best: summation, rounding, layout."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.xla.barrier import barrier


def accumulation_dtype(x: Array) -> jnp.dtype:
    """float32 for 16-bit inputs, else the input's own dtype."""
    return jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype


def contract(subscripts: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays of one dtype, accumulated in `accumulation_dtype` and rounded
    once.

    XLA's CPU compiler has 16-bit kernels (AVX512-BF16) only for products with float32 results, so
    on CPU the rounding is a separate operation; elsewhere the product rounds. JAX differentiates
    the contraction into float32 products.
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
    """The sum for CPU, where XLA stores a transposed copy of the left operand: the narrower operand
    goes left.
    """
    (B, T, inputs), outputs = x.shape, dy.shape[2]
    if B * T * outputs + inputs * outputs >= x.size:
        return _sum_of_outer_products(barrier(dy, x), dy)
    dwt = _sum_of_outer_products(dy, x)
    # XLA would merge a bare transpose into the product, for which it has no 16-bit kernel
    return barrier(dy, dwt).T
