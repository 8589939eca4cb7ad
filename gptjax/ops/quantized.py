"""Linear layers whose weights are stored for decoding: (out, in), in a compute dtype or in 8 bits.

A token's products read every weight once and use it once, so they take as long as reading the
bytes.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from gptjax.xla.products import accumulation_dtype

LARGEST = 127  # of 8 bits with a sign; -128 is left unused, so that the range is symmetric


class OutIn(NamedTuple):
    """A weight with its output axes first, or a table of embeddings: one row an output."""

    w: Float[Array, "..."]


class Quantized(NamedTuple):
    """``w[o, i] = q[o, i] scale[o]``: 8 bits a weight, and one scale an output (absmax
    quantization, Dettmers et al. 2022).
    """

    q: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(w: Float[Array, "..."], inputs: int = 1) -> Quantized:
    """The nearest multiples of each row's largest magnitude / 127: no weight moves by more than
    half of that.

    Args:
        w: output axes first.
        inputs: how many of the last axes are inputs; a row is all of them.

    """
    w = w.astype(jnp.float32)
    largest = jnp.abs(w).max(tuple(range(-inputs, 0)))
    scale = jnp.where(largest == 0, 1, largest) / LARGEST
    return Quantized(
        jnp.round(w / jnp.expand_dims(scale, tuple(range(-inputs, 0)))).astype(jnp.int8), scale
    )


def table_rows(table: Any, ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of a table of embeddings: an array, `OutIn` or `Quantized`."""
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
    """``x w^T`` in x's dtype, of `OutIn` or `Quantized` weights, or of an array (out, in); several
    axes count as one.
    """
    if isinstance(w, Quantized):
        flat = Quantized(w.q.reshape(-1, x.shape[1]), w.scale.reshape(-1))
        return lax.platform_dependent(x, flat, cpu=_integer_product, default=_dequantized_product)
    w = (w.w if isinstance(w, OutIn) else w).reshape(-1, x.shape[1])
    # Weights first: XLA's CPU compiler then reads them as they lie.
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
    """The same by integers, for which XLA's CPU compiler has kernels, but from two rows on only.

    So each row of x becomes two of 8 bits, what is nearest and what is left: 15 bits, which add
    next to nothing to the error.
    """
    finest = 2 * LARGEST  # steps of the second row in one of the first
    rows = x.astype(jnp.float32)
    largest = jnp.abs(rows).max(-1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / LARGEST
    nearest = jnp.round(rows / scale)
    left = jnp.round((rows / scale - nearest) * finest)
    both = jnp.concatenate([nearest, left]).astype(jnp.int8)
    y = jnp.einsum("oi,mi->om", w.q, both, preferred_element_type=jnp.int32).astype(jnp.float32)
    y = (y[:, : len(x)] + y[:, len(x) :] / finest) * w.scale[:, None]
    return (y.T * scale).astype(x.dtype)
