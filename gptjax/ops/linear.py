"""Linear layer, weights stored (in, out) as GPT-2's Conv1D does."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.ops.precision import accumulation_dtype, contract
from gptjax.ops.schedule import in_turn, not_before
from gptjax.sharding import UNCUT, Axes, as_kept, as_used, parts


@partial(jax.jit, static_argnames="axes")
def linear_fwd(
    x: Float[Array, "B T I"], w: Float[Array, "I O"], b: Float[Array, " O"], axes: Axes = UNCUT
) -> tuple[Float[Array, "B T O"], Float[Array, "B T I"]]:
    """``y = x w + b``, computed in x's dtype; ``axes`` are the logical axes of w, for a mesh (see `gptjax.sharding`).

    Derivation of the backward, for one row: y_o = sum_i x_i w_io + b_o, so

        dx_i  = sum_o dy_o w_io      i.e. dx = dy w^T
        dw_io = x_i dy_o             summed over all rows: dw = x^T dy
        db_o  = dy_o                 summed over all rows

    Saved: x, which dw needs; dx needs only the weight.
    """
    y = contract("bti,io->bto", x, as_used(w.astype(x.dtype), *axes))
    y = as_used(y, "B", None, axes[1])
    return y + jnp.broadcast_to(b.astype(x.dtype), y.shape), x


@partial(jax.jit, static_argnames="axes")
def linear_bwd(
    x: Float[Array, "B T I"], w: Float[Array, "I O"], dy: Float[Array, "B T O"], axes: Axes = UNCUT
) -> tuple[Float[Array, "B T I"], Float[Array, "I O"], Float[Array, " O"]]:
    """(dx, dw, db) of `linear_fwd`; dw and db are summed in `accumulation_dtype` and returned in w's dtype."""
    acc = accumulation_dtype(x)
    if parts("fsdp") > 1:  # else what the forward gathered is kept until here
        w = not_before(dy, w)
    dx = as_used(contract("bto,io->bti", dy, as_used(w.astype(dy.dtype), *axes)), "B", None, axes[0])
    dw = lax.platform_dependent(x, dy, cpu=_weight_gradient_on_cpu, default=_weight_gradient).astype(w.dtype)
    dw = as_kept(dw, *axes)
    db = dy.astype(acc).sum((0, 1)).astype(w.dtype)
    return in_turn((dw, db), dx), dw, db


def _weight_gradient(x: Float[Array, "B T I"], dy: Float[Array, "B T O"]) -> Float[Array, "I O"]:
    return jnp.einsum("bti,bto->io", x, dy, preferred_element_type=accumulation_dtype(x))


def _weight_gradient_on_cpu(x: Float[Array, "B T I"], dy: Float[Array, "B T O"]) -> Float[Array, "I O"]:
    """The same. XLA's CPU compiler writes the left side out transposed, so that is the narrower one, and not before dy is."""
    (B, T, inputs), outputs = x.shape, dy.shape[2]
    if B * T * outputs + inputs * outputs >= x.size:
        return _weight_gradient(not_before(dy, x), dy)
    dwt = jnp.einsum("bto,bti->oi", dy, x, preferred_element_type=accumulation_dtype(x))
    return not_before(dy, dwt).T  # XLA would merge a bare transpose with the product, and has no 16-bit kernel for that
