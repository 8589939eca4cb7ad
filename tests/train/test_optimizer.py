import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import OptimConfig
from gptjax.errors import ConfigError
from gptjax.models.params import decay_mask, rows
from gptjax.train.optimizer import fused_update, make_optimizer, make_schedule, update
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
    assert rates(10, schedule="wsd", warmup_steps=2, decay_fraction=0.2) == [
        0.5,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        0.5,
    ]


def step_function(optimizer, fused, native_code=False):
    """A function of ((parameters, optimizer's state), gradient, loss) that returns the first two
    and metrics after one step.
    """

    @jax.jit
    def step(state, grads, loss=1.0, done=0):
        norm = optax.tree.norm(grads)
        if fused:
            return fused_update(optimizer, *state, grads, jnp.asarray(loss), norm, native_code)
        return update(optimizer, *state, grads, jnp.asarray(loss), norm, done)

    return step


def run(cfg, gradients, params, model, fused=True, **how):
    optimizer = make_optimizer(cfg, 10, model)
    step, state = step_function(optimizer, fused, **how), (params, optimizer.transform.init(params))
    for grads in gradients:
        *state, _ = step(tuple(state), grads)
    return tuple(state)


def gradients_like(params, n, size=1.0):
    keys = jax.random.split(jax.random.key(2), n)
    return [
        jax.tree.map(lambda p, k=k: size * jax.random.normal(k, p.shape, p.dtype), params)
        for k in keys
    ]


def run_optax(transform, cfg, gradients, params):
    """Parameters and state after optax's own transformation, with clipping before it."""
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    reference = optax.chain(clip, transform)

    @jax.jit
    def step(params, state, grads):
        updates, state = reference.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = reference.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def adamw(cfg, model):
    return optax.adamw(
        make_schedule(cfg, 10),
        cfg.beta1,
        cfg.beta2,
        cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=functools.partial(decay_mask, cfg=model),
        mu_dtype=cfg.mu_dtype,
    )


SETTINGS = OptimConfig(learning_rate=0.01, warmup_steps=3, weight_decay=0.3, grad_clip=5.0)


def assert_equals_optax(cfg, model, params, tolerance, size=1.0, **how):
    gradients = gradients_like(params, 6, size)
    found = run(cfg, gradients, params, model, **how)
    wanted = run_optax(adamw(cfg, model), cfg, gradients, params)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert ours.dtype == expected.dtype
        assert relative_l2(ours, expected) < tolerance
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(wanted[0]), strict=True):
        assert jnp.abs(after - before).max() > 1e-3
    assert found[1][1][0].count == 6


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": "scan"},
        {"grad_clip": 0.0},
        {"grad_clip": 1e9},
        {"beta1": 0.0, "beta2": 0.0},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_adamw_equals_optaxs_on_optaxs_own_state(changes, fused):
    """Also where the gradient is not clipped."""
    changes = dict(changes)
    model = tiny.config(layers=changes.pop("layers", "unroll"))
    assert_equals_optax(
        dataclasses.replace(SETTINGS, **changes), model, tiny.params(model), 1e-13, fused=fused
    )


def test_a_first_moment_in_bfloat16_is_optaxs():
    """But rounded once, when it is kept: optax rounds its product with beta1, too."""
    with jax.enable_x64(False):
        model = tiny.config(dtype="float32")
        params = tiny.params(model, jnp.float32)
        cfg = dataclasses.replace(SETTINGS, mu_dtype="bfloat16")
        assert (
            run(cfg, gradients_like(params, 1), params, model)[1][1][0].mu.wte.dtype == jnp.bfloat16
        )
        assert_equals_optax(cfg, model, params, 2**-7)
        gradients = gradients_like(params, 6)
        exact, ours = (run(c, gradients, params, model)[0].wte for c in (SETTINGS, cfg))
        theirs = run_optax(adamw(cfg, model), cfg, gradients, params)[0].wte
        assert 0 < relative_l2(ours, exact) < relative_l2(theirs, exact) < 1e-2


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_adamw_equals_optaxs_for_small_and_large_gradients(size):
    cfg = dataclasses.replace(SETTINGS, grad_clip=5.0 * min(size, 1.0), eps=1e-12)
    model = tiny.config(dtype="float32")
    with jax.enable_x64(False):
        assert_equals_optax(cfg, model, tiny.params(model, jnp.float32), 1e-5, size)


def test_first_step_by_hand():
    """After one step Adam's direction is the gradient's sign, so p becomes p - lr (sign(g) + decay
    p).
    """
    params = tiny.params(tiny.CONFIG)
    (grads,) = gradients_like(params, 1)
    cfg = OptimConfig(learning_rate=0.01, schedule="constant", weight_decay=0.5, eps=1e-20)
    ours, _ = run(cfg, [grads], params, tiny.CONFIG)
    np.testing.assert_allclose(
        ours.wte, params.wte - 0.01 * (jnp.sign(grads.wte) + 0.5 * params.wte), rtol=1e-9
    )
    before, g, after = (tree.blocks[1] for tree in (params, grads, ours))
    np.testing.assert_allclose(
        after.qw, before.qw - 0.01 * (jnp.sign(g.qw) + 0.5 * before.qw), rtol=1e-9
    )
    np.testing.assert_allclose(after.qb, before.qb - 0.01 * jnp.sign(g.qb), rtol=1e-9)


