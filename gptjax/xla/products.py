"""Matrix products in the form that the compiler handles best: summation, rounding, layout."""

import math
from functools import partial
from typing import Any

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


def affine(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], b: Float[Array, "*O"] | None = None
) -> Float[Array, "B T *O"]:
    """``y = x w + b`` for each row, of arrays of one dtype; without ``b``, ``y = x w``.

    Here and in the two products below, inputs and outputs may each be several axes, such as heads
    and their channels. A TPU multiplies them as they are; to flatten heads there is to copy them.
    Elsewhere they become one axis: cuBLASLt adds a bias in the product's own shape alone.
    """
    inputs = x.ndim - 2

    def of_rows(x: Array, w: Array, b: Array | None) -> Array:
        y = _affine(_rows(x), _matrix(w, inputs), None if b is None else b.reshape(-1))
        return y.reshape(*x.shape[:2], *w.shape[inputs:])

    return lax.platform_dependent(x, w, b, tpu=_affine, default=of_rows)


def _affine(x: Array, w: Array, b: Array | None = None) -> Array:
    i, o = _axes(w, x.ndim - 2)
    y = contract(f"bt{i},{i}{o}->bt{o}", x, w)
    return y if b is None else y + jnp.broadcast_to(b, y.shape)


def times_transpose(dy: Float[Array, "B T *O"], w: Float[Array, "..."]) -> Float[Array, "B T *I"]:
    """``dx = dy w^T`` for each row, of arrays of one dtype: the gradient of `affine`'s input."""
    inputs = w.ndim - (dy.ndim - 2)

    def of_rows(dy: Array, w: Array) -> Array:
        dx = _times_transpose(_rows(dy), _matrix(w, inputs))
        return dx.reshape(*dy.shape[:2], *w.shape[:inputs])

    return lax.platform_dependent(dy, w, tpu=_times_transpose, default=of_rows)


def _times_transpose(dy: Array, w: Array) -> Array:
    i, o = _axes(w, w.ndim - (dy.ndim - 2))
    return contract(f"bt{o},{i}{o}->bt{i}", dy, w)


def sum_of_outer_products(
    x: Float[Array, "B T *I"], dy: Float[Array, "B T *O"]
) -> Float[Array, "..."]:
    """``dw = sum over b, t of x[b, t]^T dy[b, t]`` in `accumulation_dtype`: the gradient of
    `affine`'s weight.
    """

    def of_rows(x: Array, dy: Array, product: Any) -> Array:
        return product(_rows(x), _rows(dy)).reshape(*x.shape[2:], *dy.shape[2:])

    return lax.platform_dependent(
        x,
        dy,
        cpu=partial(of_rows, product=_sum_of_outer_products_on_cpu),
        tpu=_sum_of_outer_products,
        default=partial(of_rows, product=_sum_of_outer_products),
    )


def _sum_of_outer_products(
    x: Float[Array, "B T *I"], dy: Float[Array, "B T *O"]
) -> Float[Array, "..."]:
    i, o = INPUTS[: x.ndim - 2], OUTPUTS[: dy.ndim - 2]
    return jnp.einsum(f"bt{i},bt{o}->{i}{o}", x, dy, preferred_element_type=accumulation_dtype(x))


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


def _rows(x: Float[Array, "B T *I"]) -> Float[Array, "B T N"]:
    return x.reshape(*x.shape[:2], -1)


def _matrix(w: Float[Array, "..."], inputs: int) -> Float[Array, "I O"]:
    return w.reshape(math.prod(w.shape[:inputs]), -1)


INPUTS, OUTPUTS = "ijk", "opq"  # letters of einsum


def _axes(w: Float[Array, "..."], inputs: int) -> tuple[str, str]:
    """The letters of a weight's inputs and of its outputs."""
    return INPUTS[:inputs], OUTPUTS[: w.ndim - inputs]
