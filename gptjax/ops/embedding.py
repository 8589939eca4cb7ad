"""Token and position embedding."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from gptjax.sharding import as_kept, as_used, parts


@partial(jax.jit, static_argnames="dtype")
def embedding_fwd(
    tokens: Int[Array, "B T"],
    positions: Int[Array, " T"],
    wte: Float[Array, "Vp C"],
    wpe: Float[Array, "Tmax C"],
    dtype: DTypeLike,
) -> Float[Array, "B T C"]:
    """``y[b, t] = wte[tokens[b, t]] + wpe[positions[t]]``, in the compute ``dtype``.

    Derivation of the backward: row v of wte is added into every (b, t) with tokens[b, t] = v, so its gradient is the
    sum of dy over those places, and likewise for wpe:

        dwte[v] = sum over (b, t) with tokens[b, t] = v of dy[b, t]
        dwpe[p] = sum over b and the t with positions[t] = p of dy[b, t]

    Nothing is saved beyond the ids. Ids must lie inside the tables: this is checked where the ids are read, not here.
    """
    tokens = as_kept(tokens, "B", None)  # on a mesh ids go to where the table's columns are: rows of the table stay
    y = wte[tokens] + jnp.broadcast_to(wpe[positions], (*tokens.shape, wpe.shape[1]))
    return as_used(as_kept(y.astype(dtype), "B", None, "C"), "B", None, None)


@jax.jit
def embedding_bwd(
    tokens: Int[Array, "B T"],
    positions: Int[Array, " T"],
    dwte: Float[Array, "Vp C"],
    dwpe: Float[Array, "Tmax C"],
    dy: Float[Array, "B T C"],
) -> tuple[Float[Array, "Vp C"], Float[Array, "Tmax C"]]:
    """Add the gradients of `embedding_fwd` into (dwte, dwpe) and return them.

    They are added to, not made, because wte is also the classifier, whose gradient comes first in the backward.
    Duplicate ids accumulate.
    """
    tokens, dy = as_kept(tokens, "B", None), as_kept(dy, "B", None, "C")
    dy = dy.astype(dwte.dtype)
    if parts() > 1:
        return dwte + _sum_of_rows(tokens, dy, dwte), dwpe + as_kept(_sum_of_rows(positions, dy.sum(0), dwpe), None, "C")
    return dwte.at[tokens].add(dy), dwpe.at[positions].add(dy.sum(0))


def _sum_of_rows(at: Int[Array, "*batch"], dy: Float[Array, "*batch C"], like: Float[Array, "N C"]) -> Float[Array, "N C"]:
    """On a mesh each device adds its rows to zeros, so that what they all add up to is sent, once."""
    return jnp.zeros_like(like).at[at].add(dy)
