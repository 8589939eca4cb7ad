"""Check a model's hand-written gradient against each kind of reference."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Backward, ModelConfig
from gptjax.formats.llmc import DebugState
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.models.params import init_params, stack, unstack
from gptjax.train.step import mean_loss_and_grad, step_key
from gptjax.verify import finite_difference
from gptjax.verify.comparison import compare
from gptjax.verify.model import (
    Derivatives,
    Forward,
    Subject,
    by_autodiff,
    by_hand,
    exact,
    micro_batches,
    padded_rows,
    parameters,
    relaxed_tolerances,
    run_program,
    shares,
    tolerances,
)
from gptjax.verify.proof import Report, locate
from gptjax.verify.rows import Comparison
from gptjax.verify.tolerance import gradient_variances, tolerance, unit_roundoff
from gptjax.verify.trace import Mismatch

LOG = logging.getLogger(__name__)
"""Gets a line as each stage begins."""


def against_autodiff(subject: Subject) -> Report:
    """Compare gradient and forward with JAX's in float64; a 16-bit gradient's error is also
    compared with that of JAX's.
    """
    dtype = subject.cfg.compute_dtype
    narrow = dtype.itemsize < 4
    mine = _by_hand(subject)
    LOG.info("JAX's gradient in float64")
    truth = by_autodiff(exact(subject))
    rival = jaxs_own(subject).gradient() if narrow else None

    def judge(allowed: Derivatives) -> Report:
        return Report(
            compare(mine.gradient(), truth.gradient(), allowed.gradient(), rival, dtype),
            compare(mine.forward(), truth.forward(), allowed.forward(), dtype=dtype),
            reference="autodiff in float64",
        )

    report = _judged(judge, _tolerances(subject), subject)
    curvature = None if narrow else against_hessian(subject)
    return dataclasses.replace(
        report, curvature=curvature, mismatch=_blame(report.gradient, mine, subject)
    )


def jaxs_own(subject: Subject) -> Derivatives:
    """`by_autodiff` in the subject's dtype; on a mesh, of the sharded program, which splits its
    16-bit sums like the hand-written one.
    """
    found = by_autodiff(subject)
    if subject.mesh is None:
        return found
    loss, grads = run_program(subject, "autodiff")
    return found._replace(loss=loss, params=unstack(grads))


def against_differences(subject: Subject, layers: bool) -> Report:
    """Compare the gradient along random directions with differences of the plain forward in
    float64.

    Args:
        subject: in float64 or float32; 16-bit rounding hides errors along a single direction.
        layers: use a direction for each tensor and layer instead of one for each tensor.

    """
    mine, double = _by_hand(subject), exact(subject)
    params = parameters(double)
    params = params if double.cfg.layers == "unroll" else unstack(params)

    one = jax.jit(lambda params, batch, key: transformer.loss(params, batch, double.cfg, key))

    def loss(params: Any) -> Any:
        params = params if double.cfg.layers == "unroll" else stack(params)
        losses = [one(params, *piece) for piece in micro_batches(double)]
        return sum(share * value for share, value in zip(shares(double.batch), losses, strict=True))

    LOG.info("differences of the loss")
    found = finite_difference.check_directions(loss, params, mine.params, layers)
    plain = loss(params)

    def judge(allowed: Derivatives) -> Report:
        largest = max(jax.tree.leaves(allowed.params))
        rows = tuple(row._replace(tolerance=max(row.tolerance, largest)) for row in found.rows)
        return Report(
            Comparison(rows, rows),
            compare({"loss": mine.loss}, {"loss": plain}, {"loss": allowed.loss}),
            reference="finite differences in float64",
        )

    report = _judged(judge, _tolerances(subject), subject)
    return dataclasses.replace(report, mismatch=_blame(report.gradient, mine, subject))


def against_file(subject: Subject, state: DebugState) -> Report:
    """Compare gradient and forward with another program's float32 results."""
    mine, V = _by_hand(subject), subject.cfg.vocab_size
    theirs = unstack(jax.tree.map(jnp.asarray, state.grads))
    theirs, grads = (padded_rows(g, subject.cfg, lambda x: x[:V]) for g in (theirs, mine.params))
    values = Forward(jnp.float32(state.loss), jnp.asarray(state.logits))
    dtype = jnp.float32 if subject.cfg.dtype == "float64" else subject.cfg.compute_dtype

    def judge(allowed: Derivatives) -> Report:
        found = compare(grads, theirs, allowed.params, dtype=dtype)
        return Report(
            found,
            compare(mine.forward(), values, allowed.forward(), dtype=dtype),
            reference="the file",
        )

    report = _judged(judge, _tolerances(subject, jnp.float32), subject, dtype)
    return dataclasses.replace(report, mismatch=_blame(report.gradient, mine, subject))


