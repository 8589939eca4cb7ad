import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import OptimConfig
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.models.params import init_params
from gptjax.ops import IGNORE_INDEX
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.xla import native
from tests.compare import assert_same_gradients
from tests.models import tiny

KEY = jax.random.key(0)


@pytest.mark.parametrize("backward", ["manual", "autodiff"])
def test_accumulation_equals_the_large_batch(backward):
    """Also where the micro-batches count unequal numbers of targets: each target weighs the
    same.
    """
    cfg = tiny.CONFIG
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=6)
    batch = batch._replace(
        targets=batch.targets.at[0].set(IGNORE_INDEX).at[1, :3].set(IGNORE_INDEX)
    )
    loss, grads = transformer.loss_and_grad(params, batch, cfg)
    for A in (1, 2, 3, 6):
        pieces = jax.tree.map(lambda x, A=A: x.reshape(A, 6 // A, -1), batch)
        loss2, grads2 = steps.mean_loss_and_grad(params, pieces, None, cfg, backward)
        assert float(loss2) == pytest.approx(float(loss), rel=1e-13)
        assert_same_gradients(grads2, grads, params)


def compiled(cfg, backward="manual", learning_rate=0.01, **optim):
    optimizer = make_optimizer(
        OptimConfig(learning_rate=learning_rate, schedule="constant", **optim), 100, cfg
    )
    with jax.enable_x64(False):
        state = jax.jit(lambda key: steps.init_state(key, cfg, optimizer))(KEY)
        batch = tiny.batch(cfg, B=2, T=12)
        batch = jax.tree.map(lambda x: x[None], batch)
        return steps.compile_step(cfg, optimizer, backward, state, batch, KEY), state, batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", ["manual", "autodiff"])
def test_training_learns_a_batch_by_heart(backward, dtype):
    cfg = tiny.config(dtype=dtype, channels=32, dropout=0.0)
    step, state, batch = compiled(cfg, backward)
    losses = []
    with jax.enable_x64(False):
        buffer = steps.gradient_buffer(state.params)
        for n in range(1, 61):
            state, buffer, metrics = steps.run_step(step, state, buffer, batch, KEY, n)
            losses.append(metrics.loss.item())
    assert losses[0] == pytest.approx(np.log(11), rel=0.05)
    assert losses[-1] < 0.2
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize("native_code", [True, False])
def test_the_update_needs_no_temporaries_and_works_in_place(native_code, in_cpp):
    """In C++ or in two parts by XLA; both are the same step."""
    if native_code and not native.available("adamw"):
        pytest.skip("there is no C++ compiler")
    in_cpp(native_code)
    step, state, batch = compiled(tiny.config(dtype="float32", channels=64))
    assert len(step.updates) == (1 if native_code else 2)
    memory = [program.memory_analysis() for program in step.updates]
    assert max(m.temp_size_in_bytes for m in memory) < 4096
    assert sum(m.alias_size_in_bytes for m in memory) >= 3 * step.memory["parameters"]
    with jax.enable_x64(False):
        _, grads, _ = step.gradient(
            state.params, batch, KEY, np.int32(1), steps.gradient_buffer(state.params)
        )
        expected = (
            state.params.wte[0, 0]
            - 0.01 * jnp.sign(grads.wte[0, 0])
            - 0.01 * 0.1 * state.params.wte[0, 0]
        )
        after, _, metrics = steps.run_step(step, state, grads, batch, KEY, 1)
    assert float(after.params.wte[0, 0]) == pytest.approx(float(expected), rel=1e-5)
    assert after.opt_state[1][0].count == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert metrics.finite


def test_in_float64_xla_updates():
    cfg = tiny.CONFIG
    optimizer = make_optimizer(OptimConfig(), 9, cfg)
    params = tiny.params(cfg)
    state = steps.TrainState(params, optimizer.transform.init(params))
    batch = jax.tree.map(lambda x: x[None], tiny.batch(cfg))
    step = steps.compile_step(cfg, optimizer, "manual", state, batch, KEY)
    assert not step.native_code
    state, _, _ = steps.run_step(step, state, steps.gradient_buffer(params), batch, KEY, 1)
    assert state.params.wte.dtype == jnp.float64


def test_a_gradient_overwrites_the_one_before_it():
    step, state, batch = compiled(tiny.config(dtype="float32"))
    assert step.gradient.memory_analysis().alias_size_in_bytes >= step.memory["gradients"]
    with jax.enable_x64(False):
        arguments = state.params, batch, KEY, np.int32(1)
        _, fresh, _ = step.gradient(*arguments, steps.gradient_buffer(state.params))
        used = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
        _, over, norm = step.gradient(*arguments, used)
        assert all(x.is_deleted() for x in jax.tree.leaves(used))
        assert_same_gradients(over, fresh, state.params, 0)
        assert norm == pytest.approx(float(optax.tree.norm(fresh)), rel=1e-6)
        _, buffer, _ = steps.run_step(step, state, fresh, batch, KEY, 1)
        assert_same_gradients(buffer, over, state.params, 0)


def test_dropout_draws_anew_each_step_and_repeats_for_the_same_step():
    step, state, batch = compiled(tiny.config(dtype="float32", dropout=0.5))
    with jax.enable_x64(False):
        first, again, other = (
            float(
                step.gradient(
                    state.params, batch, KEY, np.int32(n), steps.gradient_buffer(state.params)
                )[0]
            )
            for n in (1, 1, 2)
        )
    assert first == again != other


def test_evaluation_is_the_mean_over_targets_not_over_batches():
    cfg = tiny.CONFIG
    params, whole = tiny.params(cfg), tiny.batch(cfg, B=4)
    mask = jnp.ones(whole.targets.shape).at[3].set(0.0)
    whole = whole._replace(mask=mask)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], whole) for i in (0, 2)]
    expected = float(transformer.loss(params, whole, cfg))
    assert steps.evaluate(steps.make_eval_loss(cfg), params, parts) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("backward", ["manual", "autodiff"])
