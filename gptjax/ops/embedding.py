"""Rows of a table, looked up by id."""

import jax
from jaxtyping import Array, Float, Int


@jax.jit
def embedding_fwd(ids: Int[Array, "*ids"], table: Float[Array, "N C"]) -> Float[Array, "*ids C"]:
    """``y[i] = table[ids[i]]`` at each position i.

    Derivation of the backward: row n of the table is copied to every position with ids[i] = n, so
    its gradient is the sum of dy over those positions:

        dtable[n] = sum over i with ids[i] = n of dy[i]

    Nothing is saved beyond the ids. Ids must lie inside the table: this is checked where the ids
    are read, not here.
    """
    return table[ids]


@jax.jit
def embedding_bwd(
    ids: Int[Array, "*ids"], dtable: Float[Array, "N C"], dy: Float[Array, "*ids C"]
) -> Float[Array, "N C"]:
    """``dtable``, with the gradient of `embedding_fwd` added; duplicate ids accumulate.

    It is added to, not made, because a tied table is also the classifier, whose gradient comes
    first in the backward.
    """
    return dtable.at[ids].add(dy.astype(dtable.dtype))