def _by_hand(subject: Subject) -> Derivatives:
    LOG.info("the gradient by hand")
    return by_hand(subject)


def _tolerances(subject: Subject, dtype: Any = None) -> Derivatives:
    LOG.info("the tolerances")
    return tolerances(subject, dtype) if dtype else tolerances(subject)


def _judged(
    judge: Callable[[Derivatives], Report],
    allowed: Derivatives,
    subject: Subject,
    dtype: Any = None,
) -> Report:
    """The report with the derived tolerances or, if it fails, with the `relaxed_tolerances`."""
    report = judge(allowed)
    if report:
        return report

    def gradient(params: Any) -> Derivatives:
        return by_autodiff(subject._replace(params=params))

    report = judge(
        relaxed_tolerances(
            allowed, gradient, parameters(subject), dtype or subject.cfg.compute_dtype
        )
    )
    return dataclasses.replace(report, relaxed=True)


def against_hessian(subject: Subject) -> Comparison:
    """Compare the Hessian times a random vector: forward mode over the hand-written backward, and
    over JAX's in float64.

    On the first micro-batch and one device.
    """
    LOG.info("Hessian-vector products")
    double = exact(subject)
    tree: Any = jax.tree.structure(subject.params)
    leaves = jax.tree.leaves(subject.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draw = jax.jit(
        lambda keys: tree.unflatten(
            [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        )
    )
    vector = draw(keys)

    def product(gradient: Any, of: Subject) -> Any:
        batch, key = micro_batches(of)[0]

        def run(params: Any, vector: Any) -> Any:
            return unstack(
                jax.jvp(lambda p: gradient(p, batch, of.cfg, key), (params,), (vector,))[1]
            )

        return run, (parameters(of), parameters(of._replace(params=vector)))

    ours, args = product(lambda *a: transformer.loss_and_grad(*a)[1], subject)
    mine = jax.jit(ours)(*args)
    theirs_rounding = (unit_roundoff(jnp.float64) / unit_roundoff(subject.cfg.compute_dtype)) ** 2
    allowed = jax.tree.map(
        lambda v: tolerance(v, v * theirs_rounding), gradient_variances(ours, *args)
    )
    theirs, args = product(jax.grad(transformer.loss), double)
    return compare(mine, jax.jit(theirs)(*args), allowed)


def against_live(
    run: Any, cfg: ModelConfig, params: Any, batch: Batch, key: Any, step: int
) -> Report | None:
    """Compare the gradient of a training step, as that step computes it, with JAX's in the same
    precision.

    A 16-bit gradient is judged by JAX's own error, here relative to float32. Both sides add
    micro-batches with the same code.

    Args:
        run: the compiled ``run(params, batch, key, step) -> (loss, gradient)`` to check; None
            compiles the hand-written one.
        cfg: resolved.
        params: the run's current parameters.
        batch: (A, B, T) tokens, A micro-batches.
        key: dropout's key, before the step is folded in.
        step: number of the step.

    Returns:
        The report; None if JAX's own gradient is not finite.

    """
    at = jnp.int32(step)
    narrow = cfg.compute_dtype.itemsize < 4
    subject = Subject(cfg, params, batch, step_key(key, at, cfg))
    wide = exact(subject, "float32") if narrow else subject
    args = params, batch, key, at
    expected, reference = _step_gradient(wide.cfg, "autodiff")(*args)
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((expected, reference))):
        return None
    own = _step_gradient(cfg, "autodiff")
    rival = own(*args)[1] if narrow else None
    loss, gradient = run(*args) if run else _step_gradient(cfg, "manual")(*args)
    gradient = unstack(gradient)

    def judge(allowed: Any) -> Report:
        found = compare(gradient, reference, allowed[1], rival, cfg.compute_dtype)
        return Report(found, compare({"loss": loss}, {"loss": expected}, {"loss": allowed[0]}))

    allowed = _step_tolerances(
        cfg, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (batch, key))
    )
    report = judge(allowed)
    if not report:
        allowed = relaxed_tolerances(
            allowed, lambda p: own(p, *args[1:]), params, cfg.compute_dtype
        )
        report = dataclasses.replace(judge(allowed), relaxed=True)
    if report.gradient:
        return report
    return dataclasses.replace(report, mismatch=_locate(subject) or _in_a_setting(report.gradient))


