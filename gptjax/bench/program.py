"""The programs of a training step, lowered or compiled for hardware that need not be present."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from gptjax.config import Backward, Config, ModelConfig
from gptjax.datasets.batches import BatchShape
from gptjax.errors import ConfigError
from gptjax.plan.compiled import mesh_of
from gptjax.plan.predict import Work
from gptjax.plan.topology import Topology, parse_topology
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.xla.gpu import assumed_cudnn

BACKWARDS: tuple[Backward, ...] = ("manual", "autodiff")
COMPILED_FOR = {"cpu": "cpu", "cuda": "h100", "tpu": "v5e"}  # the device to compile for
NAMES = ("gradient", "update", "update-params", "update-rest")


class Operations(NamedTuple):
    """Operations by name: StableHLO's, or the target of a custom call."""

    times: Counter[str]
    """Runs in a step."""
    nbytes: Counter[str]
    """Bytes of the results of all runs, as if nothing were fused."""


def lowered_step(cfg: Config, model: ModelConfig, backward: Backward, platform: str) -> Operations:
    """Count the operations of a training step, gradient and update, lowered for a platform.

    Args:
        cfg: gives the batch and the optimizer.
        model: resolved for the platform.
        backward: ``manual`` or ``autodiff``.
        platform: ``cpu``, ``cuda``, ``rocm`` or ``tpu``.

    """
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, model)
    shape = BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len)
    state, batch, key = steps.step_arguments(model, optimizer, shape)
    functions = steps.step_functions(model, optimizer, backward)
    number = jax.ShapeDtypeStruct((), "int32")
    with assumed_cudnn():
        loss, g, norm = jax.eval_shape(
            functions.gradient, state.params, batch, key, number, state.params
        )
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (functions.gradient, (state.params, batch, key, number, g)),
        (functions.update, (state.params, state.opt_state, g, loss, norm, number)),
    ]
    found = Operations(Counter(), Counter())
    for function, arguments in calls:
        with assumed_cudnn():
            lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        module = lowered.compiler_ir("stablehlo")
        for total, more in zip(found, operations(module), strict=True):
            total.update(more)
    return found


class Program(NamedTuple):
    """One compiled program of a step."""

    name: str
    """One of `NAMES`: the update is one program or two."""
    text: str
    """The compiled HLO."""
    temporary_bytes: int
    """Per device, excluding arguments and results."""
    accessed_bytes: int
    """Read and written by all operations on a device, on-chip memory included, by XLA's count,
    which a GPU's program lacks.
    """


def target(cfg: Config, platform: str) -> Topology:
    """The devices to compile for, as many as the mesh has: CPUs, H100s, or TPUs v5e in a torus.

    Raises:
        ConfigError: there is no compiler for the platform, or no torus of that size.

    """
    if platform not in COMPILED_FOR:
        raise ConfigError(
            f"hlo cannot compile for platform {platform}, only for " + ", ".join(COMPILED_FOR)
        )
    count = math.prod(max(1, size) for size in cfg.mesh.shape)
    if platform != "tpu":
        return parse_topology(f"{COMPILED_FOR[platform]}:{count}")
    if count & (count - 1):
        raise ConfigError(
            f"the mesh has {count} devices, but for tpu the step is compiled for 1, 2, 4, 8... of "
            "them"
        )
    side = 2 ** (int(math.log2(count)) // 2)
    return parse_topology(f"{COMPILED_FOR[platform]}:{side}x{count // side}")


def compiled_step(
    cfg: Config, model: ModelConfig, backward: Backward, devices: list[Any]
) -> list[Program]:
    """Compile a training step as training compiles it, for devices that need not be present.

    Args:
        cfg: gives the batch, the optimizer and the mesh.
        model: resolved for the devices' platform.
        backward: ``manual`` or ``autodiff``.
        devices: of `gptjax.plan.topology.open_devices`.

    Returns:
        The programs of one step, in execution order.

    Raises:
        ConfigError: the mesh does not fit the devices or the model.

    """
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, model)
    shape = BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len)
    # Training on JAX's default device has no mesh
    alone = len(devices) == 1 and devices[0].platform == "cpu"
    mesh = None if alone else mesh_of(Work(model, shape, cfg.mesh.shape), devices)
    with assumed_cudnn():
        arguments = steps.step_arguments(model, optimizer, shape, mesh)
        compiled = steps.compile_step(model, optimizer, backward, *arguments, mesh)
    found = compiled.gradient, *compiled.updates
    names = NAMES[:2] if len(compiled.updates) == 1 else (NAMES[0], *NAMES[2:])
    return [
        Program(
            name,
            program.as_text() or "",
            steps.temporary_bytes(program),
            int((program.cost_analysis() or {}).get("bytes accessed", 0)),
        )
        for name, program in zip(names, found, strict=True)
    ]


def operations(module: Any) -> Operations:
    """Count the operations that a StableHLO module runs; a function counts once per call, a loop's
    body once.
    """
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    known: dict[str, Operations] = {}

    def of_function(name: str) -> Operations:
        if name not in known:
            known[name] = Operations(Counter(), Counter())
            _walk(functions[name], known[name], of_function)
        return known[name]

    return of_function("main")


def _walk(parent: Any, found: Operations, of_function: Any) -> None:
    for op in (
        op for region in parent.regions for block in region.blocks for op in block.operations
    ):
        name = op.operation.name
        if name == "func.call":
            for total, more in zip(found, of_function(op.attributes["callee"].value), strict=True):
                total.update(more)
        elif name.startswith("stablehlo.") and name != "stablehlo.return":
            name = (
                op.attributes["call_target_name"].value
                if name == "stablehlo.custom_call"
                else name.removeprefix("stablehlo.")
            )
            found.times[name] += 1
            found.nbytes[name] += sum(_nbytes(result.type) for result in op.results)
        if name not in REDUCERS:
            _walk(op, found, of_function)


REDUCERS = ("reduce", "scatter", "sort", "reduce_window")  # their regions only combine two numbers


def _nbytes(kind: Any) -> int:
    """Bytes of a tensor type; a token's are 0."""
    if not hasattr(kind, "shape"):
        return 0
    return math.prod(kind.shape) * max(1, getattr(kind.element_type, "width", 8) // 8)
