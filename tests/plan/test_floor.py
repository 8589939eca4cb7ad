import math

import pytest

from gptjax.config import ModelConfig
from gptjax.datasets.batches import BatchShape
from gptjax.parallel.devices import NETWORK, Device
from gptjax.plan.collectives import Collective
from gptjax.plan.floor import Floor, sending_rate, step_floor
from gptjax.plan.predict import Work, step_flops, step_traffic

DEVICE = Device(flops=1e12, memory=1e9, bandwidth=1e10, link=1e9, neighbours=4)
SENT = [Collective("all-gather", 4, 1, 3e6), Collective("all-reduce", 4, 1, 1e6)]


def work(mesh):
    return Work(
        ModelConfig(preset="124m", vocab_size=50257).resolve("cuda", 1024),
        BatchShape(1, 16, 1024),
        mesh,
    )


def test_each_part_is_an_amount_divided_by_a_rate():
    planned = work((1, 4, 1))
    floor = step_floor(planned, DEVICE, SENT)
    traffic, update = step_traffic(planned)
    assert floor == Floor(step_flops(planned) / 1e12, traffic / 1e10, 4e6 / 1e9, update / 1e10)


@pytest.mark.parametrize(
    ("mesh", "group", "adapters"),
    [
        ((1, 4, 1), 4, None),
        ((2, 4, 1), 4, None),  # fsdp's devices are neighbours,
        ((2, 4, 1), 2, 1),  # those of data are one in each machine,
        ((2, 2, 2), 2, None),
        ((4, 2, 1), 4, 2),  # or two,
        ((1, 8, 1), 8, 4),  # and these four in each
        ((2, 4, 1), 8, 4),
        ((8, 1, 4), 8, 1),
    ],
)
def test_traffic_between_machines_is_limited_by_their_adapters(mesh, group, adapters):
    """Machines of 4 neighbours."""
    fast = DEVICE._replace(link=1e12)
    assert sending_rate(mesh, fast, group) == (adapters * NETWORK if adapters else fast.link)
    assert sending_rate(mesh, DEVICE, group) == DEVICE.link  # that the network cannot exceed


def test_overlapped_time_is_the_slowest_part_plus_the_update():
    floor = Floor(products=3.0, memory=1.0, collectives=2.0, update=1.0)
    assert (floor.overlapped, floor.exposed) == (4, 6)
    assert floor.efficiency(floor.overlapped) == 1
    assert floor.efficiency(floor.exposed) == pytest.approx(4 / 6)
    slow = floor._replace(collectives=7.0)
    assert slow.overlapped == 8
    assert slow.efficiency(slow.overlapped) == 0.5
    assert math.isclose(slow.exposed, 11)
