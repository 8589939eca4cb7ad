"""One training step and one evaluation step as compiled functions: the engine that the commands drive."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

import gptjax.native
from gptjax import mesh as meshes
from gptjax.models import gpt2
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, init_params
from gptjax.ops import IGNORE_INDEX
from gptjax.optim import Optimizer, OptState, StepMetrics, init_opt_state, update
from gptjax.sharding import within

Backward = Literal["manual", "autodiff"]
COPIED = 1 / 8  # of the parameters: an update that needs more room beside them copies what it is to overwrite
MEMORY_SCHEDULER: dict[str, Any] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class TrainState(NamedTuple):
    """Everything a step changes, on the device."""

    params: Params
    opt_state: OptState

    @property
    def mu_dtype(self) -> str | None:
        """What the first moment is kept in; None: what the parameters are."""
        mu = self.opt_state.moments[1].mu
        return mu.wte.dtype.name if mu.wte.dtype != self.params.wte.dtype else None


def init_state(key: Key[Array, ""], cfg: GPT2Config, optimizer: Optimizer) -> TrainState:
    """Fresh parameters and optimizer state; pure, to be traced for its shapes: `make_state` makes them."""
    params = init_params(key, cfg)
    return TrainState(params, init_opt_state(optimizer, params))


def make_state(key: Key[Array, ""], cfg: GPT2Config, optimizer: Optimizer, mesh: Mesh | None = None) -> TrainState:
    """What `init_state` says, in no more memory than a step: the room for drawing the parameters is free before the rest.

    On a mesh each device draws its own part; the values are the same.
    """
    draw = jax.jit(lambda key: init_params(key, cfg), out_shardings=meshes.param_shardings(mesh, cfg) if mesh else None)
    return add_optimizer(compile_for_memory(draw.lower(key))(key), cfg, optimizer, mesh)


def add_optimizer(params: Params, cfg: GPT2Config, optimizer: Optimizer, mesh: Mesh | None = None) -> TrainState:
    """The parameters and a fresh optimizer's state, laid out as they are."""
    params = jax.block_until_ready(params)
    init = lambda params: init_opt_state(optimizer, params)  # noqa: E731
    layout = meshes.shardings(mesh, cfg, jax.eval_shape(init, params)) if mesh else None
    return TrainState(params, jax.jit(init, out_shardings=layout)(params))


def step_arguments(
    cfg: GPT2Config, optimizer: Optimizer, shape: tuple[int, int, int], mesh: Mesh | None = None
) -> tuple[TrainState, Batch, Any]:
    """Shapes of a step's (state, batch, key), on a mesh with their layout: what `compile_step` needs; nothing is allocated.

    Args:
        cfg: resolved.
        optimizer: whose state it is.
        shape: (A, B, T) of the batch, on all devices together.
        mesh: of devices that are there, or of a topology that is compiled for ahead of time.

    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = meshes.abstract(mesh, cfg, jax.eval_shape(lambda key: init_state(key, cfg, optimizer), key))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=meshes.row_sharding(mesh, 3) if mesh else None)
    return state, Batch(ids, ids), meshes.abstract(mesh, cfg, key)


def mean_loss_and_grad(
    params: Params, batch: Batch, key: Key[Array, ""] | None, cfg: GPT2Config, backward: Backward
) -> tuple[Float[Array, ""], Params]:
    """Loss and gradient of A micro-batches, equal to those of the one batch of A B sequences.

    Args:
        params: the parameters.
        batch: (A, B, T) arrays.
        key: dropout's; each micro-batch gets its own.
        cfg: resolved.
        backward: ``manual`` runs the hand-written backward, ``autodiff`` JAX's.

    """
    count = target_count(batch)

    def one(batch: Batch, key: Any) -> tuple[Array, Params]:
        if backward == "manual":
            return gpt2.loss_and_grad(params, batch, cfg, key, count)
        return jax.value_and_grad(gpt2.loss)(params, batch, cfg, key, count)

    A = batch.inputs.shape[0]
    keys = None if key is None else jax.random.split(key, A)
    if A == 1:
        return one(*jax.tree.map(lambda x: x[0], (batch, keys)))

    def add(total: Any, batch_key: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*batch_key)), None

    zeros = jnp.zeros((), loss_dtype(cfg)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, (batch, keys))[0]


def step_key(key: Key[Array, ""], step: Int[Array, ""], cfg: GPT2Config) -> Key[Array, ""] | None:
    """The key of one step's dropout; None without dropout."""
    return jax.random.fold_in(key, step) if cfg.dropout else None


