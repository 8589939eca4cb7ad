"""The least time that a step can take, from what it does and what devices can do; and what follows from it."""

import math
from typing import NamedTuple

from gptjax.devices import NETWORK, Device
from gptjax.plan.collectives import Collective
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

    def efficiency(self, seconds: float) -> float:
        """Of ``seconds`` a step, the part that it would take without collectives: the throughput of a device beside others."""
        return (max(self.products, self.memory) + self.update) / seconds


def step_floor(work: Work, device: Device, collectives: list[Collective]) -> Floor:
    """From the products, the traffic of `step_traffic`, and the bytes of the collectives over links or network."""
    traffic, update = step_traffic(work)
    rate = device.link if math.prod(work.mesh) <= device.neighbours else NETWORK
    return Floor(
        products=step_flops(work) / device.flops,
        memory=traffic / device.bandwidth,
        collectives=sum(c.sent for c in collectives) / rate,
        update=update / device.bandwidth,
    )
