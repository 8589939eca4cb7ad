"""Linear layer, with weights stored as (in, out), like GPT-2's Conv1D."""

import jax
from jaxtyping import Array, Float

from gptjax.xla.products import (
    accumulation_dtype,
    affine,
    sum_of_outer_products,
    times_transpose,
)


@jax.jit
def linear_fwd(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], b: Float[Array, "*O"] | None = None
) -> tuple[Float[Array, "B T *O"], Float[Array, "B T *I"]]:
    """``y = x w + b``, computed in x's dtype; without ``b``, ``y = x w``.

    Inputs and outputs may have several axes, which count as one: w of shape (C, H, D) maps channels
    to heads; (H, D, C) maps heads to channels.

    Derivation of the backward, for one row: y_o = sum_i x_i w_io + b_o, so

        dx_i  = sum_o dy_o w_io      i.e. dx = dy w^T
        dw_io = x_i dy_o             summed over all rows: dw = x^T dy
        db_o  = dy_o                 summed over all rows

    Saved: x, for dw; dx needs only the weight.
    """
    return affine(x, w.astype(x.dtype), None if b is None else b.astype(x.dtype)), x


@jax.jit
def linear_bwd(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], dy: Float[Array, "B T *O"]
) -> tuple[Float[Array, "B T *I"], Float[Array, "..."], Float[Array, "*O"]]:
    """(dx, dw, db) of `linear_fwd`; dw and db are in `accumulation_dtype`."""
    dx = times_transpose(dy, w.astype(dy.dtype))
    dw = sum_of_outer_products(x, dy)
    db = dy.astype(accumulation_dtype(dy)).sum((0, 1))
    return dx, dw, db