def target_count(batch: Batch) -> Float[Array, ""]:
    """Targets that count, each weighed by its mask."""
    mask = jnp.ones(batch.targets.shape, jnp.float32) if batch.mask is None else batch.mask
    return jnp.where(batch.targets == IGNORE_INDEX, 0.0, mask).sum()


def loss_dtype(cfg: GPT2Config) -> Any:
    """The loss is a float32 scalar, float64 when everything is."""
    return jnp.float64 if cfg.dtype == "float64" else jnp.float32


class CompiledStep(NamedTuple):
    """The executables of a training step, and what they hold at most."""

    gradient: jax.stages.Compiled
    updates: tuple[jax.stages.Compiled, ...]
    """One that updates all, or one of the parameters and one of the rest (see `step_functions`)."""
    native: bool
    """Whether the update is `gptjax.native`'s."""
    memory: dict[str, int]
    room: list[Params]
    """At most one gradient that has been used: the next is written over it.

    Were each to be allocated anew, the arrays of glibc's allocator would lie as close as they must only for some steps: it
    took 1.6 times the predicted memory for gradients of 774M.
    """

    def loss_and_grad(self, params: Params, batch: Batch, key: Any, step: int) -> tuple[Array, Params, Array]:
        """Loss and gradient of one step, and the gradient's norm; dispatched, with arrays still being computed."""
        room = self.room.pop() if self.room else _zeros(params)
        return self.gradient(params, batch, key, np.int32(step), room)


class StepFunctions(NamedTuple):
    """The training step as jitted functions, to be lowered; their buffers are donated."""

    gradient: Any
    """(params, batch, key, step, room) -> (loss, gradient, its norm). What ``room`` holds does not matter."""
    update: Any
    """(params, opt_state, gradient, loss, norm) -> (params, opt_state, metrics)."""
    update_params: Any
    """The same to params alone."""
    update_rest: Any
    """The same to (opt_state, metrics) alone, whatever its params are."""


def step_functions(
    cfg: GPT2Config, optimizer: Optimizer, backward: Backward, mesh: Mesh | None = None, native: bool = False
) -> StepFunctions:
    """The training step: a gradient, then an update, whole (``native`` if `optim.update` is to be) or in two parts.

    Gradient and update are separate, because in one program XLA copies what is donated. So it does in ``update`` where it does
    not merge the outputs, as on CPU. The two parts then need no copy, but read more.
    """

    def gradient(params: Params, batch: Batch, key: Any, step: Array, room: Params) -> tuple[Array, Params, Array]:
        loss, grads = mean_loss_and_grad(params, batch, step_key(key, step, cfg), cfg, backward)
        return loss, grads, optax.tree.norm(grads)

    whole = functools.partial(update, optimizer)
    parts = lambda *args: whole(*args)[0], lambda *args: whole(*args)[1:]
    layouts: list[Any] = [None] * 4
    if mesh:
        ps, opt = meshes.shardings(mesh, cfg, step_arguments(cfg, optimizer, (1, 1, 1))[0])
        everywhere = meshes.replicated(mesh)
        layouts = [(everywhere, ps, everywhere), (ps, opt, everywhere), ps, (opt, everywhere)]
    return StepFunctions(
        gradient=jax.jit(within(mesh, gradient), donate_argnums=4, keep_unused=True, out_shardings=layouts[0]),
        update=jax.jit(functools.partial(whole, native=native), donate_argnums=(0, 1), out_shardings=layouts[1]),
        update_params=jax.jit(parts[0], donate_argnums=0, out_shardings=layouts[2]),
        update_rest=jax.jit(parts[1], donate_argnums=1, out_shardings=layouts[3]),
    )


