"""Find the first op, going backward from the loss, whose gradient differs from JAX's.

Jitted functions called ``OP_fwd`` and ``OP_bwd`` appear in the jaxpr of a hand-written gradient as
calls under their names. `record` runs the jaxpr and records the inputs and outputs of each call.
`cotangents` runs the plain forward, which makes the same ``OP_fwd`` calls, and has JAX
differentiate the loss with respect to the result of each. `first_mismatch` goes through the
recorded backward calls and finds the first one that receives a gradient other than JAX's, or whose
result differs from JAX's derivative of the forward call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

from gptjax.verify.comparison import compare, leaf_names
from gptjax.verify.tolerance import BARRIER

ADDS = ("embedding",)  # ops whose backward adds to gradients that it receives
PLAIN = ("attention",)  # ops that the plain forward calls without a suffix
# Primitives between a weight and an op that keep the weight's values, up to rounding
SAME = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}


class Call(NamedTuple):
    """One call of an op."""

    op: str
    place: str
    """Its place in the model, as in ``layer 3, linear (WEIGHT)``."""
    ins: list[Any]
    outs: list[Any]
    jaxpr: ClosedJaxpr
    weight: str = ""
    """The first weight that it uses; without any, the one used last."""
    layer: int | None = None
    """The layer of that weight."""

    @property
    def base(self) -> str:
        """The op's name without ``_fwd`` or ``_bwd``."""
        return self.op.removesuffix("_fwd").removesuffix("_bwd")


class Mismatch(NamedTuple):
    """Where the hand-written gradient first differs from JAX's."""

    place: str
    what: str
    error: float

    def __str__(self) -> str:
        """The mismatch in one line."""
        return f"{self.place}: {self.what} (relative L2 error {self.error:.1e})"


def record(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Call]]:
    """(``f(*args, **kwargs)``, its op calls in order). It can be traced by jit."""
    calls: list[Call] = []

    def append(call: Call) -> list[Any]:
        calls.append(call)
        return call.outs

    return run(f, *args, on_call=append, **kwargs), calls


def cotangents(loss: Callable[..., Any], *args: Any) -> list[Any]:
    """JAX's gradient of the scalar ``loss(*args)`` with respect to the first result of each op
    call, in order.
    """
    shapes = jax.eval_shape(lambda: [call.outs[0] for call in record(loss, *args)[1]])

    def tapped(taps: list[Any]) -> Any:
        left = iter(taps)
        return run(loss, *args, on_call=lambda call: [call.outs[0] + next(left), *call.outs[1:]])

    return jax.jit(jax.grad(tapped))([jnp.zeros(s.shape, s.dtype) for s in shapes])


def run(
    f: Callable[..., Any], *args: Any, on_call: Callable[[Call], list[Any]], **kwargs: Any
) -> Any:
    """Run ``f(*args, **kwargs)`` with every op call passed to ``on_call``, which returns the call's
    results. It can be traced by jit.

    The first argument holds the weights, whose names identify the calls.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args, **kwargs)
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, jax.tree.leaves((args, kwargs)), strict=True))
    weights: dict[Any, tuple[str, int | None]] = dict(
        zip(jaxpr.invars, leaf_names(args[0]), strict=False)
    )
    # The last weight used, which identifies ops without weights
    latest: tuple[str, int | None] = "", None
    for eqn in jaxpr.eqns:
        ins = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        outs = _evaluate(eqn, ins)
        op = str(eqn.params.get("name", "")) if eqn.primitive.name in ("jit", "pjit") else ""
        weights.update(_passed_on(eqn, op, weights))
        if op.endswith(("_fwd", "_bwd")) or op in PLAIN:
            used = [weights[v] for v in eqn.invars if not isinstance(v, Literal) and v in weights]
            latest = used[0] if used else latest
            outs = on_call(
                Call(op, _place(op, *latest, bool(used)), ins, outs, eqn.params["jaxpr"], *latest)
            )
        values.update(zip(eqn.outvars, outs, strict=True))
    flat = [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _evaluate(eqn: Any, ins: list[Any]) -> list[Any]:
    if eqn.primitive.name == "cond" and not isinstance(ins[0], jax.core.Tracer):
        # Compiled as a whole, it would be compiled anew for every program that is run
        return jaxpr_as_fun(eqn.params["branches"][int(ins[0])])(*ins[1:])
    outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _passed_on(eqn: Any, name: str, weights: dict[Any, Any]) -> dict[Any, Any]:
    """The outputs that are still a weight, after a cast, reshape, layout change or barrier, with
    the weight's name.
    """
    pairs: list[tuple[Any, Any]] = []
    if eqn.primitive.name in SAME:
        pairs = [(eqn.outvars[0], eqn.invars[0])]
    elif eqn.primitive.name == "optimization_barrier":
        pairs = list(zip(eqn.outvars, eqn.invars, strict=True))
    elif name == BARRIER:
        pairs = [(eqn.outvars[-1], eqn.invars[-1])]
    return {out: weights[v] for out, v in pairs if not isinstance(v, Literal) and v in weights}


def _place(op: str, weight: str, layer: int | None, used: bool) -> str:
    name = op.removesuffix("_fwd").removesuffix("_bwd")
    if weight:
        name += f" ({weight})" if used else f" (after {weight})"
    return name if layer is None else f"layer {layer}, {name}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What JAX makes of a plain forward ``loss(params, *rest)``, computed once it is asked for."""

    loss: Callable[..., Any]
    args: tuple[Any, ...]

    @functools.cached_property
    def calls(self) -> list[Call]:
        """The forward's op calls."""
        return record(self.loss, *self.args)[1]

    @functools.cached_property
    def cotangents(self) -> list[Any]:
        """`cotangents` of the loss."""
        return cotangents(self.loss, *self.args)

    @functools.cached_property
    def gradient(self) -> Any:
        """JAX's gradient of the loss."""
        return jax.jit(jax.grad(self.loss))(*self.args)


