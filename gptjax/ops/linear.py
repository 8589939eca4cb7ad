"""Linear layer, weights stored (in, out) as GPT-2's Conv1D does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.ops.precision import accumulation_dtype, contract
from gptjax.ops.schedule import in_turn


@jax.jit
def linear_fwd(
    x: Float[Array, "B T I"], w: Float[Array, "I O"], b: Float[Array, " O"]
) -> tuple[Float[Array, "B T O"], Float[Array, "B T I"]]:
    """``y = x w + b``, computed in x's dtype.

    Derivation of the backward, for one row: y_o = sum_i x_i w_io + b_o, so

        dx_i  = sum_o dy_o w_io      i.e. dx = dy w^T
        dw_io = x_i dy_o             summed over all rows: dw = x^T dy
        db_o  = dy_o                 summed over all rows

    Saved: x, which dw needs; dx needs only the weight.
    """
    y = contract("bti,io->bto", x, w.astype(x.dtype))
    return y + jnp.broadcast_to(b.astype(x.dtype), y.shape), x


@jax.jit
def linear_bwd(
    x: Float[Array, "B T I"], w: Float[Array, "I O"], dy: Float[Array, "B T O"]
) -> tuple[Float[Array, "B T I"], Float[Array, "I O"], Float[Array, " O"]]:
    """(dx, dw, db) of `linear_fwd`; dw and db are summed in `accumulation_dtype` and returned in w's dtype."""
    acc = accumulation_dtype(x)
    dx = contract("bto,io->bti", dy, w.astype(dy.dtype))
    if _better_transposed(x, w):
        dw = in_turn(dy, jnp.einsum("bto,bti->oi", dy, x, preferred_element_type=acc)).T
    else:
        dw = jnp.einsum("bti,bto->io", in_turn(dy, x), dy, preferred_element_type=acc)
    db = dy.astype(acc).sum((0, 1))
    dw, db = dw.astype(w.dtype), db.astype(w.dtype)
    return in_turn((dw, db), dx), dw, db


def _better_transposed(x: Float[Array, "B T I"], w: Float[Array, "I O"]) -> bool:
    """Whether dy^T x, and its transpose, move less than x^T dy: XLA's CPU compiler stores a left side that is transposed."""
    rows, outputs = x.shape[0] * x.shape[1], w.shape[1]
    return rows * outputs + w.size < x.size
