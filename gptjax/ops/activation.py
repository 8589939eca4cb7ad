"""GELU in GPT-2's tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415), and SwiGLU
(Shazeer 2020, arXiv:2002.05202).
"""

import math
from typing import NamedTuple

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


class SwiGLUSaved(NamedTuple):
    """What `swiglu_bwd` needs: both inputs."""

    gate: Float[Array, "B T F"]
    up: Float[Array, "B T F"]


@jax.jit
def swiglu_fwd(
    gate: Float[Array, "B T F"], up: Float[Array, "B T F"]
) -> tuple[Float[Array, "B T F"], SwiGLUSaved]:
    """``y = gate s up`` with ``s = 1 / (1 + e^-gate)``, the sigmoid: SiLU of the gate, times up.

    Derivation of the backward: s' = s (1 - s). By the product rule,

        dgate = dy up (s + gate s (1 - s))
        dup   = dy gate s

    Saved: gate and up; the backward recomputes s.
    """
    g, u = (x.astype(accumulation_dtype(x)) for x in (gate, up))
    return (g * jax.nn.sigmoid(g) * u).astype(gate.dtype), SwiGLUSaved(gate, up)


@jax.jit
def swiglu_bwd(
    saved: SwiGLUSaved, dy: Float[Array, "B T F"]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """(dgate, dup) of `swiglu_fwd`."""
    g, u, d = (x.astype(accumulation_dtype(x)) for x in (*saved, dy))
    s = jax.nn.sigmoid(g)
    dgate = d * u * (s + g * s * (1 - s))
    return dgate.astype(dy.dtype), (d * g * s).astype(dy.dtype)