def test_the_step_lowers_for_every_platform(platform, layers, backward, monkeypatch):
    """`jax.export` for hardware that need not be here, with what `resolve` picks there; on CUDA
    with cuDNN's attention.
    """
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    cfg = tiny.config(
        dtype="auto", attention="auto", layers=layers, channels=16, max_seq_len=64
    ).resolve(platform, 64)
    optimizer = make_optimizer(OptimConfig(), 10, cfg)
    state = jax.eval_shape(functools.partial(steps.init_state, cfg=cfg, optimizer=optimizer), KEY)
    ids = jax.ShapeDtypeStruct((2, 2, 64), jnp.int32)
    functions = steps.step_functions(cfg, optimizer, backward)
    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
    export = functools.partial(jax.export.export, platforms=[platform], disabled_checks=allowed)
    args = (
        state.params,
        Batch(ids, ids),
        jax.eval_shape(lambda: KEY),
        jax.ShapeDtypeStruct((), jnp.int32),
        state.params,
    )
    text = export(functions.gradient)(*args).mlir_module()
    assert all((call in text) == (platform == "cuda") for call in calls)
    loss, g, norm = jax.eval_shape(functions.gradient, *args)
    for update in (functions.update, functions.update_params, functions.update_rest):
        assert export(update)(state.params, state.opt_state, g, loss, norm, args[3]).platforms == (
            platform,
        )


def memory_of_gradients(compile_, **changes):
    """A function of T: the bytes of temporaries of a float32 gradient."""
    cfg = tiny.config(
        dtype="float32",
        num_layers=4,
        channels=32,
        max_seq_len=2048,
        attention="blockwise",
        **changes,
    )
    params = jax.eval_shape(lambda: tiny.params(cfg, jnp.float32))

    def of(T: int) -> int:
        batch = jax.eval_shape(lambda: tiny.batch(cfg, B=2, T=T))
        lowered = jax.jit(functools.partial(transformer.loss_and_grad, cfg=cfg)).lower(
            params, batch
        )
        return compile_(lowered).memory_analysis().temp_size_in_bytes

    return of


def test_the_scheduler_saves_memory():
    default = memory_of_gradients(lambda lowered: lowered.compile())(256)
    assert memory_of_gradients(steps.compile_for_memory)(256) < default


def test_memory_is_linear_in_length_and_bounded_in_the_vocabulary():
    small = memory_of_gradients(steps.compile_for_memory, vocab_size=512, loss_chunks=4)
    large = memory_of_gradients(steps.compile_for_memory, vocab_size=2048, loss_chunks=16)
    sizes = [small(T) for T in (512, 1024, 2048)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.05)
    assert large(1024) == pytest.approx(small(1024), rel=0.05)


def test_the_fresh_parameters_are_drawn_in_turns():
    """So that they need less memory than a step."""
    cfg = tiny.config(num_layers=8, channels=64)
    optimizer = make_optimizer(OptimConfig(), 10, cfg)
    made, expected = steps.make_state(KEY, cfg, optimizer), steps.init_state(KEY, cfg, optimizer)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), made, expected)
    draw = jax.jit(lambda key: init_params(key, cfg)).lower(KEY)
    by_turns, at_once = (
        c.memory_analysis().temp_size_in_bytes
        for c in (steps.compile_for_memory(draw), draw.compile())
    )
    assert by_turns < at_once
    arguments = steps.step_arguments(cfg, optimizer, (1, 2, 4))
    assert (
        by_turns < sum(steps.compile_step(cfg, optimizer, "manual", *arguments).memory.values()) / 2
    )
