"""Token and position embedding."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int


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
    y = wte[tokens] + jnp.broadcast_to(wpe[positions], (*tokens.shape, wpe.shape[1]))
    return y.astype(dtype)


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
    dy = dy.astype(dwte.dtype)
    return dwte.at[tokens].add(dy), dwpe.at[positions].add(dy.sum(0))
