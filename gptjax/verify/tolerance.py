"""The largest error that rounding alone explains, derived from the program itself.

A product of n factors 1 + delta, the deltas independent with mean zero and at most the unit
roundoff u, is within LAMBDA sqrt(n) u of 1 with a probability of at least 1 - 2 exp(-LAMBDA^2 / 2),
to first order in u (Higham and Mary 2019, doi:10.1137/18M1226312, theorem 2.4). Each term of a sum
of n collects at most n such factors, and a gradient is a chain of sums, so the variances n u^2 of
all sums along the chain add up. `variances` propagates them through a jaxpr, from the inputs to the
outputs, and takes for each value the largest over all paths to it. `tolerance` is LAMBDA times the
root of the variance.

This models rounding; it is no bound. It ignores how much a step magnifies the relative error of its
input, but it has a margin: sums of n terms with mixed signs, or in several registers, round much
less. If the margin is not enough, `gptjax.verify.model.relaxed_tolerances` measures the
magnification.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

LAMBDA = 4.0
# Primitives that never round: they move, copy, compare or negate.
EXACT = frozenset(
    [
        "abs",
        "argmax",
        "argmin",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "iota",
        "max",
        "min",
        "name",
        "neg",
        "optimization_barrier",
        "pad",
        "random_bits",
        "random_fold_in",
        "random_seed",
        "random_split",
        "random_unwrap",
        "random_wrap",
        "reduce_max",
        "reduce_min",
        "reshape",
        "rev",
        "select_n",
        "sign",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
        "unstack",
    ]
)
BARRIER = "barrier"  # name of `gptjax.xla.barrier.barrier` in a jaxpr


def unit_roundoff(dtype: Any) -> float:
    """The unit roundoff u of a floating-point dtype, half the distance from 1 to the next number; 0
    for integers.
    """
    return float(jnp.finfo(dtype).eps) / 2 if jnp.issubdtype(dtype, jnp.floating) else 0.0


def tolerance(variance: float, reference_variance: float = 0.0) -> float:
    """The largest relative L2 distance between two results that their `variances` explain."""
    return LAMBDA * math.sqrt(variance + reference_variance)


def gradient_variances(f: Callable[..., Any], *args: Any) -> Any:
    """`variances` of ``f(*args)`` as a tree like its result. Nothing is computed, so arguments may
    be `jax.ShapeDtypeStruct`s.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    return jax.tree.unflatten(
        jax.tree.structure(shape), variances(closed, [0.0] * len(closed.in_avals))
    )


def variances(closed: ClosedJaxpr, inputs: list[float]) -> list[float]:
    """Relative error variance of each output of a jaxpr, from those of its inputs."""
    return _walk(closed.jaxpr, inputs)


def _walk(jaxpr: Jaxpr, inputs: list[float]) -> list[float]:
    known: dict[Any, float] = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        ins = [0.0 if isinstance(v, Literal) else known.get(v, 0.0) for v in eqn.invars]
        known.update(zip(eqn.outvars, _equation(eqn, ins), strict=True))
    return [0.0 if isinstance(v, Literal) else known.get(v, 0.0) for v in jaxpr.outvars]


def _equation(eqn: Any, ins: list[float]) -> list[float]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, ins)
    if name == "cond":
        branches = [_walk(branch.jaxpr, ins[1:]) for branch in params["branches"]]
        return [max(ways) for ways in zip(*branches, strict=True)]
    if name == "while":  # the number of iterations is unknown: count one
        skip = params["cond_nconsts"]
        return _walk(params["body_jaxpr"].jaxpr, ins[skip:])
    if params.get("name") == BARRIER and len(eqn.outvars) == 1:  # its derivative has two outputs
        return [ins[-1]]  # its last argument, plus zeros
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = params[key]
            return _walk(getattr(inner, "jaxpr", inner), ins)
    worst = max(ins, default=0.0)
    return [
        worst + _own_variance(eqn, v.aval) if hasattr(v.aval, "dtype") else worst
        for v in eqn.outvars
    ]


def _own_variance(eqn: Any, out: Any) -> float:
    """The variance n u^2 that one primitive adds: n terms in the dtype of the sum, and one rounding
    to a narrower result.
    """
    u = 0.0 if jax.dtypes.issubdtype(out.dtype, jax.dtypes.extended) else unit_roundoff(out.dtype)
    terms = _terms(eqn)
    if terms is None:
        return u * u  # elementwise: one rounding
    wide = min(u, unit_roundoff(jnp.float32))  # XLA sums 16-bit terms in float32
    return terms * wide * wide + (u * u if u > wide else 0.0)


def _terms(eqn: Any) -> int | None:
    """Number of roundings in the dtype of the sum for each element; None for an elementwise
    primitive, which rounds once in its own.
    """
    name = eqn.primitive.name
    first: Any = eqn.invars[0].aval if eqn.invars else None
    if name in EXACT:
        return 0
    if name == "convert_element_type":
        return 0 if unit_roundoff(eqn.outvars[0].aval.dtype) <= unit_roundoff(first.dtype) else None
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return math.prod(first.shape[axis] for axis in contracted)
    if name == "reduce_sum":
        return math.prod(first.shape[axis] for axis in eqn.params["axes"])
    if name in ("cumsum", "cumlogsumexp"):
        return first.shape[eqn.params["axis"]]
    if name == "scatter-add":  # at worst, all add to the same element
        return math.prod(eqn.invars[1].aval.shape[:-1])
    return None


def _scan(eqn: Any, ins: list[float]) -> list[float]:
    """Walk the body three times, then extrapolate: every further iteration adds as much as the last
    one did.
    """
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    # What is scanned has an axis more outside of the body; how to find it in params changes
    # between versions of JAX
    whole, carries = (
        sum(v.aval.ndim == inner.aval.ndim for v, inner in zip(outside, inside, strict=True))
        for outside, inside in ((eqn.invars, body.invars), (eqn.outvars, body.outvars))
    )
    consts = whole - carries
    carry, xs = ins[consts:whole], ins[whole:]
    out = _walk(body, [*ins[:consts], *carry, *xs])
    previous = out
    for _ in range(min(length, 3) - 1):
        previous, out = out, _walk(body, [*ins[:consts], *out[:carries], *xs])
    left = max(length - 3, 0)
    return [now + left * max(now - before, 0.0) for now, before in zip(out, previous, strict=True)]
