"""Mean and variance with as few reads of the numbers as the compiler allows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.xla.forms import form_of
from gptjax.xla.products import accumulation_dtype


def mean_and_variance(
    x: Float[Array, "B T C"],
) -> tuple[Float[Array, "B T 1"], Float[Array, "B T 1"]]:
    """Over the channels, in `accumulation_dtype`; the variance is the mean square distance from the
    mean.

    Of 16-bit numbers CUDA makes one pass over x. Elsewhere, and where x itself has the precision of
    the sums, the distances are summed in a second pass.
    """
    xf = x.astype(accumulation_dtype(x))
    if xf.dtype == x.dtype:
        return _two_passes(xf)
    return lax.platform_dependent(xf, cuda=_one_pass, default=_two_passes)


def _two_passes(x: Float[Array, "B T C"]) -> tuple[Array, Array]:
    mean = x.mean(-1, keepdims=True)
    return mean, jnp.square(x - mean).mean(-1, keepdims=True)


@form_of(_two_passes)
def _one_pass(x: Float[Array, "B T C"]) -> tuple[Array, Array]:
    """``var = mean((x - c)^2) - (mean - c)^2`` with each row's first number for c.

    No number is further than sqrt(C - 1) standard deviations from its row's mean (Samuelson 1968),
    so the subtraction costs at most about a factor of C in relative precision, whatever x is. At
    worst, with the row's only outlier first, (x - mean) rstd moves in float32 by 5e-5 of its length
    at 768 channels and by 8e-4 at 12,288. bfloat16 has rounded x by up to 4e-3, float16 by 5e-4.
    """
    first = x[..., :1]
    distance = x - first
    mean = distance.mean(-1, keepdims=True)
    return first + mean, jnp.square(distance).mean(-1, keepdims=True) - jnp.square(mean)
