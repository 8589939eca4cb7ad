"""Softmax cross-entropy over a padded vocabulary."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptjax.xla.products import accumulation_dtype
from gptjax.xla.softmax import log_sum_exp

IGNORE_INDEX = -1  # targets with this id do not count


def target_weights(
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"] | None = None,
    count: Float[Array, ""] | None = None,
) -> Float[Array, "B T"]:
    """The weight of each target in the mean loss: its mask divided by ``count``.

    The mask defaults to 1 and is 0 at `IGNORE_INDEX`. ``count`` defaults to the sum of the masks;
    a caller that splits a batch passes the full batch's count, so that the losses of the parts add
    up to the batch's. If no target counts, all weights and the loss are 0.
    """
    weights = jnp.ones(targets.shape) if mask is None else mask
    weights = jnp.where(targets == IGNORE_INDEX, jnp.zeros((), weights.dtype), weights)
    total = weights.sum() if count is None else count.astype(weights.dtype)
    return weights / jnp.where(total > 0, total, jnp.ones((), total.dtype))


class CrossEntropySaved(NamedTuple):
    """What `cross_entropy_bwd` needs: the arguments, and each row's lse over the other tokens and
    q = 1 - p of the target.
    """

    logits: Float[Array, "N Vp"]
    lse: Float[Array, " N"]
    q: Float[Array, " N"]
    targets: Int[Array, " N"]
    weights: Float[Array, " N"]


@partial(jax.jit, static_argnames="vocab_size")
def cross_entropy_fwd(
    logits: Float[Array, "N Vp"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    vocab_size: int,
) -> tuple[Float[Array, ""], CrossEntropySaved]:
    """``loss = -sum_n weights_n log p[n, targets_n]``, p the softmax over ``vocab_size`` logits.

    The remaining columns are padding. With lse = log sum_{v != t} exp(logits_v) over the other
    tokens, -log p_t = log(1 + exp(lse - logits_t)): the softplus of a difference, which stays
    accurate when p_t is nearly 1, where log p_t and p_t - 1 would cancel.

    Derivation of the backward: softplus' = sigmoid, so with q = sigmoid(lse - logits_t) = 1 - p_t

        dlogits[n, t] = -dloss weights_n q_n
        dlogits[n, v] = dloss weights_n q_n exp(logits[n, v] - lse_n),   0 in padding

    This is dloss weights_n (p - 1) at the target and dloss weights_n p elsewhere.

    Saved: the logits, from which one exponential gives each element, and two numbers per row.
    """
    x = _exclude_padding(logits.astype(accumulation_dtype(logits)), vocab_size)
    others = jnp.where(_is_target(x, targets), -jnp.inf, x)
    lse = log_sum_exp(others)
    # From the logits: to look up one number a row in x, XLA's TPU compiler stores x, in float32
    own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    odds = lse - jnp.where(targets < vocab_size, own.astype(x.dtype), -jnp.inf)
    weights = weights.astype(x.dtype)
    loss = (weights * jax.nn.softplus(odds)).sum()
    return loss, CrossEntropySaved(logits, lse, jax.nn.sigmoid(odds), targets, weights)


@partial(jax.jit, static_argnames="vocab_size")
def cross_entropy_bwd(
    saved: CrossEntropySaved, vocab_size: int, dloss: Float[Array, ""] | float = 1.0
) -> Float[Array, "N Vp"]:
    """``dlogits`` of `cross_entropy_fwd`."""
    logits, lse, q, targets, weights = saved
    x = _exclude_padding(logits.astype(lse.dtype), vocab_size)
    share = jnp.where(_is_target(x, targets), -jnp.ones((), x.dtype), jnp.exp(x - lse[:, None]))
    return (share * (dloss * weights * q)[:, None]).astype(logits.dtype)


def _is_target(x: Float[Array, "N Vp"], targets: Int[Array, " N"]) -> Bool[Array, "N Vp"]:
    return lax.broadcasted_iota(targets.dtype, x.shape, 1) == targets[:, None]


def _exclude_padding(x: Float[Array, "N Vp"], vocab_size: int) -> Float[Array, "N Vp"]:
    if x.shape[1] == vocab_size:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < vocab_size, x, -jnp.inf)
