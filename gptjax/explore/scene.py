"""Everything that the page shows, computed by the package's own code: the activations and gradients
of each op on a text, their errors against JAX's, and the effect of each planted error.
"""

import difflib
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.explore.faults import Fault, faults_of, planted
from gptjax.explore.graph import Pair, Place, arguments, pairs_of, places_of
from gptjax.explore.lessons import (
    argument_names,
    block_lesson,
    classifier_lesson,
    lesson_of,
    source_of,
)
from gptjax.explore.pictures import picture
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.verify.comparison import compare
from gptjax.verify.rows import Comparison, quotient
from gptjax.verify.tolerance import gradient_variances, tolerance
from gptjax.verify.trace import (
    Mismatch,
    Reference,
    given_and_due,
    mismatch,
    received_gradient,
    record,
)

CLASSIFIER = "classifier"
CONTEXT = 2  # lines around a change
LEAST, MOST = -20.0, 4.0  # bounds of errors' logarithms: JSON has neither infinity nor NaN


class Traced(NamedTuple):
    """One forward and backward of the network, call by call."""

    loss: Any
    gradient: Any
    calls: list[Any]
    pairs: list[Pair]


def scene(cfg: ModelConfig, params: Any, batch: Batch) -> dict[str, Any]:
    """All that the page shows of a model on a text, ready for JSON.

    Args:
        cfg: resolved, with unrolled layers, nothing recomputed and attention materialised.
        params: in cfg's dtype, the layers in a tuple.
        batch: one sequence of (1, T) inputs and targets.

    """
    plain = partial(transformer.loss, cfg=cfg)
    reference = Reference(plain, (params, batch))
    variance = max(
        jax.tree.leaves(
            gradient_variances(partial(transformer.loss_and_grad, cfg=cfg), params, batch)
        )
    )
    largest = tolerance(variance, variance)
    right = traced(cfg, params, batch)
    found = compare(right.gradient, reference.gradient, largest)
    places = places_of(right.pairs, arguments(plain, params, batch))
    due = cotangents_of(reference)
    nodes = [
        node(i, pair, place, received, largest)
        for i, (pair, place, received) in enumerate(zip(right.pairs, places, due, strict=True))
    ]
    nodes = with_classifier(nodes, right.pairs, due)
    ops = list(dict.fromkeys(pair.forward.base for pair in right.pairs))
    lessons = {op: lesson_of(op)._asdict() for op in ops}
    lessons |= {
        CLASSIFIER: classifier_lesson()._asdict(),
        "block": block_lesson(cfg)._asdict(),
    }
    faults = [
        damage(fault, cfg, params, batch, reference, due, largest) for fault in faults_of(cfg, ops)
    ]
    changed = [fault for fault in faults if fault["error"] > largest]
    return {
        "loss": float(right.loss),
        "tolerance": largest,
        "nodes": nodes,
        "blocks": blocks(right.pairs, places, due),
        "lessons": lessons,
        "tensors": tensors(found),
        "token_losses": token_losses(right.pairs[-1], cfg.vocab_size),
        "faults": changed,
        "verdict": said(mismatch(right.gradient, right.calls, reference, largest)),
    }


def traced(cfg: ModelConfig, params: Any, batch: Batch) -> Traced:
    """Run the hand-written gradient as the package has it now."""
    (loss, gradient), calls = record(
        # A new function each time, since JAX would reuse the trace of the previous one
        lambda params, batch: transformer.loss_and_grad(params, batch, cfg),
        params,
        batch,
    )
    return Traced(loss, gradient, calls, pairs_of(calls))


def cotangents_of(reference: Reference) -> list[Any]:
    """JAX's gradient of the result of each forward call that computes something."""
    calls = zip(reference.calls, reference.cotangents, strict=True)
    return [cotangent for call, cotangent in calls if call.jaxpr.jaxpr.eqns]


# --- The ops ---


