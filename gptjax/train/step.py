"""One training step and one evaluation step as compiled functions."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from gptjax.config import Backward, ModelConfig
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.models.params import init_params, param_axes
from gptjax.ops import IGNORE_INDEX
from gptjax.parallel import mesh as meshes
from gptjax.parallel.sharding import on_mesh
from gptjax.train.optimizer import Optimizer, StepMetrics, fused_update, update
from gptjax.xla import native
from gptjax.xla.compile_options import compile_tuned
from gptjax.xla.norms import global_norm

# An update whose temporaries exceed this fraction of the parameters copies its donated buffers
COPYING_FRACTION = 1 / 8


class TrainState(NamedTuple):
    """Everything a step changes, on the device."""

    params: Any
    opt_state: Any
    """The state of ``optimizer.transform``."""


def init_state(key: Key[Array, ""], cfg: ModelConfig, optimizer: Optimizer) -> TrainState:
    """Fresh parameters and optimizer state as a pure function, to trace for shapes; `make_state`
    allocates them.
    """
    params = init_params(key, cfg)
    return TrainState(params, optimizer.transform.init(params))


def make_state(
    key: Key[Array, ""], cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None = None
) -> TrainState:
    """Compute `init_state` in no more memory than a step: the temporaries for drawing the
    parameters are freed before the optimizer state is allocated.

    On a mesh each device draws its own part, with the same values.
    """
    draw = jax.jit(
        lambda key: init_params(key, cfg),
        out_shardings=meshes.param_shardings(mesh, param_axes(cfg)) if mesh else None,
    )
    return add_optimizer(compile_for_memory(draw.lower(key))(key), cfg, optimizer, mesh)


def add_optimizer(
    params: Any, cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None = None
) -> TrainState:
    """Add a fresh optimizer state to the parameters, in their layout."""
    params = jax.block_until_ready(params)
    init = lambda params: optimizer.transform.init(params)  # noqa: E731
    layout = meshes.shardings(mesh, param_axes(cfg), jax.eval_shape(init, params)) if mesh else None
    return TrainState(params, jax.jit(init, out_shardings=layout)(params))


def step_arguments(
    cfg: ModelConfig,
    optimizer: Optimizer,
    shape: tuple[int, int, int],
    mesh: Mesh | None = None,
    packed: bool = False,
) -> tuple[TrainState, Batch, Any]:
    """Shapes of a step's (state, batch, key), with their layout on a mesh, for `compile_step`;
    nothing is allocated.

    Args:
        cfg: resolved.
        optimizer: the optimizer of the state.
        shape: (A, B, T) of the batch over all devices.
        mesh: a mesh of this machine's devices, or of a topology to compile for ahead of time.
        packed: whether batches have segments.

    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = meshes.abstract(
        mesh, param_axes(cfg), jax.eval_shape(lambda key: init_state(key, cfg, optimizer), key)
    )
    ids = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=meshes.row_sharding(mesh, 3) if mesh else None
    )
    batch = Batch(ids, ids, segments=ids if packed else None)
    return state, batch, meshes.abstract(mesh, param_axes(cfg), key)


def mean_loss_and_grad(
    params: Any, batch: Batch, key: Key[Array, ""] | None, cfg: ModelConfig, backward: Backward
) -> tuple[Float[Array, ""], Any]:
    """Loss and gradient of A micro-batches, equal to those of one batch of A B sequences.

    Args:
        params: the parameters.
        batch: (A, B, T) arrays.
        key: dropout's key, split over the micro-batches.
        cfg: resolved.
        backward: ``manual`` runs the hand-written backward, ``autodiff`` JAX's.

    """
    count = target_count(batch)

    def one(batch: Batch, key: Any) -> tuple[Array, Any]:
        if backward == "manual":
            return transformer.loss_and_grad(params, batch, cfg, key, count)
        # Under autodiff each chunk's scores are computed twice: no chunks unless asked for
        chunks: Any = 1 if cfg.loss_chunks == "auto" else cfg.loss_chunks
        plain = dataclasses.replace(cfg, loss_chunks=chunks)
        return jax.value_and_grad(transformer.loss)(params, batch, plain, key, count)

    A = batch.inputs.shape[0]
    keys = None if key is None else jax.random.split(key, A)
    if A == 1:
        return one(*jax.tree.map(lambda x: x[0], (batch, keys)))

    def add(total: Any, batch_key: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*batch_key)), None

    zeros = jnp.zeros((), loss_dtype(cfg)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, (batch, keys))[0]


