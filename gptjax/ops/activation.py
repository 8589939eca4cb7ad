"""GELU in GPT-2's tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.xla.products import accumulation_dtype

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def gelu(x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """GELU alone, computed in x's dtype."""
    return x * (0.5 * (1 + jnp.tanh(SLOPE * (x + CUBIC * (x * x * x)))))


@jax.jit
def gelu_fwd(x: Float[Array, "B T F"]) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """``y = x (1 + t) / 2`` with ``t = tanh(u)`` and ``u = SLOPE (x + CUBIC x^3)``.

    Derivation of the backward: tanh' = 1 - t^2 and u' = SLOPE (1 + 3 CUBIC x^2). By the product
    rule,

        dx = dy [(1 + t) / 2 + x (1 - t^2) u' / 2]

    Saved: x; the backward recomputes t.
    """
    return gelu(x.astype(accumulation_dtype(x))).astype(x.dtype), x


@jax.jit
def gelu_bwd(x: Float[Array, "B T F"], dy: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """``dx`` of `gelu_fwd`."""
    xf = x.astype(accumulation_dtype(x))
    t = jnp.tanh(SLOPE * (xf + CUBIC * xf * xf * xf))
    du = SLOPE * (1 + 3 * CUBIC * xf * xf)
    slope = 0.5 * (1 + t) + 0.5 * xf * (1 - t * t) * du
    return (dy.astype(xf.dtype) * slope).astype(x.dtype)
