"""Linear layer, with weights stored as (in, out), like GPT-2's Conv1D."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.xla.products import accumulation_dtype, contract, sum_of_outer_products


@jax.jit
def linear_fwd(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], b: Float[Array, "*O"] | None = None
) -> tuple[Float[Array, "B T *O"], Float[Array, "B T *I"]]:
    """``y = x w + b``, computed in x's dtype; without ``b``, ``y = x w``.

    Inputs and outputs may have several axes, which are flattened into one: w of shape (C, H, D)
    maps channels to heads; (H, D, C) maps heads to channels.

    Derivation of the backward, for one row: y_o = sum_i x_i w_io + b_o, so

        dx_i  = sum_o dy_o w_io      i.e. dx = dy w^T
        dw_io = x_i dy_o             summed over all rows: dw = x^T dy
        db_o  = dy_o                 summed over all rows

    Saved: x, for dw; dx needs only the weight.
    """
    xi, io, outputs = _flat(x), _matrix(w, x.ndim - 2), w.shape[x.ndim - 2 :]
    y = contract("bti,io->bto", xi, io.astype(x.dtype))
    if b is not None:
        y = y + jnp.broadcast_to(b.reshape(-1).astype(x.dtype), y.shape)
    return y.reshape(*x.shape[:2], *outputs), x


@jax.jit
def linear_bwd(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], dy: Float[Array, "B T *O"]
) -> tuple[Float[Array, "B T *I"], Float[Array, "..."], Float[Array, "*O"]]:
    """(dx, dw, db) of `linear_fwd`; dw and db are in `accumulation_dtype`."""
    io, do = _matrix(w, x.ndim - 2), _flat(dy)
    dx = contract("bto,io->bti", do, io.astype(dy.dtype)).reshape(x.shape)
    dw = sum_of_outer_products(_flat(x), do).reshape(w.shape)
    db = dy.astype(accumulation_dtype(dy)).sum((0, 1))
    return dx, dw, db


def _flat(x: Float[Array, "B T *I"]) -> Float[Array, "B T N"]:
    return x.reshape(*x.shape[:2], -1)


def _matrix(w: Float[Array, "..."], inputs: int) -> Float[Array, "I O"]:
    return w.reshape(math.prod(w.shape[:inputs]), -1)