@functools.cache
def _step_gradient(cfg: ModelConfig, backward: Backward) -> Any:
    """The gradient of a step as a jitted function, cached so that a run compiles it once."""

    def gradient(params: Any, batch: Batch, key: Any, step: Any) -> Any:
        loss, gradient = mean_loss_and_grad(params, batch, step_key(key, step, cfg), cfg, backward)
        return loss, unstack(gradient)

    return jax.jit(gradient)


@functools.cache
def _step_tolerances(cfg: ModelConfig, batch_and_key: Any) -> Any:
    params = jax.eval_shape(partial(init_params, cfg=cfg), jax.random.key(0))
    step = jax.ShapeDtypeStruct((), np.int32)
    found = gradient_variances(_step_gradient(cfg, "manual"), params, *batch_and_key, step)
    return jax.tree.map(lambda v: tolerance(v, v), found)


def _blame(found: Comparison, mine: Derivatives, subject: Subject) -> Mismatch | None:
    """The cause of a wrong gradient; None if it is right, or if it agrees with JAX's, so that the
    reference is at fault.
    """
    if found:
        return None
    LOG.info("wrong: looking for the op")
    mismatch = _locate(subject)
    if mismatch:
        return mismatch
    return None if _is_jaxs_own(subject, mine) else _program(found, subject) or _in_a_setting(found)


def _is_jaxs_own(subject: Subject, mine: Derivatives | None = None) -> bool:
    mine = mine or by_hand(subject)
    allowed = tolerances(subject, subject.cfg.compute_dtype)
    return bool(compare(mine.gradient(), by_autodiff(subject).gradient(), allowed.gradient()))


def _program(found: Comparison, subject: Subject) -> Mismatch | None:
    """Blame the mesh or the accumulation if the gradient is right without it."""
    error = found.worst.relative_l2
    if subject.mesh is not None and _is_jaxs_own(subject._replace(mesh=None)):
        return Mismatch(
            "the program on the mesh",
            "only it differs; on one device the gradient is right",
            error,
        )
    one = subject._replace(batch=jax.tree.map(lambda x: x[:1], subject.batch))
    if subject.num_micro_batches > 1 and _is_jaxs_own(one):
        return Mismatch(
            "the accumulated program",
            "only it differs; for one micro-batch the gradient is right",
            error,
        )
    return None


def _locate(subject: Subject) -> Mismatch | None:
    """Where the gradient first differs from JAX's, on the first micro-batch and one device, with
    unrolled layers and no recomputation, so that every op shows.

    A 16-bit gradient is traced in a wider precision first, where an error stands out from rounding.
    """
    cfg = dataclasses.replace(subject.cfg, layers="unroll", recompute="none", loss_chunks=1)
    plain = subject._replace(cfg=cfg, params=unstack(subject.params))
    widest: Any = "float64" if jax.dtypes.canonicalize_dtype("float64") == "float64" else "float32"
    for of in (exact(plain, widest), plain) if cfg.compute_dtype.itemsize < 4 else (plain,):
        batch, key = micro_batches(of)[0]
        loss, loss_and_grad = (
            partial(f, cfg=of.cfg, key=key) for f in (transformer.loss, transformer.loss_and_grad)
        )
        mismatch = locate(loss, loss_and_grad, parameters(of), batch)
        if mismatch:
            return mismatch
    return None


def _in_a_setting(found: Comparison) -> Mismatch:
    """Blame the settings that `_locate` changes, for a wrong gradient in which it finds nothing."""
    settings = "model.layers, model.recompute, model.loss_chunks, optim.accumulate or the mesh"
    what = "with unroll, none, 1, 1 and one device every op is right"
    return Mismatch(settings, what, found.worst.relative_l2)
