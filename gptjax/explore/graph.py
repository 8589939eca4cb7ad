"""The network of any family as a graph of op calls, read from the traced program."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from gptjax.verify.trace import PLAIN, Call

Sources = frozenset[int]


class Pair(NamedTuple):
    """A forward call with the backward call that mirrors it."""

    forward: Call
    backward: Call


class Place(NamedTuple):
    """Where an op call stands in the diagram."""

    row: int
    """0 before the layers, i + 1 in layer i, and one more after the last layer."""
    column: int
    """The length of the longest chain of calls before it in its row."""
    sources: tuple[int, ...]
    """The calls whose results are its arguments, except arguments that are the residual stream."""
    reads_stream: bool
    """Whether an argument is the residual stream, the sum of all results added to it so far."""
    writes_stream: bool
    """Whether its result is added to the residual stream."""


def pairs_of(calls: Iterable[Call]) -> list[Pair]:
    """The forward calls in order, each with its backward call, found as the mirror of the forward.

    Calls that compute nothing are left out, such as dropout at rate 0. A backward call that mirrors
    no forward call ends the search.
    """
    waiting: list[Call] = []
    found: list[Pair] = []
    for call in calls:
        if not call.op.endswith("_bwd"):
            waiting.append(call)
        elif waiting and waiting[-1].base == call.base:
            found.append(Pair(waiting.pop(), call))
        else:
            break
    return [pair for pair in reversed(found) if pair.forward.jaxpr.jaxpr.eqns]


def arguments(f: Callable[..., Any], *args: Any) -> list[tuple[Sources, ...]]:
    """For each forward call of ``f(*args)``, in order: the calls on whose results each of its
    arguments depends. Arguments that depend on no call, such as weights, are left out.

    Calls that compute nothing pass their arguments' sources on, as do all operations between calls.
    """
    sources: dict[Any, Sources] = {}
    found: list[tuple[Sources, ...]] = []
    for eqn in jax.make_jaxpr(f)(*args).jaxpr.eqns:
        into = [sources[v] for v in eqn.invars if not isinstance(v, Literal) and sources.get(v)]
        name = str(eqn.params.get("name", "")) if eqn.primitive.name in ("jit", "pjit") else ""
        out: Sources = frozenset().union(*into)
        if (name.endswith("_fwd") or name in PLAIN) and eqn.params["jaxpr"].jaxpr.eqns:
            out = frozenset([len(found)])
            found.append(tuple(into))
        sources.update(dict.fromkeys(eqn.outvars, out))
    return found


def places_of(pairs: Sequence[Pair], arguments: Sequence[tuple[Sources, ...]]) -> list[Place]:
    """The place of each pair in the diagram.

    An argument that is a sum of several calls' results is the residual stream, and these calls
    write to it. An argument that depends only on such writers is the stream, too: the first layer
    reads the embedding before anything is added to it.
    """
    writers = frozenset().union(*(one for many in arguments for one in many if len(one) > 1))
    found: list[Place] = []
    for i, (pair, many) in enumerate(zip(pairs, arguments, strict=True)):
        layer = pair.forward.layer
        row = 0 if not found else found[-1].row
        if layer is not None:
            row = layer + 1
        elif row and pairs[i - 1].forward.layer is not None:
            row += 1
        # The embeddings depend on no call; they stand side by side.
        before = [found[s].column for one in many for s in one if found[s].row == row]
        before += [] if many else [one.column for one in found if one.row == row]
        direct = [s for one in many if not one <= writers for s in one]
        found.append(
            Place(
                row,
                max(before, default=-1) + 1,
                tuple(sorted(set(direct))),
                any(one <= writers for one in many),
                i in writers,
            )
        )
    return found