def test_lion_is_optaxs():
    cfg, params = dataclasses.replace(SETTINGS, name="lion"), tiny.params(tiny.CONFIG)
    mask = functools.partial(decay_mask, cfg=tiny.CONFIG)
    lion = optax.lion(
        make_schedule(cfg, 10), cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=mask
    )
    gradients = gradients_like(params, 3)
    found, wanted = (
        run(cfg, gradients, params, tiny.CONFIG, fused=False),
        run_optax(lion, cfg, gradients, params),
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13), found, wanted)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("sgd", lambda rate: optax.sgd(rate, 0.95)), ("adafactor", optax.adafactor)],
)
def test_without_decay_sgd_and_adafactor_are_optaxs(name, reference):
    cfg, params = (
        dataclasses.replace(SETTINGS, name=name, weight_decay=0.0),
        tiny.params(tiny.CONFIG),
    )
    gradients = gradients_like(params, 3)
    found, _ = run(cfg, gradients, params, tiny.CONFIG, fused=False)
    wanted, _ = run_optax(reference(make_schedule(cfg, 10)), cfg, gradients, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), found, wanted
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "sgd"])
def test_every_optimizer_decays_matrices_and_tables_only(name):
    """With gradients of zero nothing but the decay moves a parameter."""
    params = tiny.params(tiny.CONFIG)
    cfg = OptimConfig(name=name, learning_rate=0.01, schedule="constant", weight_decay=0.5)
    after, _ = run(cfg, [jax.tree.map(jnp.zeros_like, params)], params, tiny.CONFIG, fused=False)
    for tensor, layered, weight, _ in rows(tiny.CONFIG):
        old, new = (
            getattr(tree.blocks[0] if layered else tree, tensor) for tree in (params, after)
        )
        np.testing.assert_allclose(
            new, old * (1 - 0.01 * 0.5) if weight.kind != "vector" else old, rtol=1e-12
        )


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_muon_takes_the_matrices_and_adamw_the_rest(layers):
    """An update of a (C, H, D) matrix, seen as (C, H D), has nearly equal singular values; a bias
    moves as under AdamW.
    """
    model = tiny.config(layers=layers)
    params = tiny.params(model)
    (grads,) = gradients_like(params, 1)
    cfg = OptimConfig(
        name="muon", learning_rate=0.01, schedule="constant", weight_decay=0.0, grad_clip=0.0
    )
    muon, _ = run(cfg, [grads], params, model, fused=False)
    adam, _ = run(dataclasses.replace(cfg, name="adamw"), [grads], params, model, fused=False)
    np.testing.assert_allclose(muon.wte, adam.wte, rtol=1e-12)
    block = (
        (lambda tree: jax.tree.map(lambda x: x[1], tree.blocks))
        if layers == "scan"
        else (lambda tree: tree.blocks[1])
    )
    before, after, by_adam = map(block, (params, muon, adam))
    np.testing.assert_allclose(after.fcb, by_adam.fcb, rtol=1e-12)
    for name, inputs in ("qw", 8), ("attprojw", 8), ("fcw", 8):
        change = (getattr(after, name) - getattr(before, name)).reshape(inputs, -1)
        values = np.linalg.svd(change, compute_uv=False)
        assert values.max() / values.min() < 2
        # Every singular value 1, times the scale that matches AdamW's
        largest = np.sqrt(max(change.shape)) * 0.2 * 0.01
        assert values.max() == pytest.approx(largest, rel=0.3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["adamw fused", "adamw", "muon"])
def test_non_finite_gradients_and_losses_change_nothing(name, bad):
    params = tiny.params(tiny.CONFIG)
    good, other = gradients_like(params, 2)
    first, second = other.blocks
    poisoned = other._replace(blocks=(first._replace(fcb=first.fcb.at[0].set(bad)), second))
    cfg, fused = OptimConfig(name=name.split()[0], learning_rate=0.01), name.endswith("fused")
    for expected, got in zip(
        jax.tree.leaves(run(cfg, [good], params, tiny.CONFIG, fused)),
        jax.tree.leaves(run(cfg, [good, poisoned], params, tiny.CONFIG, fused)),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, got)
    optimizer = make_optimizer(cfg, 10, tiny.CONFIG)
    before = params, optimizer.transform.init(params)
    *after, metrics = step_function(optimizer, fused)(before, good, bad)
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
        ({"momentum": 1.0}, "optim.momentum"),
        (
            {"name": "adafactor", "mu_dtype": "bfloat16"},
            "optim.mu_dtype has no effect on adafactor",
        ),
        ({"final_fraction": 2.0}, "optim.final_fraction"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**changes)
