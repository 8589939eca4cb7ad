"""A model's derivatives, by the hand-written backward and by JAX.

By hand means the program of a training step, over all its micro-batches and on its mesh. By JAX
means `jax.grad` of the plain forward, one micro-batch after the other on one device.
"""

import dataclasses
import functools
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gptjax.config import Backward, ModelConfig
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.models.params import init_params, param_axes, per_tensor, unstack
from gptjax.ops import IGNORE_INDEX
from gptjax.parallel.mesh import param_shardings, place_rows, replicated, whole
from gptjax.parallel.sharding import on_mesh
from gptjax.train.step import mean_loss_and_grad
from gptjax.verify import trace
from gptjax.verify.comparison import compare
from gptjax.verify.tolerance import LAMBDA, gradient_variances, tolerance, unit_roundoff

NOISE = 0.02  # standard deviation of the noise added to initial parameters


class Subject(NamedTuple):
    """The model, parameters and batch of a check."""

    cfg: ModelConfig
    """Resolved; its dtype is the one to check."""
    params: Any
    """float32, so that every precision starts from the same numbers."""
    batch: Batch
    """(A, B, T) arrays: A micro-batches."""
    key: Any
    """Dropout's key, split over the micro-batches, or None."""
    mesh: Mesh | None = None
    """Mesh of the hand-written gradient; None for one device."""

    @property
    def num_micro_batches(self) -> int:
        """A."""
        return self.batch.inputs.shape[0]


class Forward(NamedTuple):
    """Loss and logits, or a quantity for each, such as a tolerance."""

    loss: Any
    logits: Any


class Derivatives(NamedTuple):
    """Everything that one forward and backward pass computes."""

    loss: Float[Array, ""]
    logits: Float[Array, "B T V"]
    params: Any
    """Gradient with respect to the parameters, with a tuple of layers."""
    embeddings: Float[Array, "B T C"]
    """Gradient with respect to the token embeddings; like the logits, of the first micro-batch
    alone.
    """

    def gradient(self) -> Any:
        """Both gradients in one tree, for `compare`."""
        return _gradient_class(self.params._fields)(*self.params, self.embeddings)

    def forward(self) -> Forward:
        """Loss and logits in one tree, for `compare`."""
        return Forward(self.loss, self.logits)


@functools.cache
def _gradient_class(fields: tuple[str, ...]) -> Any:
    return namedtuple("_Gradient", [*fields, "input_embeddings"])


def noisy_params(key: Any, cfg: ModelConfig) -> Any:
    """Initial parameters plus noise, except on the vocabulary's pad rows, so that no gradient is
    zero by symmetry.
    """
    params = init_params(key, cfg)
    tree: Any = jax.tree.structure(params)
    keys = tree.unflatten(list(jax.random.split(jax.random.fold_in(key, 1), tree.num_leaves)))
    noisy = jax.tree.map(
        lambda x, k: x + NOISE * jax.random.normal(k, x.shape, x.dtype), params, keys
    )
    return padded_rows(noisy, cfg, lambda x: x.at[cfg.vocab_size :].set(0))


def padded_rows(params: Any, cfg: ModelConfig, f: Callable[[Any], Any]) -> Any:
    """Apply ``f`` to each tensor whose rows are the padded vocabulary."""
    table = per_tensor(lambda weight: weight, params, cfg)
    return jax.tree.map(lambda x, weight: f(x) if weight.axes[0] == "Vp" else x, params, table)


def by_hand(subject: Subject) -> Derivatives:
    """The derivatives that the hand-written backward computes."""
    batch, key = micro_batches(subject)[0]

    @jax.jit
    def run(params: Any, batch: Batch, key: Any) -> Derivatives:
        (loss, grads), calls = trace.record(
            partial(transformer.loss_and_grad, cfg=subject.cfg), params, batch, key=key
        )
        scores = jnp.concatenate([call.ins[0] for call in calls if call.op == "cross_entropy_fwd"])
        embeddings = [call.ins[-1] for call in calls if call.op == "embedding_bwd"][-1]
        return Derivatives(loss, _logits(scores, batch, subject.cfg), unstack(grads), embeddings)

    first = run(parameters(subject), batch, key)
    if subject.mesh is None and subject.num_micro_batches == 1:
        return first
    loss, grads = run_program(subject)
    return first._replace(loss=loss, params=unstack(grads))


def run_program(subject: Subject, backward: Backward = "manual") -> tuple[Array, Any]:
    """(loss, gradient) as a training step computes them, copied to one device."""
    mesh, params, batch, key = subject.mesh, parameters(subject), subject.batch, subject.key
    layout = None
    if mesh is not None:
        layout = replicated(mesh), param_shardings(mesh, param_axes(subject.cfg))
        params = jax.device_put(params, layout[1])
        batch = place_rows(mesh, jax.tree.map(np.asarray, batch))
        key = None if key is None else whole(mesh, key)
    f = partial(mean_loss_and_grad, cfg=subject.cfg, backward=backward)
    found = jax.jit(on_mesh(mesh, f), out_shardings=layout)(params, batch, key)
    return found if mesh is None else jax.tree.map(jnp.asarray, jax.device_get(found))


