import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.errors import ConfigError
from gptjax.models.params import decay_mask
from gptjax.optim import (
    OptimConfig,
    OptState,
    clip_by_global_norm,
    init_opt_state,
    make_optimizer,
    make_schedule,
    update_moments,
    update_params,
)
from tests.compare import relative_l2
from tests.models import tiny


def rates(steps=10, **options):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **options), steps)
    return [round(float(schedule(n)), 6) for n in range(steps)]


def test_warmup_rises_linearly_to_the_peak():
    """llm.c's: step n of w uses (n + 1) / w."""
    assert rates(6, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1]


def test_schedules_by_hand():
    assert rates(4, schedule="constant") == [1, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="linear", final_fraction=0.2) == [1, 0.8, 0.6, 0.4]
    assert rates(4, schedule="cosine") == [1, 0.853553, 0.5, 0.146447]
    assert rates(4, schedule="cosine", final_fraction=0.5)[2] == 0.75
    assert rates(6, schedule="cosine", warmup_steps=2) == [0.5, 1, 1, 0.853553, 0.5, 0.146447]
    assert rates(10, schedule="wsd", decay_fraction=0.4) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(10, schedule="wsd", warmup_steps=2, decay_fraction=0.2) == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]


def test_clipping_by_hand():
    """A gradient of norm 5 clipped to 1 keeps its direction; one of norm below the limit stays as it is."""
    clip = clip_by_global_norm(1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([0.0, 4.0])}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["a"], [0.6])
    np.testing.assert_allclose(clipped["b"], [0, 0.8])
    small = jax.tree.map(lambda g: g / 10, grads)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), clip.update(small, clip.init(grads))[0], small))


def run(cfg, gradients, params):
    """Our two stages, one after the other for each gradient."""
    optimizer = make_optimizer(cfg, 10)
    state = init_opt_state(optimizer, params)
    for grads in gradients:
        moments, _, finite = update_moments(optimizer, state.moments, grads, jnp.float64(1.0))
        params, step = update_params(optimizer, moments, state.step, params, finite)
        state = OptState(moments, step)
    return params, state


def gradients_like(params, n, size=1.0):
    keys = jax.random.split(jax.random.key(2), n)
    return [jax.tree.map(lambda p, k=k: size * jax.random.normal(k, p.shape, p.dtype), params) for k in keys]


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_two_stages_equal_optaxs_adamw(layers):
    cfg = OptimConfig(learning_rate=0.01, warmup_steps=3, weight_decay=0.3, grad_clip=5.0)
    params = tiny.params(tiny.config(layers=layers))
    gradients = gradients_like(params, 6)
    ours, _ = run(cfg, gradients, params)
    reference = optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adamw(make_schedule(cfg, 10), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=decay_mask),
    )
    theirs, state = params, reference.init(params)
    for grads in gradients:
        updates, state = reference.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    moved = jax.tree.map(lambda a, b: a - b, theirs, params)
    for mine, wanted, size in zip(*map(jax.tree.leaves, (ours, theirs, moved)), strict=True):
        assert relative_l2(mine, wanted) < 1e-13
        assert jnp.abs(size).max() > 1e-3


def test_first_step_by_hand():
    """After one step Adam's direction is the gradient's sign, so p becomes p - lr (sign(g) + decay p)."""
    params = tiny.params(tiny.CONFIG)
    (grads,) = gradients_like(params, 1)
    ours, _ = run(OptimConfig(learning_rate=0.01, schedule="constant", weight_decay=0.5, eps=1e-20), [grads], params)
    np.testing.assert_allclose(ours.wte, params.wte - 0.01 * (jnp.sign(grads.wte) + 0.5 * params.wte), rtol=1e-9)
    np.testing.assert_allclose(ours.fcb[1], params.fcb[1] - 0.01 * jnp.sign(grads.fcb[1]), rtol=1e-9)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradients_and_losses_change_nothing(bad):
    params = tiny.params(tiny.CONFIG)
    good, other = gradients_like(params, 2)
    poisoned = other._replace(fcb=(other.fcb[0].at[0].set(bad), other.fcb[1]))
    cfg = OptimConfig(learning_rate=0.01)
    for expected, got in zip(
        jax.tree.leaves(run(cfg, [good], params)), jax.tree.leaves(run(cfg, [good, poisoned], params)), strict=True
    ):
        np.testing.assert_array_equal(expected, got)
    optimizer = make_optimizer(cfg, 10)
    state = init_opt_state(optimizer, params)
    moments, norm, finite = update_moments(optimizer, state.moments, good, jnp.asarray(bad))
    assert not finite
    assert jnp.isfinite(norm)
    assert moments[1].count == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "optim.learning_rate must not be negative"),
        ({"learning_rate": float("nan")}, "optim.learning_rate"),
        ({"beta2": 1.0}, "optim.beta2"),
        ({"eps": 0.0}, "optim.eps must be above 0"),
        ({"accumulate": 0}, "optim.accumulate"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"final_fraction": 2.0}, "optim.final_fraction"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**changes)
