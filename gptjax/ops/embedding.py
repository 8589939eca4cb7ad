"""Rows of a table, looked up by id."""

import jax
from jaxtyping import Array, Float, Int


@jax.jit
def embedding_fwd(ids: Int[Array, "*ids"], table: Float[Array, "N C"]) -> Float[Array, "*ids C"]:
    """``y[i] = table[ids[i]]`` at each position i.

    Derivation of the backward: row n of the table is copied to every position with ids[i] = n, so
    its gradient is the sum of dy over those positions:

        dtable[n] = sum over i with ids[i] = n of dy[i]

    Saved: nothing but the ids. The caller must check that they lie inside the table.
    """
    return table[ids]


@jax.jit
def embedding_bwd(
    ids: Int[Array, "*ids"], dtable: Float[Array, "N C"], dy: Float[Array, "*ids C"]
) -> Float[Array, "N C"]:
    """Add the gradient of `embedding_fwd` to ``dtable``; duplicate ids accumulate.

    ``dtable`` is an argument because a tied table is also the classifier, whose gradient the
    backward computes first.
    """
    return dtable.at[ids].add(dy.astype(dtable.dtype))