@functools.cache
def _autodiff_of_one(cfg: ModelConfig) -> Any:
    """A jitted ``(params, batch, key) -> Derivatives`` for one micro-batch, by JAX."""
    cfg = dataclasses.replace(cfg, loss_chunks=1)

    def loss(params: Any, tap: Any, batch: Batch, key: Any) -> tuple[Array, Array]:
        scores, taps = [], [tap]

        def on_call(call: trace.Call) -> list[Any]:
            if call.op == "cross_entropy_fwd":
                scores.append(call.ins[0])
            if call.op == "embedding_fwd" and taps:  # the first one embeds the tokens
                return [call.outs[0] + taps.pop().astype(call.outs[0].dtype), *call.outs[1:]]
            return call.outs

        value = trace.run(
            partial(transformer.loss, cfg=cfg), params, batch, key=key, on_call=on_call
        )
        return value, _logits(scores[0], batch, cfg)

    @jax.jit
    def run(params: Any, batch: Batch, key: Any) -> Derivatives:
        tap = jnp.zeros(
            (*batch.inputs.shape, cfg.channels), jnp.result_type(*jax.tree.leaves(params))
        )
        (value, logits), (grads, embeddings) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            params, tap, batch, key
        )
        return Derivatives(value, logits, unstack(grads), embeddings)

    return run


def by_autodiff(subject: Subject) -> Derivatives:
    """The derivatives of the plain forward by JAX."""
    run = _autodiff_of_one(subject.cfg)
    params, pieces = parameters(subject), micro_batches(subject)
    first = run(params, *pieces[0])
    if len(pieces) == 1:
        return first
    total: Any = None
    for share, (batch, key) in zip(shares(subject.batch), pieces, strict=True):
        found = run(params, batch, key)
        part = jax.tree.map(lambda x, share=share: x * share, (found.loss, found.params))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return first._replace(loss=total[0], params=total[1])


def micro_batches(subject: Subject) -> list[tuple[Batch, Any]]:
    """Each micro-batch, (B, T), with its key."""
    A = subject.num_micro_batches
    keys = [None] * A if subject.key is None else jax.random.split(subject.key, A)
    return [(jax.tree.map(lambda x, i=i: x[i], subject.batch), keys[i]) for i in range(A)]


def shares(batch: Batch) -> list[float]:
    """Each micro-batch's share of the targets that count: the weights with which the micro-batches'
    mean losses add up to the mean of all.
    """
    mask = (
        np.ones(batch.targets.shape) if batch.mask is None else np.asarray(batch.mask, np.float64)
    )
    counts = np.where(np.asarray(batch.targets) == IGNORE_INDEX, 0.0, mask).sum((1, 2))
    return (counts / (counts.sum() or 1.0)).tolist()


def _logits(scores: Array, batch: Batch, cfg: ModelConfig) -> Array:
    return scores.reshape(*batch.inputs.shape, -1)[..., : cfg.vocab_size]


def parameters(subject: Subject) -> Any:
    """The subject's parameters in `parameter_dtype`."""
    return jax.tree.map(lambda x: x.astype(parameter_dtype(subject)), subject.params)


def parameter_dtype(subject: Subject) -> Any:
    """float64 if the computation is in float64, else float32."""
    return jnp.float64 if subject.cfg.dtype == "float64" else jnp.float32


def exact(subject: Subject, dtype: Literal["float64", "float32"] = "float64") -> Subject:
    """The subject in a wider dtype, with an attention implementation that supports it."""
    cfg = dataclasses.replace(subject.cfg, dtype=dtype)
    if cfg.attention in ("cudnn", "splash"):
        cfg = dataclasses.replace(cfg, attention="auto").resolve(
            "cpu", subject.batch.inputs.shape[-1]
        )
    return subject._replace(cfg=cfg)


def tolerances(subject: Subject, reference_dtype: Any = jnp.float64) -> Derivatives:
    """The tolerance of each leaf, for rounding of the gradient and of the reference.

    It is derived from one micro-batch on one device, plus the sum over all micro-batches; a mesh
    makes no sum longer.
    """
    batch, key = micro_batches(subject)[0]
    one = subject._replace(batch=jax.tree.map(lambda x: x[None], batch), key=key, mesh=None)
    found = gradient_variances(lambda params: by_hand(one._replace(params=params)), one.params)
    added = (subject.num_micro_batches - 1) * unit_roundoff(parameter_dtype(subject)) ** 2
    found = found._replace(
        loss=found.loss + added, params=jax.tree.map(lambda v: v + added, found.params)
    )
    mine = unit_roundoff(subject.cfg.compute_dtype)
    theirs = (unit_roundoff(reference_dtype) / mine) ** 2
    allowed: Derivatives = jax.tree.map(lambda v: tolerance(v, v * theirs), found)
    return allowed


def relaxed_tolerances(
    allowed: Any, gradient: Callable[[Any], Any], params: Any, dtype: Any
) -> Any:
    """Raise tolerances to what rounding does to this very gradient.

    Where terms cancel, such as near a minimum, roundings are magnified beyond the margin of
    `gptjax.verify.tolerance`. To measure that, each parameter is moved by one unit in the last
    place, up or down at random. `LAMBDA` times the change of JAX's own gradient counts as rounding,
    if that is more than ``allowed``.

    Args:
        allowed: a tuple of trees of tolerances.
        gradient: JAX's, from parameters to a tree of the same structure.
        params: the parameters to evaluate it at.
        dtype: the dtype that defines the units in the last place.

    """
    key = jax.random.key(3)

    @jax.jit
    def move(x: Array, key: Any) -> Array:
        return x * (1 + float(jnp.finfo(dtype).eps) * jax.random.rademacher(key, x.shape, x.dtype))

    tree: Any = jax.tree.structure(params)
    moved = tree.unflatten(
        [move(x, jax.random.fold_in(key, i)) for i, x in enumerate(jax.tree.leaves(params))]
    )
    parts = zip(gradient(moved), gradient(params), strict=True)
    rows = [row for ours, reference in parts for row in compare(ours, reference, 1.0).rows]
    limits: Any = jax.tree.structure(allowed)
    return limits.unflatten(
        [
            max(limit, LAMBDA * row.relative_l2)
            for limit, row in zip(jax.tree.leaves(allowed), rows, strict=True)
        ]
    )
