"""AdamW, its schedules, and the step in one pass over memory."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from gptjax.errors import ConfigError
from gptjax.models.params import decay_mask
from gptjax.xla.native import adamw


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with clipping, warm-up and a schedule."""

    learning_rate: float = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """What follows the warm-up. constant; linear or cosine down to final_fraction of the peak; wsd (warm-up, stable, decay):
    constant, then linear down over the last decay_fraction of all steps."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly; step n of them uses (n + 1) / warmup_steps of the peak."""
    final_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Part of all steps over which wsd decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay on 2-D tensors, embeddings included; none on biases and LayerNorms."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    mu_dtype: Literal["bfloat16"] | None = None
    """What the first moment is kept in: bfloat16 takes half of its memory, and on CPU the update is then XLA's, not in C++; by
    default, what the parameters are kept in."""
    grad_clip: float = 1.0
    """Largest global gradient norm, after averaging over micro-batches; 0 turns clipping off."""
    accumulate: int = 1
    """Micro-batches whose mean gradient makes one step."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of its range.

        """
        if not self.eps > 0:
            raise ConfigError(f"optim.eps must be above 0, not {self.eps}")
        for name in ("learning_rate", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name} must not be negative, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} must be in [0, 1], not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps must not be negative, not {self.warmup_steps}")
        if self.accumulate < 1:
            raise ConfigError(f"optim.accumulate must be at least 1, not {self.accumulate}")


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, 0-based, for a run of ``steps`` steps."""
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    rest = max(steps - cfg.warmup_steps, 1)
    decay_steps = max(round(steps * cfg.decay_fraction), 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction),
        "wsd": lambda: optax.linear_schedule(peak, final, decay_steps, transition_begin=max(rest - decay_steps, 0)),
    }[cfg.schedule]()
    if not cfg.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / cfg.warmup_steps, peak * (1 + 1 / cfg.warmup_steps), cfg.warmup_steps)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


class Optimizer(NamedTuple):
    """Of the chain ``clip -> Adam -> weight decay -> learning rate``, what `update` needs; the chain itself, in two parts, is
    optax's and makes the state, no more.
    """

    moments: optax.GradientTransformation
    step: optax.GradientTransformation
    schedule: optax.Schedule
    cfg: OptimConfig
    decays: Any


class OptState(NamedTuple):
    """States of the two parts."""

    moments: Any
    step: Any


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Before clipping."""
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


def make_optimizer(cfg: OptimConfig, steps: int, model: Any) -> Optimizer:
    """The optimizer of a run of ``steps`` steps."""
    decays = lambda params: decay_mask(params, model)  # noqa: E731
    schedule = make_schedule(cfg, steps)
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    moments = optax.chain(clip, optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps, mu_dtype=cfg.mu_dtype))
    step = optax.chain(
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(moments, step, schedule, cfg, decays)


def init_opt_state(optimizer: Optimizer, params: Any) -> OptState:
    """Moments of zero and counters at zero."""
    return OptState(optimizer.moments.init(params), optimizer.step.init(params))


class Scalars(NamedTuple):
    """What all tensors share in one step; a moment becomes ``keep * moment + (1 - keep) * x``, x ``clip * g`` or its square."""

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


def update(
    optimizer: Optimizer,
    params: Any,
    state: OptState,
    grads: Any,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    native: bool = False,
) -> tuple[Any, OptState, StepMetrics]:
    """One step of AdamW: (parameters, state, metrics), all unchanged, counters included, where loss or norm are not finite.

    Gradients are scaled down to a global norm of at most ``grad_clip`` (Pascanu et al. 2013, arXiv:1211.5063). Then, for each
    parameter p with its gradient g, at the n-th step (Loshchilov and Hutter 2019, arXiv:1711.05101, as in optax)::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - learning_rate (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    Args:
        optimizer: whose configuration it is.
        params: the parameters.
        state: of `init_opt_state`, or of the step before.
        grads: of the loss.
        loss: to be reported.
        norm: the global norm of ``grads``.
        native: by `gptjax.native.adamw`, where it is available and all is float32.

    """
    cfg, (clip_state, adam) = optimizer.cfg, state.moments
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
    decays = [cfg.weight_decay if decays else 0.0 for decays in jax.tree.leaves(optimizer.decays(params))]
    if native:
        updated: Any = adamw(jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars]), tensors, decays, cfg.eps)
    else:
        updated = zip(*(_adamw(scalars, *tensor, cfg.eps) for tensor in zip(*tensors, decays, strict=True)), strict=True)
    params, mu, nu = (jax.tree.unflatten(jax.tree.structure(params), leaves) for leaves in updated)
    counted = lambda n: jnp.where(finite, n + 1, n)  # noqa: E731
    new = OptState((clip_state, adam._replace(count=counted(adam.count), mu=mu, nu=nu)), jax.tree.map(counted, state.step))
    return params, new, StepMetrics(loss, norm, jnp.asarray(learning_rate, jnp.float32), finite)


@partial(jax.jit, static_argnames=("weight_decay", "eps"))
def _adamw(
    scalars: Scalars, p: Array, m: Array, v: Array, g: Array, weight_decay: float, eps: float
) -> tuple[Array, Array, Array]:
    """(parameter, first moment, second moment) after one step of one tensor; each element depends on its own alone."""
    s = Scalars(*(jnp.asarray(x, p.dtype) for x in scalars))
    finite = scalars.finite
    new_m = s.keep1 * m.astype(p.dtype) + s.take1 * g
    new_v = s.keep2 * v + jnp.square(s.take2 * g)
    direction = new_m * s.correct1 / (jnp.sqrt(new_v * s.correct2) + eps) + weight_decay * p
    new_p = p - s.learning_rate * direction
    return jnp.where(finite, new_p, p), jnp.where(finite, new_m.astype(m.dtype), m), jnp.where(finite, new_v, v)
