"""Linear layers with weights stored for decoding: (out, in), in a compute dtype or in 8 bits.

Decoding a token reads every weight once and uses it once, so memory bandwidth sets its time.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from gptjax.xla.products import accumulation_dtype

LARGEST = 127  # of signed 8 bits; -128 stays unused to make the range symmetric


class OutIn(NamedTuple):
    """A weight with its output axes first, or an embedding table: one row per output."""

    w: Float[Array, "..."]


class Quantized(NamedTuple):
    """``w[o, i] = q[o, i] scale[o]``: 8 bits per weight and one scale per output.

    This is absmax quantization (Dettmers et al. 2022).
    """

    q: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(w: Float[Array, "..."], inputs: int = 1) -> Quantized:
    """Round each row to multiples of its largest magnitude / 127.

    No weight moves by more than half such a step.

    Args:
        w: output axes first.
        inputs: number of trailing input axes, which together form a row.

    """
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(tuple(range(-inputs, 0)))
    scale = jnp.where(largest == 0, 1, largest) / LARGEST
    return Quantized(
        jnp.round(w / jnp.expand_dims(scale, tuple(range(-inputs, 0)))).astype(jnp.int8), scale
    )


def table_rows(table: Any, ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of an embedding table, which is an array, `OutIn` or `Quantized`."""
    if isinstance(table, Quantized):
        return table.q[ids].astype(jnp.float32) * table.scale[ids][..., None]
    return (table.w if isinstance(table, OutIn) else table)[ids]


def quantized_linear(
    x: Float[Array, "B T *I"], w: Any, b: Float[Array, "*O"] | None = None
) -> tuple[Float[Array, "B T *O"], Any]:
    """`gptjax.ops.linear.linear_fwd` with `OutIn` or `Quantized` weights; nothing is saved."""
    outputs = w[0].shape[: w[0].ndim - (x.ndim - 2)]
    rows = x.reshape(-1, math.prod(x.shape[2:]))
    y = product(rows, w).reshape(*x.shape[:2], *outputs)
    return (y if b is None else y + jnp.broadcast_to(b.astype(x.dtype), y.shape)), None


def product(x: Float[Array, "M I"], w: Any) -> Float[Array, "M O"]:
    """``x w^T`` in x's dtype; w is `OutIn`, `Quantized` or an (out, in) array.

    Several output or input axes are flattened into one.
    """
    if isinstance(w, Quantized):
        flat = Quantized(w.q.reshape(-1, x.shape[1]), w.scale.reshape(-1))
        return lax.platform_dependent(x, flat, cpu=_integer_product, default=_dequantized_product)
    w = (w.w if isinstance(w, OutIn) else w).reshape(-1, x.shape[1])
    # With the weights first, XLA's CPU compiler reads them in memory order.
    return (
        jnp.einsum("oi,mi->om", w.astype(x.dtype), x, preferred_element_type=accumulation_dtype(x))
        .astype(x.dtype)
        .T
    )


def _dequantized_product(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    y = jnp.einsum(
        "mi,oi->mo", x, w.q.astype(x.dtype), preferred_element_type=accumulation_dtype(x)
    )
    return (y * w.scale[None].astype(y.dtype)).astype(x.dtype)


def _integer_product(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    """The product in integers, for which XLA's CPU compiler has kernels of two rows or more.

    Each row of x becomes two rows of 8 bits, its rounded value and the remainder: 15 bits, which
    add almost nothing to the error.
    """
    finest = 2 * LARGEST  # steps of the remainder in one step of the rounded value
    rows = x.astype(jnp.float32)
    largest = jnp.abs(rows).max(-1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / LARGEST
    nearest = jnp.round(rows / scale)
    left = jnp.round((rows / scale - nearest) * finest)
    both = jnp.concatenate([nearest, left]).astype(jnp.int8)
    y = jnp.einsum("oi,mi->om", w.q, both, preferred_element_type=jnp.int32).astype(jnp.float32)
    y = (y[:, : len(x)] + y[:, len(x) :] / finest) * w.scale[:, None]
    return (y.T * scale).astype(x.dtype)
