"""Derivatives from function values: Richardson-extrapolated central differences in float64.

The error of a central difference (f(x + h d) - f(x - h d)) / 2h is a series in even powers of h.
Combining the differences at h, h/2, h/4... removes one power after another (Richardson 1911).
Neighbouring entries of the resulting triangle estimate its error (Ridders 1982).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from gptjax.verify.comparison import leaf_names
from gptjax.verify.rows import Comparison, Row
from gptjax.verify.tolerance import LAMBDA, unit_roundoff

STEP = 0.1  # the first h, relative to the tensor's root mean square
LEVELS = 6  # values of h, each half of the one before; two evaluations of f each
RANDOM_DIRECTIONS = 3
RANDOM = "random direction"
TOLERANCE = unit_roundoff(jnp.float64) ** 0.5
"""The best accuracy of a one-sided difference, 1.1e-8, which extrapolation must beat."""


class Derivative(NamedTuple):
    """A derivative and the estimate of its absolute error."""

    value: Any
    error: Any


def extrapolate(differences: Sequence[Any]) -> Derivative:
    """Extrapolate central differences at h, h/2, h/4..., arrays of one shape, element by
    element.
    """
    row = [np.asarray(d, np.float64) for d in differences]
    best, least = row[0], np.full_like(row[0], np.inf)
    power = 1.0
    while len(row) > 1:
        power *= 4
        finer = [(power * b - a) / (power - 1) for a, b in itertools.pairwise(row)]
        for new, a, b in zip(finer, row, row[1:], strict=False):
            error = np.maximum(abs(new - a), abs(new - b))
            best, least = np.where(error <= least, new, best), np.minimum(error, least)
        row = finer
    return Derivative(best, least)


def directional(f: Callable[[Any], Any], x: Any, direction: Any) -> Derivative:
    """The derivative of a scalar ``f`` at the pytree ``x`` along ``direction``, a tree like ``x``
    in which None means zero.
    """

    def at(h: float) -> float:
        tree: Any = jax.tree.structure(x)
        leaves = jax.tree.leaves(x)
        moved = [
            p if d is None else _moved(p, d, h)
            for p, d in zip(leaves, tree.flatten_up_to(direction), strict=True)
        ]
        return float(f(tree.unflatten(moved)))

    steps = [STEP / 2**level for level in range(LEVELS)]
    return Derivative(*map(float, extrapolate([(at(h) - at(-h)) / (2 * h) for h in steps])))


@jax.jit
def _moved(x: Array, direction: Array, h: float) -> Array:
    return x + h * direction


def elementwise(f: Callable[..., Any], args: Sequence[Array], dy: Array) -> list[Array]:
    """The derivative of ``<f(*args), dy>`` with respect to each element of each argument; for small
    arguments of one dtype.
    """
    flat, unravel = ravel_pytree(list(args))

    @jax.jit
    def differences(h: float) -> Array:
        def along(direction: Array) -> Array:
            forth, back = (
                jnp.vdot(f(*unravel(flat + sign * h * direction)), dy) for sign in (1, -1)
            )
            return (forth - back) / (2 * h)

        return jax.vmap(along)(jnp.eye(flat.size, dtype=flat.dtype))

    steps = [STEP / 2**level for level in range(LEVELS)]
    return unravel(jnp.asarray(extrapolate([differences(h) for h in steps]).value))


def check_directions(
    f: Callable[[Any], Any],
    x: Any,
    gradient: Any,
    layers: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare ``<gradient, d>`` with differences of ``f`` along random directions d, first over all
    tensors, then over each.

    Args:
        f: scalar function of a float64 pytree.
        x: the point of the derivative.
        gradient: a pytree like ``x``.
        layers: use a direction for each leaf instead of one for each tensor.
        seed: seed of the directions.
        tolerance: largest relative error; raised to `LAMBDA` times the estimated error of the
            difference.

    Returns:
        A row for each direction. ``norm`` is the size of the derivative. ``relative_l2`` is the
        error relative to it, or to the root mean square of derivatives along such directions if
        that is larger, since one may be near zero by chance. A tensor whose gradient is zero up to
        rounding is judged by the root mean square over all tensors.

    """
    tree: Any = jax.tree.structure(x)
    leaves, gradients = jax.tree.leaves(x), tree.flatten_up_to(gradient)
    groups: dict[tuple[str, int | None], list[int]] = {}
    for i, (tensor, layer) in enumerate(leaf_names(x)):
        groups.setdefault((tensor, layer if layers else None), []).append(i)
    groups = {
        (f"{RANDOM} {n + 1}", None): list(range(len(leaves))) for n in range(RANDOM_DIRECTIONS)
    } | groups
    generator = np.random.default_rng(seed)
    sizes = [float(jnp.sqrt(jnp.mean(jnp.square(x)))) or 1.0 for x in leaves]
    slopes = [
        size * float(jnp.linalg.norm(g.ravel())) for size, g in zip(sizes, gradients, strict=True)
    ]
    unit = max(unit_roundoff(g.dtype) for g in gradients)
    rows = []
    for (tensor, layer), members in groups.items():
        direction: list[Any] = [None] * len(leaves)
        for i in members:
            direction[i] = sizes[i] * generator.standard_normal(leaves[i].shape)
        typical = math.hypot(*(slopes[i] for i in members))
        if typical <= unit * math.hypot(*slopes):
            typical = math.hypot(*slopes)
        expected = sum(
            float(jnp.vdot(gradients[i].astype(jnp.float64), direction[i])) for i in members
        )
        found, doubt = directional(f, x, tree.unflatten(direction))
        scale = max(abs(found), typical)
        error = abs(expected - found) / scale if scale else abs(expected - found)
        shape = leaves[members[0]].shape
        if tensor.startswith(RANDOM):
            shape = (sum(leaf.size for leaf in leaves),)
        elif len(members) > 1:
            shape = (len(members), *shape)
        allowed = max(tolerance, LAMBDA * doubt / (scale or 1.0))
        rows.append(Row(tensor, layer, shape, abs(found), error, None, None, None, None, allowed))
    return Comparison(tuple(rows), tuple(rows))
