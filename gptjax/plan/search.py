"""Plan a step: its memory, its minimum time, and the largest batch that fits."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from gptjax.config import Backward
from gptjax.plan.collectives import Collective
from gptjax.plan.compiled import Compiled, compile_work
from gptjax.plan.floor import Floor, step_floor
from gptjax.plan.predict import (
    Work,
    saved_bytes,
    state_bytes,
    step_collectives,
    step_flops,
    working_bytes,
)
from gptjax.plan.topology import Topology
from gptjax.train.metrics import human_bytes
from gptjax.train.optimizer import Optimizer

USABLE = 0.95  # of a device's memory; runtime, library workspaces and fragmentation take the rest
PREDICTED = "predicted from shapes, not compiled"


class Plan(NamedTuple):
    """The figures of a step on one device."""

    work: Work
    source: str
    """The source of the memory and collectives, as text."""
    compiled: bool
    memory: dict[str, int]
    """Bytes by use."""
    saved: int
    """Bytes that the forward saves for the hand-written backward, predicted from shapes."""
    predicted: int
    """Bytes of temporaries, predicted from shapes."""
    capacity: float
    """Bytes of a device's memory that a step may use."""
    collectives: list[Collective]
    flops: float
    """FLOPs of the step's products, from `step_flops`."""
    compiler_flops: float | None
    """XLA's count of FLOPs; None if not compiled."""
    floor: Floor | None
    serial: float | None
    """Minimum seconds if kernels run one after the other: those of the compiled program plus the
    collectives that they do not overlap, or predicted from shapes.
    """
    kernels: int
    """Kernel launches of a compiled GPU program; 0 for others."""
    exposed: float
    """Seconds of sending that the compiled GPU program's kernels do not hide; 0 for others."""
    largest: int | None
    """The most rows of a micro-batch that fit on each device; 0 if none does, None if not
    searched.
    """
    searched: str
    """How the largest batch was found, as text."""
    tokens: float
    """Tokens of the whole run."""

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.memory.values())

    def record(self) -> dict[str, Any]:
        """The plan as JSON data."""
        plain = self._asdict() | {
            "work": {
                "mesh": self.work.mesh,
                "shape": self.work.shape._asdict(),
                "dtype": self.work.model.dtype,
            },
            "collectives": [c._asdict() for c in self.collectives],
            "floor": self.floor
            and self.floor._asdict()
            | {"overlapped": self.floor.overlapped, "exposed": self.floor.exposed},
        }
        return plain | {"total": self.total}


def make_plan(
    work: Work,
    topology: Topology,
    optimizer: Optimizer,
    backward: Backward,
    devices: list[Any] | None,
    tokens: float,
    search: bool,
) -> Plan:
    """Plan a step.

    Args:
        work: the step.
        topology: the devices to plan for.
        optimizer: the optimizer, for its state.
        backward: which backward to run.
        devices: devices to compile for, or None to predict.
        tokens: tokens of the whole run.
        search: also find the largest batch that fits.

    """
    state, predicted = state_bytes(work, optimizer), temporary_bytes(work)
    memory, sent, source = state | {"temporaries": predicted}, step_collectives(work), PREDICTED
    found = compile_work(work, optimizer, backward, devices) if devices else None
    if isinstance(found, Compiled):
        memory, sent, source = (
            found.memory,
            found.collectives,
            f"compiled for {topology.kind} in {found.seconds:.0f} s",
        )
    elif found:
        source = f"{PREDICTED}: the compiler refuses the step, {found.message}"
    capacity = USABLE * (
        topology.device.memory if topology.device else _host_memory() / topology.size
    )
    largest, searched = None, ""
    if search and isinstance(found, Compiled):
        largest, searched = _largest_batch(
            work, sum(memory.values()), capacity, optimizer, backward, devices or []
        )
    elif search:
        free = capacity - sum(state.values())
        largest, searched = (
            bisect_largest(lambda rows: temporary_bytes(work.with_rows(rows)) <= free),
            "by shapes",
        )
    rated = topology.device and work.model.dtype == "bfloat16"
    floor = step_floor(work, topology.device, sent) if topology.device and rated else None
    serial = floor.serial if floor else None
    if isinstance(found, Compiled) and found.kernels and topology.device:
        serial = sum(kernel.seconds for kernel in found.kernels) + found.exposed
    return Plan(
        work=work,
        source=source,
        compiled=isinstance(found, Compiled),
        memory=memory,
        saved=saved_bytes(work),
        predicted=predicted,
        capacity=capacity,
        collectives=sent,
        flops=step_flops(work),
        compiler_flops=found.flops if isinstance(found, Compiled) else None,
        floor=floor,
        serial=serial,
        kernels=round(sum(k.times for k in found.kernels)) if isinstance(found, Compiled) else 0,
        exposed=found.exposed if isinstance(found, Compiled) else 0.0,
        largest=largest,
        searched=searched,
        tokens=tokens,
    )


def temporary_bytes(work: Work) -> int:
    """Bytes of temporaries on each device, predicted from shapes."""
    return saved_bytes(work) + working_bytes(work)


def bisect_largest(fits: Callable[[int], bool]) -> int:
    """The largest n with ``fits(n)``, by bisection; 0 if there is none. ``fits`` must be
    monotonic.
    """
    most = 1
    while fits(most):
        most *= 2
    low, high = most // 2, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_batch(
    work: Work,
    total: int,
    capacity: float,
    optimizer: Optimizer,
    backward: Backward,
    devices: list[Any],
) -> tuple[int | None, str]:
    """Extrapolate the largest batch from the configured rows and twice as many, and compile it; as
    long as it does not fit, interpolate from it.
    """

    def needed(rows: int) -> float:
        found = compile_work(work.with_rows(rows), optimizer, backward, devices)
        if isinstance(found, Compiled):
            return sum(found.memory.values())
        return max(found.used or math.inf, capacity + 1)

    known: dict[int, float] = {work.rows: total}
    rows = 2 * work.rows
    while rows not in known:
        known[rows] = needed(rows)
        growth = (known[rows] - total) / (rows - work.rows)
        if growth <= 0:
            return None, "not found: the compiled memory does not grow with the batch"
        if rows == 2 * work.rows or known[rows] > capacity:
            rows = int(work.rows + (capacity - total) / growth)
        if rows < 1:
            return 0, "by extrapolation from compiled steps"
    return rows, f"compiled: {human_bytes(known[rows])} a device"


def _host_memory() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