def step_key(key: Key[Array, ""], step: Int[Array, ""], cfg: ModelConfig) -> Key[Array, ""] | None:
    """Dropout's key for a step; None without dropout."""
    return jax.random.fold_in(key, step) if cfg.dropout or cfg.dropout_mlp else None


def target_count(batch: Batch) -> Float[Array, ""]:
    """The number of targets that count, weighted by their mask."""
    mask = jnp.ones(batch.targets.shape, jnp.float32) if batch.mask is None else batch.mask
    return jnp.where(batch.targets == IGNORE_INDEX, 0.0, mask).sum()


def loss_dtype(cfg: ModelConfig) -> Any:
    """The loss's dtype: float32, or float64 if the model computes in float64."""
    return jnp.float64 if cfg.dtype == "float64" else jnp.float32


class CompiledStep(NamedTuple):
    """A compiled training step: its executables and their memory."""

    gradient: jax.stages.Compiled
    """See `StepFunctions`."""
    updates: tuple[jax.stages.Compiled, ...]
    """``(update,)``, or ``(update_params, update_rest)``; see `StepFunctions`."""
    native_code: bool
    """Whether the update runs in `gptjax.xla.native`."""
    memory: dict[str, int]
    """Bytes on each device: parameters, optimizer, gradients, temporaries."""


class StepFunctions(NamedTuple):
    """The training step as jitted functions to lower, whose buffers are donated.

    Gradient and update are separate, because in a single program XLA copies donated buffers. In
    ``update`` it copies them, too, if it does not fuse the outputs, as on CPU. The update in two
    parts needs no copy, but reads more memory.
    """

    gradient: Any
    """(params, batch, key, step, buffer) -> (loss, gradient, its norm). The gradient overwrites
    ``buffer``.
    """
    update: Any
    """(params, opt_state, gradient, loss, norm, step) -> (params, opt_state, metrics)."""
    update_params: Any
    """The part of the update that returns params."""
    update_rest: Any
    """The part that returns (opt_state, metrics); it does not depend on its params."""


def step_functions(
    cfg: ModelConfig,
    optimizer: Optimizer,
    backward: Backward,
    mesh: Mesh | None = None,
    native_code: bool = False,
) -> StepFunctions:
    """The jitted functions of the training step; ``native_code`` is passed to `fused_update`."""

    def gradient(
        params: Any, batch: Batch, key: Any, step: Array, buffer: Any
    ) -> tuple[Array, Any, Array]:
        loss, grads = mean_loss_and_grad(params, batch, step_key(key, step, cfg), cfg, backward)
        return loss, grads, global_norm(grads)

    def whole(
        params: Any, opt_state: Any, grads: Any, loss: Array, norm: Array, step: Array
    ) -> Any:
        if optimizer.fused:
            return fused_update(optimizer, params, opt_state, grads, loss, norm, native_code)
        return update(optimizer, params, opt_state, grads, loss, norm, step - 1)

    parts = lambda *args: whole(*args)[0], lambda *args: whole(*args)[1:]
    layouts: list[Any] = [None] * 4
    if mesh:
        state = step_arguments(cfg, optimizer, (1, 1, 1))[0]
        params, opt_state = meshes.shardings(mesh, param_axes(cfg), state)
        everywhere = meshes.replicated(mesh)
        layouts = [
            (everywhere, params, everywhere),
            (params, opt_state, everywhere),
            params,
            (opt_state, everywhere),
        ]
    return StepFunctions(
        gradient=jax.jit(
            on_mesh(mesh, gradient), donate_argnums=4, keep_unused=True, out_shardings=layouts[0]
        ),
        update=jax.jit(whole, donate_argnums=(0, 1), out_shardings=layouts[1]),
        update_params=jax.jit(parts[0], donate_argnums=0, out_shardings=layouts[2]),
        update_rest=jax.jit(parts[1], donate_argnums=1, out_shardings=layouts[3]),
    )


