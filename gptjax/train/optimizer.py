"""The optimizer: optax's, by name, and a fast path for AdamW in one pass over memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Bool, Float

from gptjax.config import Architecture, OptimConfig
from gptjax.models.family import Weight
from gptjax.models.params import decay_mask, per_tensor
from gptjax.xla import native

# Root mean square of an AdamW update, which Muon's is scaled to (Liu et al. 2025, arXiv:2502.16982)
MUON_RMS = 0.2


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, 0-based, for a run of ``steps`` steps."""
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    rest = max(steps - cfg.warmup_steps, 1)
    decay_steps = max(round(steps * cfg.decay_fraction), 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction),
        "wsd": lambda: optax.linear_schedule(
            peak, final, decay_steps, transition_begin=max(rest - decay_steps, 0)
        ),
    }[cfg.schedule]()
    if not cfg.warmup_steps:
        return after
    warmup = optax.linear_schedule(
        peak / cfg.warmup_steps, peak * (1 + 1 / cfg.warmup_steps), cfg.warmup_steps
    )
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


class Optimizer(NamedTuple):
    """An optimizer of optax's, after clipping, and what the fast path needs to know of it."""

    transform: optax.GradientTransformation
    """``optax.chain(clipping, optimizer)``: its state is the run's, whichever path computes the
    update.
    """
    schedule: optax.Schedule
    cfg: OptimConfig
    decays: Callable[[Any], Any]
    """Parameters -> a tree of booleans: the tensors that weight decay applies to."""

    @property
    def fused(self) -> bool:
        """Whether `fused_update` computes the same as `update`."""
        return self.cfg.name == "adamw"


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Before clipping."""
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


def make_optimizer(cfg: OptimConfig, steps: int, model: Architecture) -> Optimizer:
    """The optimizer of a run.

    Args:
        cfg: which one, and its settings.
        steps: of the whole run, for the schedule.
        model: whose weight table says what decays, and what Muon orthogonalises.

    """
    schedule = make_schedule(cfg, steps)
    decays = partial(decay_mask, cfg=model)
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    adamw = partial(optax.adamw, schedule, cfg.beta1, cfg.beta2, cfg.eps, mu_dtype=cfg.mu_dtype)
    decay, rate = (
        optax.add_decayed_weights(cfg.weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )

    def muon() -> optax.GradientTransformation:
        """Muon for matrices, AdamW for the rest; in either, what the other has is an
        `optax.MaskedNode`.
        """
        absent = optax.MaskedNode()
        matrices = optax.contrib.muon(
            schedule,
            beta=cfg.momentum,
            weight_decay=cfg.weight_decay,
            mu_dtype=cfg.mu_dtype,
            muon_weight_dimension_numbers=lambda params: per_tensor(
                lambda w: _muon_axes(w) or absent, params, model
            ),
            consistent_rms=MUON_RMS,
        )
        others = adamw(
            weight_decay=cfg.weight_decay,
            mask=lambda params: per_tensor(
                lambda w: absent if w.kind == "matrix" else w.kind == "table", params, model
            ),
        )

        def kinds(params: Any) -> Any:
            return per_tensor(lambda w: "muon" if w.kind == "matrix" else "adamw", params, model)

        return optax.partition({"muon": matrices, "adamw": others}, kinds)

    def adafactor() -> optax.GradientTransformation:
        """Its own decay is not scaled by the learning rate; this one is, as every other optimizer's
        here.
        """
        # The direction is already negative
        decay = optax.add_decayed_weights(-cfg.weight_decay, decays)
        return optax.chain(
            optax.adafactor(None), decay, optax.scale_by_learning_rate(schedule, flip_sign=False)
        )

    made = {
        "adamw": lambda: adamw(weight_decay=cfg.weight_decay, mask=decays),
        "muon": muon,
        "lion": lambda: optax.lion(
            schedule, cfg.beta1, cfg.beta2, cfg.mu_dtype, cfg.weight_decay, decays
        ),
        "adafactor": adafactor,
        "sgd": lambda: optax.chain(
            optax.trace(cfg.momentum, accumulator_dtype=cfg.mu_dtype), decay, rate
        ),
    }[cfg.name]()
    return Optimizer(optax.chain(clip, made), schedule, cfg, decays)


def _muon_axes(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """A matrix's input and output axes, counted from the last, so that stacked layers are left
    apart.
    """
    if weight.kind != "matrix":
        return None
    n = len(weight.axes)
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(-n, weight.inputs - n)), tuple(range(weight.inputs - n, 0))
    )


def update(
    optimizer: Optimizer,
    params: Any,
    state: Any,
    grads: Any,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    step: Array,
) -> tuple[Any, Any, StepMetrics]:
    """One step: (parameters, state, metrics), all unchanged, counters included, where loss or norm
    are not finite.

    Args:
        optimizer: any.
        params: the parameters.
        state: of ``optimizer.transform``.
        grads: of the loss.
        loss: to be reported.
        norm: the global norm of ``grads``.
        step: steps done, of which the schedule makes the reported learning rate.

    """
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    changes, new_state = optimizer.transform.update(grads, state, params)
    new = optax.apply_updates(params, changes), new_state
    params, state = jax.tree.map(partial(jnp.where, finite), new, (params, state))
    return (
        params,
        state,
        StepMetrics(loss, norm, jnp.asarray(optimizer.schedule(step), jnp.float32), finite),
    )


class Scalars(NamedTuple):
    """What all tensors share in one step; a moment becomes ``keep * moment + (1 - keep) * x``, x
    ``clip * g`` or its square.
    """

    keep1: Any
    take1: Any
    """``(1 - keep1) * clip``."""
    keep2: Any
    take2: Any
    """``sqrt(1 - keep2) * clip``, to be squared."""
    correct1: Any
    """Bias correction of the first moment, a factor."""
    correct2: Any
    learning_rate: Any
    finite: Any
    """Whether anything is to change."""


def fused_update(
    optimizer: Optimizer,
    params: Any,
    state: Any,
    grads: Any,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    native_code: bool = False,
) -> tuple[Any, Any, StepMetrics]:
    """`update` of AdamW, on optax's own state, in one pass over memory.

    Gradients are scaled down to a global norm of at most ``grad_clip`` (Pascanu et al. 2013,
    arXiv:1211.5063). Then, for each parameter p with its gradient g, at the n-th step (Loshchilov
    and Hutter 2019, arXiv:1711.05101, as in optax)::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - learning_rate (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    Args:
        optimizer: one that is ``fused``.
        params: the parameters.
        state: of ``optimizer.transform``.
        grads: of the loss.
        loss: to be reported.
        norm: the global norm of ``grads``.
        native_code: by `gptjax.xla.native.adamw`, where it is available and all is float32.

    """
    cfg = optimizer.cfg
    adam: optax.ScaleByAdamState = state[1][0]
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    count = adam.count + 1
    learning_rate = optimizer.schedule(adam.count)
    clip = jnp.where(norm > cfg.grad_clip, cfg.grad_clip / norm, 1) if cfg.grad_clip else 1.0
    scalars = Scalars(
        keep1=cfg.beta1,
        take1=(1 - cfg.beta1) * clip,
        keep2=cfg.beta2,
        take2=math.sqrt(1 - cfg.beta2) * clip,
        correct1=1 / (1 - cfg.beta1**count),
        correct2=1 / (1 - cfg.beta2**count),
        learning_rate=learning_rate,
        finite=finite,
    )
    tensors = [jax.tree.leaves(tree) for tree in (params, adam.mu, adam.nu, grads)]
    decays = [
        cfg.weight_decay if decays else 0.0 for decays in jax.tree.leaves(optimizer.decays(params))
    ]
    if native_code:
        updated: Any = native.adamw(
            jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars]), tensors, decays, cfg.eps
        )
    else:
        updated = zip(
            *(_adamw(scalars, *tensor, cfg.eps) for tensor in zip(*tensors, decays, strict=True)),
            strict=True,
        )
    params, mu, nu = (jax.tree.unflatten(jax.tree.structure(params), leaves) for leaves in updated)
    counted = lambda tree: jax.tree.map(lambda n: jnp.where(finite, n + 1, n), tree)  # noqa: E731
    clip_state, (_, *rest) = state
    new_adam = optax.ScaleByAdamState(counted(adam.count), mu, nu)
    new = clip_state, (new_adam, *counted(tuple(rest)))
    return params, new, StepMetrics(loss, norm, jnp.asarray(learning_rate, jnp.float32), finite)


@partial(jax.jit, static_argnames=("weight_decay", "eps"))
def _adamw(
    scalars: Scalars, p: Array, m: Array, v: Array, g: Array, weight_decay: float, eps: float
) -> tuple[Array, Array, Array]:
    """(parameter, first moment, second moment) after one step of one tensor; each element depends
    on its own alone.
    """
    s = Scalars(*(jnp.asarray(x, p.dtype) for x in scalars))
    finite = scalars.finite
    new_m = s.keep1 * m.astype(p.dtype) + s.take1 * g
    new_v = s.keep2 * v + jnp.square(s.take2 * g)
    direction = new_m * s.correct1 / (jnp.sqrt(new_v * s.correct2) + eps) + weight_decay * p
    new_p = p - s.learning_rate * direction
    return (
        jnp.where(finite, new_p, p),
        jnp.where(finite, new_m.astype(m.dtype), m),
        jnp.where(finite, new_v, v),
    )
