"""Memory, collectives, kernels and FLOPs of a compiled step, for simulated CPUs or, ahead of time,
for TPUs and GPUs.
"""

import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gptjax.config import Backward, MeshConfig
from gptjax.parallel.devices import device_of
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import MESH_AXES
from gptjax.plan.collectives import Collective, collectives, summed
from gptjax.plan.floor import sending_seconds
from gptjax.plan.kernels import Kernel, kernels
from gptjax.plan.predict import Work
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import compile_step, step_arguments
from gptjax.xla.gpu import assumed_cudnn


class Compiled(NamedTuple):
    """One compilation of a step."""

    memory: dict[str, int]
    """Bytes on each device: those that training reports, and the program's code."""
    collectives: list[Collective]
    """The sum for each kind and group size."""
    exposed: float
    """Seconds of sending that the kernels between start and done do not hide; 0 without kernels."""
    flops: float
    """XLA's count for one device, with loop bodies once and without library kernels."""
    seconds: float
    """Compile time."""
    kernels: list[Kernel]
    """The kernels of a GPU program; empty for others."""


class TooLarge(NamedTuple):
    """A step that the compiler refuses as too large."""

    message: str
    used: int | None
    """Bytes that the step needs on each device, if the compiler reports them."""


def compile_work(
    work: Work, optimizer: Optimizer, backward: Backward, devices: list[Any]
) -> Compiled | TooLarge:
    """Compile a step from the shapes of its arguments."""
    mesh = mesh_of(work, devices)
    began = time.perf_counter()
    try:
        with assumed_cudnn():
            arguments = step_arguments(work.model, optimizer, work.shape, mesh)
            step = compile_step(work.model, optimizer, backward, *arguments, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(str(error))
    programs: list[Any] = [step.gradient, *step.updates]
    code = sum(program.memory_analysis().generated_code_size_in_bytes for program in programs)
    texts = [program.as_text() or "" for program in programs]
    rates = device_of(devices[0].device_kind) if devices[0].platform == "gpu" else None
    found = [kernels(text, rates) if rates else [] for text in texts]
    sent = [
        collective
        for text, ran in zip(texts, found, strict=True)
        for collective in collectives(text, {k.name: k.seconds / k.times for k in ran})
    ]
    return Compiled(
        memory=step.memory | {"program": code},
        collectives=summed(sent),
        exposed=sum(max(0.0, sending_seconds(work.mesh, rates, [c]) - c.compute) for c in sent)
        if rates
        else 0.0,
        flops=sum((program.cost_analysis() or {}).get("flops", 0.0) for program in programs),
        seconds=time.perf_counter() - began,
        kernels=[kernel for ran in found for kernel in ran],
    )


def mesh_of(work: Work, devices: list[Any]) -> Mesh:
    """The mesh to compile for. A single device gets a mesh, too, with the same program as without
    one.
    """
    mesh = make_mesh(MeshConfig(*work.mesh), work.model.axis_sizes, work.shape.batch_size, devices)
    grid = np.array(devices[:1], dtype=object).reshape(1, 1, 1)
    return mesh or Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _too_large(message: str) -> TooLarge:
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    used = re.search(r"[Uu]sed ([\d.]+)([KMG]?) of ([\d.]+[KMG]?)", message)
    reason = f"it uses {used[1]}{used[2]} of {used[3]}" if used else " ".join(message.split())[:200]
    return TooLarge(reason, int(float(used[1]) * units[used[2]]) if used else None)