def compile_step(
    cfg: ModelConfig,
    optimizer: Optimizer,
    backward: Backward,
    state: Any,
    batch: Any,
    key: Any,
    mesh: Mesh | None = None,
) -> CompiledStep:
    """Compile the training step for arguments with these shapes: arrays or `jax.ShapeDtypeStruct`s,
    laid out over the mesh.

    On CPU the update is C++ if it can be; elsewhere it is one program if that copies no buffers.
    Otherwise it is two programs.
    """
    all_float32 = all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    native_code = mesh is None and optimizer.fused and all_float32 and native.available("adamw")
    functions = step_functions(cfg, optimizer, backward, mesh, native_code)
    number = meshes.abstract(mesh, param_axes(cfg), jax.ShapeDtypeStruct((), jnp.int32))
    g = meshes.abstract(mesh, param_axes(cfg), jax.eval_shape(lambda params: params, state.params))
    lowered = functions.gradient.lower(state.params, batch, key, number, g)
    loss, _, norm = lowered.out_info
    scalars = tuple(jax.ShapeDtypeStruct((), x.dtype) for x in (loss, norm))
    gradient = compile_for_memory(lowered, mesh)
    arguments = (
        state.params,
        state.opt_state,
        g,
        *meshes.abstract(mesh, param_axes(cfg), scalars),
        number,
    )
    updates: tuple[Any, ...] = ()
    if native_code or platform_of(mesh) != "cpu":
        updates = (functions.update.lower(*arguments).compile(),)
    if not native_code and (
        not updates or temporary_bytes(*updates) > bytes_per_device(g) * COPYING_FRACTION
    ):
        updates = tuple(
            f.lower(*arguments).compile() for f in (functions.update_params, functions.update_rest)
        )
    memory = {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "gradients": bytes_per_device(g),
        "temporaries": temporary_bytes(gradient, *updates),
    }
    return CompiledStep(gradient, updates, native_code, memory)


def gradient_buffer(params: Any) -> Any:
    """Zeros like the parameters, which the first step's gradient overwrites.

    With a new allocation for every gradient, glibc's heap fragments after some steps: training 774M
    took 1.6 times the predicted memory.
    """
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, params))(params)


def run_step(
    compiled: CompiledStep, state: TrainState, buffer: Any, batch: Batch, key: Any, step: int
) -> tuple[TrainState, Any, StepMetrics]:
    """Dispatch one step; returns at once, while the arrays are computed. ``state`` and ``buffer``
    are donated.

    Args:
        compiled: from `compile_step`.
        state: the state to update.
        buffer: from `gradient_buffer` or the step before.
        batch: (A, B, T) arrays.
        key: the run's key.
        step: number of the step, from 1.

    Returns:
        The state, the buffer for the next step, and the metrics.

    """
    number = np.int32(step)
    loss, grads, norm = compiled.gradient(state.params, batch, key, number, buffer)
    if len(compiled.updates) == 1:
        params, opt_state, metrics = compiled.updates[0](*state, grads, loss, norm, number)
    else:
        params = compiled.updates[0](*state, grads, loss, norm, number)
        opt_state, metrics = compiled.updates[1](params, state.opt_state, grads, loss, norm, number)
    return TrainState(params, opt_state), grads, metrics


def platform_of(mesh: Mesh | None) -> str:
    """The platform to compile for: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def temporary_bytes(*programs: Any) -> int:
    """Bytes of temporaries of programs that run one after the other."""
    return max(program.memory_analysis().temp_size_in_bytes for program in programs)


def compile_for_memory(lowered: jax.stages.Lowered, mesh: Mesh | None = None) -> Any:
    """Compile with the options that a step's programs need on this platform."""
    return compile_tuned(lowered, mesh.devices.flat[0] if mesh else jax.devices()[0])


@functools.cache
def make_eval_loss(cfg: ModelConfig, mesh: Mesh | None = None) -> Any:
    """A jitted ``(params, batch) -> (summed loss, number of targets)`` without dropout; every
    process has the whole batch.

    It is cached, so that it is compiled once for the same arguments.
    """

    def eval_loss(params: Any, batch: Batch) -> tuple[Array, Array]:
        count = target_count(batch)
        return transformer.loss(params, batch, cfg) * count, count

    if mesh is None:
        return jax.jit(eval_loss)
    compiled = jax.jit(on_mesh(mesh, eval_loss), out_shardings=meshes.replicated(mesh))
    return lambda params, batch: compiled(params, meshes.place_rows(mesh, batch))


def evaluate(eval_loss: Any, params: Any, batches: list[Batch]) -> float:
    """Mean loss in nats over all targets of ``batches`` that count."""
    sums = [eval_loss(params, batch) for batch in batches]
    return sum(float(total) for total, _ in sums) / max(sum(float(count) for _, count in sums), 1.0)


def bytes_per_device(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on one device."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape  # noqa: E731
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
