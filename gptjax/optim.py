"""AdamW as an optax chain, its schedules, and the two-stage form that updates every buffer in place."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from gptjax.errors import ConfigError
from gptjax.models.params import Params, decay_mask


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
    """The chain ``clip -> Adam -> weight decay -> learning rate``, cut after Adam's moments.

    Run as one update, XLA copies both moments: the parameters' kernel re-reads the old ones after they were
    overwritten. Cut in two, each stage (`update_moments`, `update_params`) overwrites its donated buffers in place.
    """

    moments: optax.GradientTransformation
    step: optax.GradientTransformation
    schedule: optax.Schedule
    cfg: OptimConfig


class OptState(NamedTuple):
    """States of the two stages."""

    moments: Any
    step: Any


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


def make_optimizer(cfg: OptimConfig, steps: int) -> Optimizer:
    """The optimizer of a run of ``steps`` steps."""
    schedule = make_schedule(cfg, steps)
    clip = clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    moments = optax.chain(clip, optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps))
    step = optax.chain(
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(moments, step, schedule, cfg)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale the gradients down to a global norm of at most ``max_norm`` (Pascanu et al. 2013, arXiv:1211.5063).

    As `optax.clip_by_global_norm`, but with one factor for all elements: XLA fuses a product into the kernels that
    update the moments, where it stores a quotient, which costs a copy of the gradients.
    """

    def update(grads: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm > max_norm, max_norm / norm, jnp.ones((), norm.dtype))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init_opt_state(optimizer: Optimizer, params: Params) -> OptState:
    """Moments of zero and counters at zero."""
    return OptState(optimizer.moments.init(params), optimizer.step.init(params))


def update_moments(optimizer: Optimizer, moments: Any, grads: Params, loss: Float[Array, ""]) -> tuple[Any, Array, Array]:
    """First stage: (moments' state, gradient norm before clipping, whether loss and gradients are finite).

    Where they are not, the state stays as it was, counters included.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    _, new = optimizer.moments.update(grads, moments)
    return _where(finite, new, moments), norm, finite


def update_params(optimizer: Optimizer, moments: Any, step: Any, params: Params, finite: Bool[Array, ""]) -> tuple[Params, Any]:
    """Second stage, from the new moments: (parameters, the step's state); both unchanged where ``finite`` is false."""
    _, adam = moments
    cfg = optimizer.cfg
    m = optax.tree.bias_correction(adam.mu, cfg.beta1, adam.count)
    v = optax.tree.bias_correction(adam.nu, cfg.beta2, adam.count)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.eps), m, v)
    updates, new = optimizer.step.update(direction, step, params)
    return _where(finite, optax.apply_updates(params, updates), params), _where(finite, new, step)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
