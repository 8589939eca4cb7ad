"""The least time of a step: its FLOPs, bytes and collectives at the rates of data sheets."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from gptjax.parallel.devices import NETWORK, Device
from gptjax.plan.collectives import Collective
from gptjax.plan.kernels import REACHED
from gptjax.plan.predict import Work, step_flops, step_traffic

DAY = 86400


class Floor(NamedTuple):
    """Seconds of a step on each device at the rates of data sheets."""

    products: float
    memory: float
    """Forward and backward."""
    collectives: float
    update: float
    """AdamW's pass over memory, which can begin once all gradients are there."""

    @property
    def overlapped(self) -> float:
        """With all else hidden behind the slowest part."""
        return max(self.products, self.memory, self.collectives) + self.update

    @property
    def exposed(self) -> float:
        """With no collective hidden."""
        return max(self.products, self.memory) + self.collectives + self.update

    @property
    def serial(self) -> float:
        """With nothing hidden, and products at the rate that they reach: kernels run in turn."""
        return self.products / REACHED + self.memory + self.collectives + self.update

    def efficiency(self, seconds: float) -> float:
        """Of ``seconds`` a step, the part that it would take without collectives: the throughput of
        a device beside others.
        """
        return (max(self.products, self.memory) + self.update) / seconds


def step_floor(work: Work, device: Device, collectives: list[Collective]) -> Floor:
    """From the products, the traffic of `step_traffic`, and the bytes of the collectives over links
    or network.
    """
    traffic, update = step_traffic(work)
    return Floor(
        products=step_flops(work) / device.flops,
        memory=traffic / device.bandwidth,
        collectives=sending_seconds(work.mesh, device, collectives),
        update=update / device.bandwidth,
    )


def sending_seconds(
    mesh: tuple[int, ...], device: Device, collectives: Iterable[Collective]
) -> float:
    """Seconds to send the bytes of collectives one after the other."""
    return sum(c.sent / sending_rate(mesh, device, c.group) for c in collectives)


def sending_rate(mesh: tuple[int, ...], device: Device, group: int) -> float:
    """Bytes a second that a device can send in a collective among ``group`` of a mesh's devices.

    A machine's devices are neighbours in the mesh. What a collective sends from one machine to
    another passes through the adapters of all its devices in that machine: as rings do that take
    one each.
    """
    strides = [math.prod(mesh[i + 1 :]) for i, size in enumerate(mesh) if size == group] or [1]
    members = max(device.neighbours // min(strides), 1)
    return device.link if group <= members else min(device.link, members * NETWORK)