def node(i: int, pair: Pair, place: Place, due: Any, largest: float) -> dict[str, Any]:
    """One op call: its place, its inputs and outputs, and the errors of its gradients."""
    forward, backward = pair
    names = argument_names(forward.base)
    dy = received_gradient(forward, backward)
    given, expected = given_and_due(forward, backward)
    floats = [
        name
        for (name, _), x in zip(names, forward.ins, strict=False)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    errors = [
        (f"d{name}", row.relative_l2)
        for name, row in zip(floats, compare(given, expected, largest).rows, strict=False)
    ]
    received = None if dy is None else relative_error(dy, due)
    results = [(f"d{name}", x) for name, x in zip(floats, given, strict=False)]
    return {
        "id": str(i),
        "op": forward.base,
        "name": forward.place,
        "weight": forward.weight if f"({forward.weight})" in forward.place else "",
        "layer": forward.layer,
        **place._asdict(),
        "sources": [str(source) for source in place.sources],
        "arguments": [
            {"name": name, "axes": axes, "shape": list(x.shape)}
            for (name, axes), x in zip(names, forward.ins, strict=False)
        ],
        "result": list(forward.outs[0].shape),
        "saved": [list(x.shape) for x in forward.outs[1:]],
        "received": None if received is None else logarithm(received),
        "errors": [{"name": name, "error": logarithm(error)} for name, error in errors],
        "y": image("y", forward.outs[0]),
        "dy": None if dy is None else image("dy", dy),
        "given": [image(name, x) for name, x in results if x.ndim > 0],
        "heads": heads(forward),
    }


def image(name: str, array: Any) -> dict[str, Any]:
    """A picture with its name; activations have one row per token."""
    x = np.asarray(array)
    if x.ndim > 2 and x.shape[0] == 1:
        x = x.reshape(x.shape[1], -1)
    return {"name": name, **picture(x)._asdict(), "shape": list(array.shape)}


def heads(forward: Any) -> list[dict[str, Any]]:
    """Pictures of attention's probabilities, one per head, with queries as rows and keys as
    columns; none for other ops.
    """
    if forward.base != "attention":
        return []
    _, T, H, _ = forward.outs[0].shape
    p = forward.outs[-1]  # the last of `MaterialisedSaved` without dropout
    # Heads that share keys are adjacent rows: see `rows_of_groups`
    by_head = p[0].reshape(p.shape[1], T, -1, T).swapaxes(1, 2).reshape(H, T, T)
    return [image(f"head {h}", p) for h, p in enumerate(by_head)]


def with_classifier(
    nodes: list[dict[str, Any]], pairs: list[Pair], due: list[Any]
) -> list[dict[str, Any]]:
    """The nodes with the classifier inserted between the last norm and the loss. Its product is not
    a call of an op, so its inputs and outputs are those of the calls around it.
    """
    norm, loss = pairs[-2], pairs[-1]
    h, scores, dscores, dh = (
        norm.forward.outs[0],
        loss.forward.ins[0],
        loss.backward.outs[0],
        norm.backward.ins[-1],
    )
    before, last = nodes[-2], nodes[-1]
    dW = jnp.einsum("nv,nc->vc", dscores, h.reshape(-1, h.shape[-1]))
    classifier = last | {
        "id": CLASSIFIER,
        "op": CLASSIFIER,
        "name": CLASSIFIER,
        "sources": [before["id"]],
        "arguments": [
            {"name": "h", "axes": "B T C", "shape": list(h.shape)},
            {"name": "W", "axes": "Vp C", "shape": [scores.shape[-1], h.shape[-1]]},
        ],
        "result": list(scores.shape),
        "saved": [],
        "received": None,
        "errors": [{"name": "dh", "error": logarithm(relative_error(dh, due[-2]))}],
        "y": image("scores", scores),
        "dy": image("dscores", dscores),
        "given": [image("dh", dh), image("dW", dW)],
    }
    last = last | {"column": last["column"] + 1, "sources": [CLASSIFIER]}
    return [*nodes[:-1], classifier, last]


def blocks(pairs: list[Pair], places: list[Place], due: list[Any]) -> list[dict[str, Any]]:
    """The residual stream after each block, and its gradients after and before the block."""
    found = []
    for row in range(1, places[-1].row):
        writers = [i for i, place in enumerate(places) if place.writes_stream]
        reader = next(i for i, p in enumerate(places) if p.reads_stream and p.row > row)
        last = max(i for i in writers if places[i].row <= row)
        first = max(i for i in writers if places[i].row < row)
        # The gradient of a sum is that of each of its terms
        leaving, arriving = pairs[last].backward.ins[-1], pairs[first].backward.ins[-1]
        found.append(
            {
                "layer": row - 1,
                "y": image("x", pairs[reader].forward.ins[0]),
                "dy": image("dy", leaving),
                "given": [image("dx", arriving)],
                "errors": [
                    {"name": "dy", "error": logarithm(relative_error(leaving, due[last]))},
                    {"name": "dx", "error": logarithm(relative_error(arriving, due[first]))},
                ],
            }
        )
    return found


def token_losses(loss: Pair, vocab_size: int) -> list[float]:
    """-log p of each target, in nats."""
    scores, targets = loss.forward.ins[:2]
    log_p = jax.nn.log_softmax(scores[:, :vocab_size], axis=-1)
    return [
        round(float(x), 3) for x in -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    ]


def tensors(found: Comparison) -> list[dict[str, Any]]:
    """Each tensor of the gradient, with its error."""
    return [
        {
            "tensor": row.tensor,
            "layer": row.layer,
            "shape": list(row.shape),
            "norm": row.norm,
            "error": logarithm(row.relative_l2),
        }
        for row in found.rows
    ]


# --- What is broken ---


def damage(
    fault: Fault,
    cfg: ModelConfig,
    params: Any,
    batch: Batch,
    reference: Reference,
    due: list[Any],
    largest: float,
) -> dict[str, Any]:
    """The effect of a planted error on every gradient, and the verifier's verdict."""
    with planted(fault):
        wrong = traced(cfg, params, batch)
    found = compare(wrong.gradient, reference.gradient, largest)
    told = mismatch(wrong.gradient, wrong.calls, reference, largest)
    received = {}
    if len(wrong.pairs) == len(due):
        for i, (pair, cotangent) in enumerate(zip(wrong.pairs, due, strict=True)):
            dy = received_gradient(*pair)
            if dy is not None:
                received[str(i)] = logarithm(relative_error(dy, cotangent))
    ours, theirs = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)])
        for g in (wrong.gradient, reference.gradient)
    )
    cosine = jnp.vdot(ours, theirs) / (jnp.linalg.norm(ours) * jnp.linalg.norm(theirs))
    return {
        "id": fault.name,
        "op": fault.place,
        "kind": fault.kind,
        "breaks": fault.breaks,
        "code": changed_lines(fault),
        "received": received,
        "errors": [logarithm(row.relative_l2) for row in found.rows],
        "wrong": sum(not row.ok for row in found.rows),
        "error": relative_error(ours, theirs),
        "cosine": round(float(cosine), 4),
        "verdict": said(told),
        "blamed": blamed(told, wrong),
    }