def compile_step(
    cfg: GPT2Config, optimizer: Optimizer, backward: Backward, state: Any, batch: Any, key: Any, mesh: Mesh | None = None
) -> CompiledStep:
    """Compile the training step for arguments of these shapes: arrays or `jax.ShapeDtypeStruct`s, laid out over the mesh."""
    all_float32 = all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    native = mesh is None and all_float32 and gptjax.native.available()
    functions = step_functions(cfg, optimizer, backward, mesh, native)
    number = meshes.abstract(mesh, cfg, jax.ShapeDtypeStruct((), jnp.int32))
    g = meshes.abstract(mesh, cfg, jax.eval_shape(lambda params: params, state.params))
    lowered = functions.gradient.lower(state.params, batch, key, number, g)
    loss, _, norm = lowered.out_info
    loss, norm = meshes.abstract(mesh, cfg, tuple(jax.ShapeDtypeStruct((), x.dtype) for x in (loss, norm)))
    gradient = compile_for_memory(lowered, mesh)
    arguments = state.params, state.opt_state, g, loss, norm
    updates: tuple[Any, ...] = ()
    if native or platform_of(mesh) != "cpu":
        updates = (functions.update.lower(*arguments).compile(),)
    if not native and (not updates or temporary_bytes(*updates) > bytes_per_device(g) * COPIED):
        updates = tuple(f.lower(*arguments).compile() for f in (functions.update_params, functions.update_rest))
    memory = {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "gradients": bytes_per_device(g),
        "temporaries": temporary_bytes(gradient, *updates),
    }
    return CompiledStep(gradient, updates, native, memory, room=[])


def platform_of(mesh: Mesh | None) -> str:
    """What is compiled for: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def temporary_bytes(*programs: Any) -> int:
    """What programs that run one after the other need beside their arguments and results."""
    return max(program.memory_analysis().temp_size_in_bytes for program in programs)


def compile_for_memory(lowered: jax.stages.Lowered, mesh: Mesh | None = None) -> Any:
    """Compile, on CPU with the scheduler that keeps few arrays alive at once, if this XLA has it."""
    if platform_of(mesh) == "cpu":
        try:
            return lowered.compile(compiler_options=MEMORY_SCHEDULER)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
    return lowered.compile()


def run_step(compiled: CompiledStep, state: TrainState, batch: Batch, key: Any, step: int) -> tuple[TrainState, StepMetrics]:
    """Dispatch one step; returns at once, with arrays still being computed. ``state`` is consumed."""
    loss, grads, norm = compiled.loss_and_grad(state.params, batch, key, step)
    if len(compiled.updates) == 1:
        params, opt_state, metrics = compiled.updates[0](*state, grads, loss, norm)
    else:
        params = compiled.updates[0](*state, grads, loss, norm)
        opt_state, metrics = compiled.updates[1](params, state.opt_state, grads, loss, norm)
    compiled.room.append(grads)
    return TrainState(params, opt_state), metrics


def _zeros(params: Params) -> Params:
    return jax.jit(_zeros_like, out_shardings=jax.tree.map(lambda x: x.sharding, params))(params)


def _zeros_like(params: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, params)


@functools.cache
def make_eval_loss(cfg: GPT2Config, mesh: Mesh | None = None) -> Any:
    """A jitted ``(params, batch) -> (summed loss, targets counted)``, without dropout; every process has the whole batch.

    The same function for the same arguments, so that it is compiled once.
    """

    def eval_loss(params: Params, batch: Batch) -> tuple[Array, Array]:
        count = target_count(batch)
        return gpt2.loss(params, batch, cfg) * count, count

    if mesh is None:
        return jax.jit(eval_loss)
    compiled = jax.jit(within(mesh, eval_loss), out_shardings=meshes.replicated(mesh))
    return lambda params, batch: compiled(params, meshes.place_rows(mesh, batch))


def evaluate(eval_loss: Any, params: Params, batches: list[Batch]) -> float:
    """Mean loss in nats over all targets that count in ``batches``."""
    sums = [eval_loss(params, batch) for batch in batches]
    return sum(float(total) for total, _ in sums) / max(sum(float(count) for _, count in sums), 1.0)


def bytes_per_device(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on one device."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape  # noqa: E731
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
