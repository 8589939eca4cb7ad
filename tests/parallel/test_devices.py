import pytest

from gptjax.parallel.devices import DEVICES, device_of


@pytest.mark.parametrize("kind", DEVICES)
def test_rates_have_plausible_ratios(kind):
    """Some hundreds of FLOPs a byte of memory, a slower link than memory, and memory that is read
    in a tenth of a second.
    """
    device = device_of(kind)
    assert 100 < device.flops / device.bandwidth < 600
    assert device.link < device.bandwidth
    assert 0.01 < device.memory / device.bandwidth < 0.1


def test_a_name_must_match_exactly():
    assert device_of("TPU v5 lite") == device_of("TPU v5e")
    assert device_of("TPU v5") == device_of("TPU v5p")
    assert device_of("NVIDIA L40S") is None
    assert device_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