def said(told: Mismatch | None) -> str:
    """The verifier's verdict as text."""
    return str(told) if told else "no op's gradient differs from JAX's"


def blamed(told: Mismatch | None, of: Traced) -> str | None:
    """The node of the op that the verifier names. Of several calls with that name it is the last,
    whose backward runs first. A call that computes nothing, such as dropout at rate 0, has no node:
    the one before it is blamed.
    """
    forward = [call for call in of.calls if not call.op.endswith("_bwd")]
    number, found = -1, None
    for call in forward:
        number += bool(call.jaxpr.jaxpr.eqns)
        if told and call.place == told.place:
            found = str(number)
    return found


def changed_lines(fault: Fault) -> list[list[str]]:
    """The lines around a change as (mark, line): - for what is right, + for what is planted."""
    before = source_of(fault.function)
    after = before.replace(fault.right, fault.wrong)
    lines = list(
        difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=CONTEXT)
    )[3:]
    return [[line[:1], line[1:]] for line in lines]


def relative_error(ours: Any, reference: Any) -> float:
    """|ours - reference| / |reference|, L2 norms."""
    a, b = np.asarray(ours), np.asarray(reference)
    return quotient(float(np.linalg.norm(a - b)), float(np.linalg.norm(b)))


def logarithm(error: float) -> float:
    """log10 of an error, clipped to `LEAST` and `MOST`, which also stand for 0 and infinity."""
    if error == 0:
        return LEAST
    return round(min(max(math.log10(error), LEAST), MOST), 2) if error < math.inf else MOST
