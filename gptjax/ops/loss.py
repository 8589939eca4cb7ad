"""Softmax cross-entropy over a padded vocabulary."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.ops.precision import accumulation_dtype

IGNORE_INDEX = -1  # a target with this id does not count


def target_weights(
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"] | None = None,
    count: Float[Array, ""] | None = None,
) -> Float[Array, "B T"]:
    """The weight of each target in the mean loss: its mask (1 without one; 0 at `IGNORE_INDEX`) over ``count``.

    ``count`` defaults to the sum of the masks. A caller that splits a batch passes the whole batch's, so that the
    pieces' losses add up to the batch's. Where nothing counts, all weights are 0 and so is the loss.
    """
    weights = jnp.ones(targets.shape) if mask is None else mask
    weights = jnp.where(targets == IGNORE_INDEX, jnp.zeros((), weights.dtype), weights)
    total = weights.sum() if count is None else count.astype(weights.dtype)
    return weights / jnp.where(total > 0, total, jnp.ones((), total.dtype))


class CrossEntropySaved(NamedTuple):
    """What `cross_entropy_bwd` needs: the arguments and each row's log-sum-exp."""

    logits: Float[Array, "N Vp"]
    lse: Float[Array, " N"]
    targets: Int[Array, " N"]
    weights: Float[Array, " N"]


@partial(jax.jit, static_argnames="vocab_size")
def cross_entropy_fwd(
    logits: Float[Array, "N Vp"], targets: Int[Array, " N"], weights: Float[Array, " N"], vocab_size: int
) -> tuple[Float[Array, ""], CrossEntropySaved]:
    """``loss = sum_n weights_n (lse_n - logits[n, targets_n])`` with ``lse_n = log sum_{v < vocab_size} exp(logits[n, v])``.

    Logits at and beyond ``vocab_size`` are padding and take no part.

    Derivation of the backward: d lse / d logits_v = exp(logits_v - lse) = p_v, the softmax, so

        dlogits[n, v] = dloss weights_n (p[n, v] - [v = targets_n]),   0 where v is padding

    Saved: the logits and lse, from which p is one exponential away.
    """
    x = _exclude_padding(logits.astype(accumulation_dtype(logits)), vocab_size)
    peak = lax.stop_gradient(x.max(-1, keepdims=True))  # the shift cancels, so no gradient flows through it
    lse = (peak + jnp.log(jnp.exp(x - peak).sum(-1, keepdims=True)))[:, 0]
    picked = jnp.take_along_axis(x, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    weights = weights.astype(x.dtype)
    loss = (weights * (lse - picked)).sum()
    return loss, CrossEntropySaved(logits, lse, targets, weights)


@partial(jax.jit, static_argnames="vocab_size")
def cross_entropy_bwd(saved: CrossEntropySaved, vocab_size: int, dloss: Float[Array, ""] | float = 1.0) -> Float[Array, "N Vp"]:
    """Dlogits of `cross_entropy_fwd`."""
    logits, lse, targets, weights = saved
    x = _exclude_padding(logits.astype(lse.dtype), vocab_size)
    columns = lax.broadcasted_iota(targets.dtype, x.shape, 1)
    p = jnp.exp(x - lse[:, None])
    dx = jnp.where(columns == targets[:, None], p - 1, p) * (dloss * weights)[:, None]
    return dx.astype(logits.dtype)


def _exclude_padding(x: Float[Array, "N Vp"], vocab_size: int) -> Float[Array, "N Vp"]:
    if x.shape[1] == vocab_size:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < vocab_size, x, -jnp.inf)
