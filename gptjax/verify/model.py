"""GPT-2's hand-written gradient on trial: on given parameters and tokens, in a given precision, against a reference."""

import dataclasses
from collections import namedtuple
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.formats.llmc import DebugState
from gptjax.models import gpt2
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, init_params, unstack
from gptjax.steps import Backward, mean_loss_and_grad, step_key
from gptjax.verify import finite_difference, trace
from gptjax.verify.comparison import Comparison, compare
from gptjax.verify.proof import Report, locate
from gptjax.verify.tolerance import gradient_variances, tolerance, unit_roundoff

_GRADIENT: Any = namedtuple("_GRADIENT", [*Params._fields, "input_embeddings"])  # type: ignore[misc]
NOISE = 0.02  # standard deviation of what is added to initial parameters


class Subject(NamedTuple):
    """What the gradient is taken of."""

    cfg: GPT2Config
    """Resolved; its dtype is the one that is checked."""
    params: Params
    """float32, so that every precision starts from the same numbers."""
    batch: Batch
    key: Any
    """Of dropout, or None."""


class Forward(NamedTuple):
    """Values, or what is measured of them."""

    loss: Any
    logits: Any


class Derivatives(NamedTuple):
    """Everything of one pass."""

    loss: Float[Array, ""]
    logits: Float[Array, "B T V"]
    params: Params
    """Gradient with respect to the parameters, a tuple of layers each."""
    embeddings: Float[Array, "B T C"]
    """Gradient with respect to the sum of token and position embeddings."""

    def gradient(self) -> Any:
        """The two gradients in one tree, for `compare`."""
        return _GRADIENT._make((*self.params, self.embeddings))

    def forward(self) -> Forward:
        """The two values in one tree, for `compare`."""
        return Forward(self.loss, self.logits)


