"""The optimizer: optax's, by name, and a fast AdamW that takes one pass over memory."""

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

# Typical RMS of an AdamW update, to which Muon's is scaled (Liu et al. 2025, arXiv:2502.16982)
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
    """An optax optimizer after gradient clipping, with the settings that the fast path needs."""

    transform: optax.GradientTransformation
    """``optax.chain(clipping, optimizer)``. The run keeps its state, whichever path computes the
    update.
    """
    schedule: optax.Schedule
    cfg: OptimConfig
    decays: Callable[[Any], Any]
    """Parameters -> a tree of booleans: whether weight decay applies to the tensor."""

    @property
    def fused(self) -> bool:
        """Whether `fused_update` computes the same as `update`."""
        return self.cfg.name == "adamw"


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Global L2 norm before clipping."""
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    """Whether loss and norm are finite; if not, the update is skipped."""


def make_optimizer(cfg: OptimConfig, steps: int, model: Architecture) -> Optimizer:
    """The optimizer of a run.

    Args:
        cfg: the optimizer's name and settings.
        steps: length of the whole run, for the schedule.
        model: its weight table determines what decays and what Muon orthogonalises.

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
        """Muon for the blocks' matrices, AdamW for the rest; each masks the other's tensors."""
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
        """Adafactor whose weight decay is scaled by the learning rate, as in the other optimizers.
        That of optax's Adafactor is not.
        """
        # Adafactor's updates are already negative
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
    """A matrix's input and output axes, counted from the last one, so that a leading layer axis is
    a batch axis.
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
    """Apply one step and return (parameters, state, metrics). If loss or norm is not finite,
    parameters and state, counters included, stay as they were.

    Args:
        optimizer: any of them.
        params: the parameters.
        state: the state of ``optimizer.transform``.
        grads: gradient of the loss.
        loss: reported in the metrics.
        norm: the global norm of ``grads``.
        step: steps done before this one, for the reported learning rate.

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
    """Factors of one AdamW step that all tensors share, in the order that `native.adamw` takes
    them.
    """

    beta1: Any
    scale1: Any
    """``(1 - beta1) * clip``, the gradient's factor in the first moment."""
    beta2: Any
    scale2: Any
    """``sqrt(1 - beta2) * clip``, the gradient's factor before it is squared for the second."""
    correction1: Any
    """Bias correction of the first moment, ``1 / (1 - beta1^n)``."""
    correction2: Any
    learning_rate: Any
    finite: Any
    """False to leave everything unchanged."""


def fused_update(
    optimizer: Optimizer,
    params: Any,
    state: Any,
    grads: Any,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    native_code: bool = False,
) -> tuple[Any, Any, StepMetrics]:
    """AdamW's `update` in one pass over memory, on optax's own state.

    Gradients are scaled down to a global norm of at most ``grad_clip`` (Pascanu et al. 2013,
    arXiv:1211.5063). Then, for each parameter p with its gradient g, at the n-th step (Loshchilov
    and Hutter 2019, arXiv:1711.05101, as in optax)::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - learning_rate (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    Args:
        optimizer: one that is ``fused``.
        params: the parameters.
        state: the state of ``optimizer.transform``.
        grads: gradient of the loss.
        loss: reported in the metrics.
        norm: the global norm of ``grads``.
        native_code: use `gptjax.xla.native.adamw`, which must be available and needs float32.

    """
    cfg = optimizer.cfg
    adam: optax.ScaleByAdamState = state[1][0]
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    count = adam.count + 1
    learning_rate = optimizer.schedule(adam.count)
    clip = jnp.where(norm > cfg.grad_clip, cfg.grad_clip / norm, 1) if cfg.grad_clip else 1.0
    scalars = Scalars(
        beta1=cfg.beta1,
        scale1=(1 - cfg.beta1) * clip,
        beta2=cfg.beta2,
        scale2=math.sqrt(1 - cfg.beta2) * clip,
        correction1=1 / (1 - cfg.beta1**count),
        correction2=1 / (1 - cfg.beta2**count),
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
    """(parameter, first moment, second moment) of one tensor after a step, element by element."""
    s = Scalars(*(jnp.asarray(x, p.dtype) for x in scalars))
    finite = scalars.finite
    new_m = s.beta1 * m.astype(p.dtype) + s.scale1 * g
    new_v = s.beta2 * v + jnp.square(s.scale2 * g)
    direction = new_m * s.correction1 / (jnp.sqrt(new_v * s.correction2) + eps) + weight_decay * p
    new_p = p - s.learning_rate * direction
    return (
        jnp.where(finite, new_p, p),
        jnp.where(finite, new_m.astype(m.dtype), m),
        jnp.where(finite, new_v, v),
    )
