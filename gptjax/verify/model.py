"""Everything that is differentiated of GPT-2, by hand and by JAX, on given parameters and tokens, in a given precision."""

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.models import gpt2
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, init_params, unstack
from gptjax.verify import trace
from gptjax.verify.comparison import compare
from gptjax.verify.tolerance import LAMBDA, gradient_variances, tolerance, unit_roundoff

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

    return run(parameters(subject), subject.batch, subject.key)


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

    return run(parameters(subject), subject.batch, subject.key)


def _logits(scores: Array, batch: Batch, cfg: GPT2Config) -> Array:
    return scores.reshape(*batch.inputs.shape, -1)[..., : cfg.vocab_size]


def parameters(subject: Subject) -> Params:
    """In the dtype that the model takes them in."""
    wide = jnp.float64 if subject.cfg.dtype == "float64" else jnp.float32
    return jax.tree.map(lambda x: x.astype(wide), subject.params)


def exact(subject: Subject, dtype: Literal["float64", "float32"] = "float64") -> Subject:
    """The same in a wider dtype, where a kernel for attention gives way to one that computes in it."""
    cfg = dataclasses.replace(subject.cfg, dtype=dtype)
    if cfg.attention in ("cudnn", "splash"):
        cfg = dataclasses.replace(cfg, attention="auto").resolve("cpu", subject.batch.inputs.shape[1])
    return subject._replace(cfg=cfg)


def tolerances(subject: Subject, reference_dtype: Any = jnp.float64) -> Derivatives:
    """What rounding explains of each leaf, the reference's rounding included."""
    found = gradient_variances(lambda *args: by_hand(subject._replace(params=args[0])), subject.params)
    mine = unit_roundoff(subject.cfg.compute_dtype)
    theirs = (unit_roundoff(reference_dtype) / mine) ** 2
    allowed: Derivatives = jax.tree.map(lambda v: tolerance(v, v * theirs), found)
    return allowed


def widened(allowed: Any, gradient: Callable[[Any], Any], params: Params, dtype: Any) -> Any:
    """Tolerances that take into account how far rounding moves this very gradient.

    Near a minimum, say, where terms cancel, the roundings on the way are magnified by more than the margin of
    `gptjax.verify.tolerance`. JAX's own gradient tells: each parameter is moved by one unit in the last place, up or down at
    random, and of what then moves, `LAMBDA` times counts as rounding, where that is more than ``allowed``.

    Args:
        allowed: a tree of tolerances.
        gradient: JAX's: parameters to a tree of the same structure.
        params: where.
        dtype: whose units in the last place.

    """
    key = jax.random.key(3)

    @jax.jit
    def move(x: Array, key: Any) -> Array:
        return x * (1 + float(jnp.finfo(dtype).eps) * jax.random.rademacher(key, x.shape, x.dtype))

    leaves: list[Any] = jax.tree.leaves(params)
    moved = [move(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
    tree: Any = jax.tree.structure(params)
    rows = compare(gradient(tree.unflatten(moved)), gradient(params), 1.0).rows
    limits: Any = jax.tree.structure(allowed)
    return limits.unflatten(
        [max(limit, LAMBDA * row.relative_l2) for limit, row in zip(jax.tree.leaves(allowed), rows, strict=True)]
    )