def noisy_params(key: Any, cfg: GPT2Config) -> Params:
    """Initial parameters with noise on all but the vocabulary's pad rows, so that no gradient is zero by symmetry."""
    params = init_params(key, cfg)
    tree: Any = jax.tree.structure(params)
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    noisy: Params = tree.unflatten(
        [x + NOISE * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
    return noisy._replace(wte=noisy.wte.at[cfg.vocab_size :].set(0))


def by_hand(subject: Subject) -> Derivatives:
    """The hand-written backward's."""

    @jax.jit
    def run(params: Params, batch: Batch, key: Any) -> Derivatives:
        (loss, grads), calls = trace.record(partial(gpt2.loss_and_grad, cfg=subject.cfg), params, batch, key=key)
        scores = jnp.concatenate([call.ins[0] for call in calls if call.op == "cross_entropy_fwd"])
        embeddings = next(call for call in calls if call.op == "embedding_bwd").ins[-1]
        return Derivatives(loss, _logits(scores, batch, subject.cfg), unstack(grads), embeddings)

    return run(_parameters(subject), subject.batch, subject.key)


def by_autodiff(subject: Subject) -> Derivatives:
    """JAX's, of the plain forward."""
    cfg = dataclasses.replace(subject.cfg, loss_chunks=1)

    def loss(params: Params, tap: Any, batch: Batch, key: Any) -> tuple[Array, Array]:
        scores = []

        def on_call(call: trace.Call) -> list[Any]:
            if call.op == "cross_entropy_fwd":
                scores.append(call.ins[0])
            return [call.outs[0] + tap, *call.outs[1:]] if call.op == "embedding_fwd" else call.outs

        value = trace.run(partial(gpt2.loss, cfg=cfg), params, batch, key=key, on_call=on_call)
        return value, _logits(scores[0], batch, cfg)

    @jax.jit
    def run(params: Params, batch: Batch, key: Any) -> Derivatives:
        tap = jnp.zeros((*batch.inputs.shape, cfg.channels), cfg.compute_dtype)
        (value, logits), (grads, embeddings) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, tap, batch, key)
        return Derivatives(value, logits, unstack(grads), embeddings)

    return run(_parameters(subject), subject.batch, subject.key)


def _logits(scores: Array, batch: Batch, cfg: GPT2Config) -> Array:
    return scores.reshape(*batch.inputs.shape, -1)[..., : cfg.vocab_size]


def _parameters(subject: Subject) -> Params:
    wide = jnp.float64 if subject.cfg.dtype == "float64" else jnp.float32
    return jax.tree.map(lambda x: x.astype(wide), subject.params)


def exact(subject: Subject) -> Subject:
    """The same in float64, where cuDNN's attention gives way to one that computes in it."""
    cfg = dataclasses.replace(subject.cfg, dtype="float64")
    if cfg.attention == "cudnn":
        cfg = dataclasses.replace(cfg, attention="auto").resolve("cpu", subject.batch.inputs.shape[1])
    return subject._replace(cfg=cfg)


def tolerances(subject: Subject, reference_dtype: Any = jnp.float64) -> Derivatives:
    """What rounding explains of each leaf."""
    found = gradient_variances(lambda *args: by_hand(subject._replace(params=args[0])), subject.params)
    mine = unit_roundoff(subject.cfg.compute_dtype)
    theirs = (unit_roundoff(reference_dtype) / mine) ** 2
    allowed: Derivatives = jax.tree.map(lambda v: tolerance(v, v * theirs), found)
    return allowed


def against_autodiff(subject: Subject) -> Report:
    """The gradient and forward against JAX's in float64; in 16 bits also against JAX's own distance from there."""
    mine, truth, allowed = by_hand(subject), by_autodiff(exact(subject)), tolerances(subject)
    narrow = subject.cfg.compute_dtype.itemsize < 4
    rival = by_autodiff(subject).gradient() if narrow else None
    dtype = subject.cfg.compute_dtype
    found = compare(mine.gradient(), truth.gradient(), allowed.gradient(), rival, dtype)
    forward = compare(mine.forward(), truth.forward(), allowed.forward(), dtype=dtype)
    curvature = None if narrow else against_hessian(subject)
    parting = _locate(found, subject) or _in_a_setting(found)
    return Report(found, forward, curvature, reference="autodiff in float64", parting=parting)


def against_differences(subject: Subject, layers: bool) -> Report:
    """The gradient along random directions, against differences of the plain forward in float64."""
    mine, allowed = by_hand(subject), tolerances(subject)
    double = exact(subject)
    params = _parameters(double)
    loss = jax.jit(partial(gpt2.loss, cfg=double.cfg))
    largest = max(finite_difference.TOLERANCE, *jax.tree.leaves(allowed.params))
    gradient = mine.params if double.cfg.layers == "unroll" else jax.tree.map(jnp.stack, mine.params, is_leaf=_is_layers)
    found = finite_difference.check_directions(
        lambda p: loss(p, double.batch, key=double.key), params, gradient, layers, tolerance=largest
    )
    plain = loss(params, double.batch, key=double.key)
    forward = compare({"loss": mine.loss}, {"loss": plain}, {"loss": allowed.loss})
    return Report(found, forward, reference="finite differences in float64", parting=_locate(found, subject))


def _is_layers(x: Any) -> bool:
    return type(x) is tuple


def against_file(subject: Subject, state: DebugState) -> Report:
    """The gradient and forward against another program's, in float32."""
    mine, allowed = by_hand(subject), tolerances(subject, jnp.float32)
    theirs = unstack(jax.tree.map(jnp.asarray, state.grads))
    grads = mine.params._replace(wte=mine.params.wte[: subject.cfg.vocab_size])
    theirs = theirs._replace(wte=theirs.wte[: subject.cfg.vocab_size])
    dtype = jnp.float32 if subject.cfg.dtype == "float64" else subject.cfg.compute_dtype
    found = compare(grads, theirs, allowed.params, dtype=dtype)
    values = Forward(jnp.float32(state.loss), jnp.asarray(state.logits))
    forward = compare(mine.forward(), values, allowed.forward(), dtype=dtype)
    return Report(found, forward, reference="the file", parting=_locate(found, subject))


def against_live(run: Any, cfg: GPT2Config, params: Params, batch: Batch, key: Any, step: int) -> Report:
    """The gradient of a training step, as that step computes it, against JAX's in the same precision.

    In 16 bits it is judged as elsewhere, by JAX's own distance from a more precise gradient, here in float32.

    Args:
        run: the compiled ``run(params, batch, key, step) -> (loss, gradient)`` on trial.
        cfg: resolved.
        params: the live parameters.
        batch: (A, B, T) tokens, A micro-batches.
        key: of dropout, before the step is folded in.
        step: number of the step.

    """
    at = jnp.int32(step)
    loss, gradient = run(params, batch, key, at)

    def of(cfg: GPT2Config, backward: Backward) -> Any:
        def f(params: Params, batch: Batch, key: Any, step: Any) -> Any:
            loss, gradient = mean_loss_and_grad(params, batch, step_key(key, step, cfg), cfg, backward)
            return loss, unstack(gradient)

        return f

    narrow = cfg.compute_dtype.itemsize < 4
    wide = cfg
    if narrow:
        wide = dataclasses.replace(cfg, dtype="float32", attention="auto" if cfg.attention == "cudnn" else cfg.attention)
        wide = wide.resolve("cpu", batch.inputs.shape[-1])
    expected, reference = jax.jit(of(wide, "autodiff"))(params, batch, key, at)
    rival = jax.jit(of(cfg, "autodiff"))(params, batch, key, at)[1] if narrow else None
    allowed = jax.tree.map(lambda v: tolerance(v, v), gradient_variances(of(cfg, "manual"), params, batch, key, at))
    found = compare(unstack(gradient), reference, allowed[1], rival, cfg.compute_dtype)
    forward = compare({"loss": loss}, {"loss": expected}, {"loss": allowed[0]})
    first = jax.tree.map(lambda x: x[0], batch)
    parting = _locate(found, Subject(cfg, params, first, step_key(key, at, cfg))) or _in_a_setting(found)
    return Report(found, forward, parting=parting)


def against_hessian(subject: Subject) -> Comparison:
    """The Hessian times a random vector: forward over the hand-written reverse, against forward over JAX's in float64."""
    double = exact(subject)
    tree: Any = jax.tree.structure(subject.params)
    leaves = jax.tree.leaves(subject.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draw = jax.jit(
        lambda keys: tree.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
    )
    vector = draw(keys)

    def product(gradient: Any, of: Subject) -> Any:
        def run(params: Params, vector: Params) -> Params:
            return unstack(jax.jvp(lambda p: gradient(p, of.batch, of.cfg, of.key), (params,), (vector,))[1])

        return run, (_parameters(of), _parameters(of._replace(params=vector)))

    ours, args = product(lambda *a: gpt2.loss_and_grad(*a)[1], subject)
    mine = jax.jit(ours)(*args)
    allowed = jax.tree.map(tolerance, gradient_variances(ours, *args))
    theirs, args = product(jax.grad(gpt2.loss), double)
    return compare(mine, jax.jit(theirs)(*args), allowed)


def _locate(found: Comparison, subject: Subject) -> trace.Parting | None:
    """Where the gradient leaves JAX's: with unrolled layers and nothing recomputed, so that every op shows."""
    if found:
        return None
    cfg = dataclasses.replace(subject.cfg, layers="unroll", recompute="none", loss_chunks=1)
    params = _parameters(subject)
    params = params if subject.cfg.layers == "unroll" else unstack(params)

    def with_key(f: Any) -> Any:
        return lambda params, batch: f(params, batch, cfg, subject.key)

    return locate(with_key(gpt2.loss), with_key(gpt2.loss_and_grad), params, subject.batch)


def _in_a_setting(found: Comparison) -> trace.Parting | None:
    """For a wrong gradient that `_locate` finds right."""
    if found:
        return None
    settings = "model.layers, model.recompute, model.loss_chunks or optim.accumulate"
    return trace.Parting(settings, "with unroll, none, 1 and 1 the gradient is right", found.worst.relative_l2)
