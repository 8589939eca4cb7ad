"""What the compiler says of a step: of simulated CPUs, or ahead of time of TPUs that are not here."""

import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gptjax import steps
from gptjax.mesh import MeshConfig, make_mesh
from gptjax.models.config import GPT2Config
from gptjax.optim import Optimizer
from gptjax.plan.collectives import Collective, collectives, summed
from gptjax.plan.predict import Work
from gptjax.sharding import MESH_AXES


class Compiled(NamedTuple):
    """One compilation of a step."""

    memory: dict[str, int]
    """Bytes on each device, as training reports them, and the program's own."""
    collectives: list[Collective]
    flops: float
    """What XLA counts on one device, loops' bodies once, and nothing in kernels that are not its own."""
    seconds: float


class TooLarge(NamedTuple):
    """A step that the compiler refuses."""

    message: str
    used: int | None
    """Bytes on each device that it says it needs."""


def compile_work(work: Work, optimizer: Optimizer, backward: steps.Backward, devices: list[Any]) -> Compiled | TooLarge:
    """Compile a step, of arguments that exist as shapes alone."""
    mesh = mesh_of(work.model, work, devices)
    began = time.perf_counter()
    arguments = steps.step_arguments(work.model, optimizer, work.shape, mesh)
    try:
        step = steps.compile_step(work.model, optimizer, backward, *arguments, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error))
    programs: list[Any] = [step.gradient, *step.updates]
    code = sum(program.memory_analysis().generated_code_size_in_bytes for program in programs)
    return Compiled(
        memory=step.memory | {"program": code},
        collectives=summed(found for program in programs for found in collectives(program.as_text() or "")),
        flops=sum((program.cost_analysis() or {}).get("flops", 0.0) for program in programs),
        seconds=time.perf_counter() - began,
    )


def mesh_of(model: GPT2Config, work: Work, devices: list[Any]) -> Mesh:
    """The mesh of all devices; of one too, whose program is that of no mesh, so that it says what to compile for."""
    mesh = make_mesh(MeshConfig(*work.mesh), model, work.shape.batch_size, devices)
    grid = np.array(devices[:1], dtype=object).reshape(1, 1, 1)
    return mesh or Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _refused(message: str) -> TooLarge:
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    used = re.search(r"[Uu]sed ([\d.]+)([KMG]?) of ([\d.]+[KMG]?)", message)
    said = f"it uses {used[1]}{used[2]} of {used[3]}" if used else " ".join(message.split())[:200]
    return TooLarge(said, int(float(used[1]) * units[used[2]]) if used else None)
