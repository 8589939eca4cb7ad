"""Lower bounds of a step's time: its FLOPs, bytes and collectives at the rates of data sheets."""

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
    """AdamW's pass over memory, which starts after the gradient's norm is known."""

    @property
    def overlapped(self) -> float:
        """The time if the slowest part hides all others."""
        return max(self.products, self.memory, self.collectives) + self.update

    @property
    def exposed(self) -> float:
        """The time if no collective is hidden."""
        return max(self.products, self.memory) + self.collectives + self.update

    @property
    def serial(self) -> float:
        """The time if kernels run one after the other, with products at their attainable rate."""
        return self.products / REACHED + self.memory + self.collectives + self.update

    def efficiency(self, seconds: float) -> float:
        """The scaling efficiency at ``seconds`` a step: the fraction that the step would take
        without collectives.
        """
        return (max(self.products, self.memory) + self.update) / seconds


def step_floor(work: Work, device: Device, collectives: list[Collective]) -> Floor:
    """The floor of a step: its products, the traffic of `step_traffic`, and the collectives' bytes
    over links or network, each at the device's rate.
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
    """Seconds to run collectives one after the other."""
    return sum(c.sent / sending_rate(mesh, device, c.group) for c in collectives)


def sending_rate(mesh: tuple[int, ...], device: Device, group: int) -> float:
    """Bytes a second that a device can send in a collective among ``group`` of a mesh's devices.

    A machine's devices are neighbours in the mesh. Traffic between machines uses the network
    adapters of all participating devices in a machine, one ring for each adapter.
    """
    strides = [math.prod(mesh[i + 1 :]) for i, size in enumerate(mesh) if size == group] or [1]
    members = max(device.neighbours // min(strides), 1)
    return device.link if group <= members else min(device.link, members * NETWORK)
