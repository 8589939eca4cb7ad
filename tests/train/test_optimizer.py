import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.errors import ConfigError
from gptjax.models.params import decay_mask
from gptjax.optim import (
    OptimConfig,
    init_opt_state,
    make_optimizer,
    make_schedule,
    update,
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


def compiled(optimizer, native=False):
    """A function of ((parameters, optimizer's state), gradient, loss) that returns the first two and metrics after one step."""

    @jax.jit
    def step(state, grads, loss=1.0):
        return update(optimizer, *state, grads, jnp.asarray(loss), optax.tree.norm(grads), native)

    return step


def run(cfg, gradients, params, **how):
    optimizer = make_optimizer(cfg, 10)
    step, state = compiled(optimizer, **how), (params, init_opt_state(optimizer, params))
    for grads in gradients:
        *state, _ = step(tuple(state), grads)
    return tuple(state)


def gradients_like(params, n, size=1.0):
    keys = jax.random.split(jax.random.key(2), n)
    return [jax.tree.map(lambda p, k=k: size * jax.random.normal(k, p.shape, p.dtype), params) for k in keys]


def optaxs(cfg, gradients, params):
    """What optax's own transformations make of them."""
    adamw = functools.partial(optax.adamw, weight_decay=cfg.weight_decay, mask=decay_mask, mu_dtype=cfg.mu_dtype)
    reference = optax.chain(
        optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity(),
        adamw(make_schedule(cfg, 10), cfg.beta1, cfg.beta2, cfg.eps),
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = reference.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = reference.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state[1][0]


SETTINGS = OptimConfig(learning_rate=0.01, warmup_steps=3, weight_decay=0.3, grad_clip=5.0)


def assert_equals_optax(cfg, params, tolerance, size=1.0, **how):
    gradients = gradients_like(params, 6, size)
    trained, state = run(cfg, gradients, params, **how)
    theirs, adam = optaxs(cfg, gradients, params)
    found, wanted = ((p, s.mu, s.nu) for p, s in ((trained, state.moments[1]), (theirs, adam)))
    for ours, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert ours.dtype == expected.dtype
        assert relative_l2(ours, expected) < tolerance
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        assert jnp.abs(after - before).max() > 1e-3
    assert state.moments[1].count == adam.count == 6


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": "scan"}, {"grad_clip": 0.0}, {"grad_clip": 1e9}, {"beta1": 0.0, "beta2": 0.0}, {"weight_decay": 0.0}],
    ids=str,
)
def test_the_update_equals_optaxs_adamw(changes):
    """Also where the gradient is not clipped."""
    changes = dict(changes)
    params = tiny.params(tiny.config(layers=changes.pop("layers", "unroll")))
    assert_equals_optax(dataclasses.replace(SETTINGS, **changes), params, 1e-13)


def test_a_first_moment_in_bfloat16_is_optaxs():
    """But rounded once, when it is kept: optax rounds its product with beta1, too."""
    with jax.enable_x64(False):
        params = tiny.params(tiny.config(dtype="float32"), jnp.float32)
        cfg = dataclasses.replace(SETTINGS, mu_dtype="bfloat16")
        assert run(cfg, gradients_like(params, 1), params)[1].moments[1].mu.wte.dtype == jnp.bfloat16
        assert_equals_optax(cfg, params, 2**-7)
        gradients = gradients_like(params, 6)
        runs = run(SETTINGS, gradients, params), run(cfg, gradients, params), optaxs(cfg, gradients, params)
        exact, ours, theirs = (trained.wte for trained, _ in runs)
        assert 0 < relative_l2(ours, exact) < relative_l2(theirs, exact) < 1e-2


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_update_equals_optaxs_for_small_and_large_gradients(size):
    cfg = dataclasses.replace(SETTINGS, grad_clip=5.0 * min(size, 1.0), eps=1e-12)
    with jax.enable_x64(False):
        assert_equals_optax(cfg, tiny.params(tiny.config(dtype="float32"), jnp.float32), 1e-5, size)


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
    before = params, init_opt_state(optimizer, params)
    *after, metrics = compiled(optimizer)(before, good, bad)
    assert not metrics.finite
    assert jnp.isfinite(metrics.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, tuple(after), before)


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