def first_mismatch(
    loss: Callable[..., Any],
    loss_and_grad: Callable[..., Any],
    params: Any,
    *rest: Any,
    largest: float,
) -> Mismatch | None:
    """Where the hand-written gradient first differs from JAX's gradient of ``loss``; None if it
    does not.

    Args:
        loss: the plain forward ``loss(params, *rest)``, without custom derivatives.
        loss_and_grad: ``loss_and_grad(params, *rest) -> (loss, gradient)``, with the same
            ``OP_fwd`` calls as ``loss``.
        params: first argument of both.
        rest: their other arguments.
        largest: largest relative L2 error that rounding explains.

    """
    (_, gradient), calls = record(loss_and_grad, params, *rest)
    return mismatch(gradient, calls, Reference(loss, (params, *rest)), largest)


def mismatch(
    gradient: Any, calls: Sequence[Call], reference: Reference, largest: float
) -> Mismatch | None:
    """`first_mismatch` of a computed gradient and its op calls."""
    waiting: list[tuple[Call, Any]] = []
    forward = [call for call in calls if not call.op.endswith("_bwd")]
    if [call.base for call in forward] == [call.base for call in reference.calls]:
        for ours, theirs in zip(forward, reference.calls, strict=True):
            error = _error([ours.outs[0]], [theirs.outs[0]])
            if not error <= largest:
                return Mismatch(
                    ours.place, f"{ours.op} gives a different value in the plain forward", error
                )
        received = iter(reference.cotangents)
    else:
        received = iter([None] * len(forward))
    for call in calls:
        if not call.op.endswith("_bwd"):
            waiting.append((call, next(received)))
            continue
        if not waiting or waiting[-1][0].base != call.base:
            due = waiting[-1][0].place if waiting else "nothing more"
            return Mismatch(
                call.place, f"{call.op} is called where the reversed forward has {due}", 1.0
            )
        found = _wrong_here(*waiting.pop(), call, largest)
        if found:
            return found
    worst = compare(gradient, reference.gradient, largest).worst
    if worst.ok:
        return None
    name = worst.tensor if worst.layer is None else f"{worst.tensor}[{worst.layer}]"
    named = any(call.op.endswith("_bwd") for call in calls)
    what = (
        "every op is right, but their results are combined wrongly"
        if named
        else "wrong, in an op that is not named (only pairs OP_fwd and OP_bwd under jax.jit are)"
    )
    return Mismatch(f"gradient of {name}", what, worst.relative_l2)


def _wrong_here(forward: Call, received: Any, backward: Call, largest: float) -> Mismatch | None:
    """The mismatch in one backward call: in the gradient that it receives or in its result."""
    dy = received_gradient(forward, backward)
    if dy is not None and received is not None:
        error = _error([dy], [received])
        if not error <= largest:
            return Mismatch(
                forward.place,
                f"{backward.op} receives a wrong gradient, though every op before it is right",
                error,
            )
    found, expected = given_and_due(forward, backward)
    shapes = [[x.shape for x in side] for side in (found, expected)]
    if shapes[0] != shapes[1]:
        return Mismatch(
            forward.place, f"{backward.op} returns shapes {shapes[0]}, not {shapes[1]}", 1.0
        )
    error = _error(found, expected)
    if error <= largest:
        return None
    return Mismatch(forward.place, f"{backward.op} gives a wrong gradient", error)


def received_gradient(forward: Call, backward: Call) -> Array | None:
    """The gradient of the forward call's result that the backward call receives; None where it
    receives none, since the result is the loss itself.
    """
    y, last = forward.outs[0], backward.ins[-1]
    return last if last.shape == y.shape and last.dtype == y.dtype else None


def given_and_due(forward: Call, backward: Call) -> tuple[list[Array], list[Array]]:
    """The gradients that a backward call gives, and those that JAX's derivative of the forward call
    gives of the same received gradient.
    """
    dy = received_gradient(forward, backward)
    due = _derivative(forward, jnp.ones_like(forward.outs[0]) if dy is None else dy)
    count = min(len(due), len(backward.outs))  # of the arguments that this call has
    if backward.base in ADDS:
        before = backward.ins[-1 - count : -1]
        due = [d + b for d, b in zip(due, before, strict=False)]
    return backward.outs[:count], due[:count]


def _derivative(forward: Call, dy: Array) -> list[Array]:
    """JAX's gradient of the call's first result with respect to each of its floating-point
    arguments.
    """
    return _vjp(forward.jaxpr, forward.ins, dy)


@partial(jax.jit, static_argnums=0)  # calls of an op at the same shapes share a jaxpr
def _vjp(jaxpr: ClosedJaxpr, ins: list[Any], dy: Array) -> list[Array]:
    at = [i for i, x in enumerate(ins) if jnp.issubdtype(x.dtype, jnp.floating)]

    def y(*floats: Array) -> Array:
        moved = dict(zip(at, floats, strict=True))
        return jaxpr_as_fun(jaxpr)(*(moved.get(i, x) for i, x in enumerate(ins)))[0]

    return list(jax.vjp(y, *(ins[i] for i in at))[1](dy))


def _error(ours: Sequence[Any], reference: Sequence[Any]) -> float:
    return compare(list(ours), list(reference), 1.0).worst.relative_l2
