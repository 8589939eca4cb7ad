"""Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450) and RMSNorm (Zhang and Sennrich
2019, arXiv:1910.07467).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.xla.moments import mean_and_variance
from gptjax.xla.products import accumulation_dtype

EPS = 1e-5  # GPT-2's


class LayerNormSaved(NamedTuple):
    """What `layernorm_bwd` needs: the input and each row's two statistics."""

    x: Float[Array, "B T C"]
    mean: Float[Array, "B T 1"]
    rstd: Float[Array, "B T 1"]


@jax.jit
def layernorm_fwd(
    x: Float[Array, "B T C"], w: Float[Array, " C"], b: Float[Array, " C"]
) -> tuple[Float[Array, "B T C"], LayerNormSaved]:
    """``y = n w + b``, ``n = (x - mean) rstd``, ``rstd = 1 / sqrt(var + EPS)`` over the channels.

    Derivation of the backward. Let dn = dy w. Moving x_j changes n_i directly, through the mean,
    and through rstd:

        ∂n_i/∂x_j = rstd (delta_ij - 1/C - n_i n_j / C)

    Summing dn_i over i with those weights:

        dx = rstd (dn - mean(dn) - n mean(dn n))
        dw = sum over rows of dy n,   db = sum over rows of dy

    Saved: x, mean and rstd, which give n in two operations per element. A residual network keeps x
    anyway.
    """
    xf = x.astype(accumulation_dtype(x))
    mean, variance = mean_and_variance(x)
    rstd = lax.rsqrt(variance + EPS)
    n = (xf - mean) * rstd
    y = n * jnp.broadcast_to(w.astype(n.dtype), n.shape) + jnp.broadcast_to(
        b.astype(n.dtype), n.shape
    )
    return y.astype(x.dtype), LayerNormSaved(x, mean, rstd)


@jax.jit
def layernorm_bwd(
    saved: LayerNormSaved, w: Float[Array, " C"], dy: Float[Array, "B T C"]
) -> tuple[Float[Array, "B T C"], Float[Array, " C"], Float[Array, " C"]]:
    """(dx, dw, db) of `layernorm_fwd`."""
    x, mean, rstd = saved
    n = (x.astype(mean.dtype) - mean) * rstd
    dyf = dy.astype(mean.dtype)
    dn = dyf * jnp.broadcast_to(w.astype(mean.dtype), dy.shape)
    dx = rstd * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (dyf * n).sum((0, 1)), dyf.sum((0, 1))


class RMSNormSaved(NamedTuple):
    """What `rmsnorm_bwd` needs: the input and each row's statistic."""

    x: Float[Array, "B T C"]
    rstd: Float[Array, "B T 1"]


@partial(jax.jit, static_argnames="eps")
def rmsnorm_fwd(
    x: Float[Array, "B T C"], w: Float[Array, " C"], eps: float = EPS
) -> tuple[Float[Array, "B T C"], RMSNormSaved]:
    """``y = n w``, ``n = x rstd``, ``rstd = 1 / sqrt(mean(x^2) + eps)`` over the channels.

    Derivation of the backward. Let dn = dy w. Moving x_j changes n_i directly and through rstd,
    whose derivative is -rstd^3 x_j / C:

        ∂n_i/∂x_j = rstd (delta_ij - n_i n_j / C)

    This is LayerNorm's without the mean. Summing dn_i over i with those weights:

        dx = rstd (dn - n mean(dn n))
        dw = sum over rows of dy n

    Saved: x and rstd, which give n in one product.
    """
    xf = x.astype(accumulation_dtype(x))
    rstd = lax.rsqrt(jnp.square(xf).mean(-1, keepdims=True) + eps)
    n = xf * rstd
    y = n * jnp.broadcast_to(w.astype(n.dtype), n.shape)
    return y.astype(x.dtype), RMSNormSaved(x, rstd)


@jax.jit
def rmsnorm_bwd(
    saved: RMSNormSaved, w: Float[Array, " C"], dy: Float[Array, "B T C"]
) -> tuple[Float[Array, "B T C"], Float[Array, " C"]]:
    """(dx, dw) of `rmsnorm_fwd`."""
    x, rstd = saved
    n = x.astype(rstd.dtype) * rstd
    dyf = dy.astype(rstd.dtype)
    dn = dyf * jnp.broadcast_to(w.astype(rstd.dtype), dy.shape)
    dx = rstd * (dn - n * (dn * n).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (dyf * n).sum((0, 1))
