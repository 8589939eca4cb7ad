import re
import subprocess
import sys

import jax
import pytest

from gptjax.errors import ConfigError
from gptjax.plan.topology import GPUS, TPUS, open_devices, parse_topology
from tests.plan.conftest import needs_libtpu


@pytest.mark.parametrize(
    ("name", "platform", "size", "kind", "hosts"),
    [
        ("v5e:16x16", "tpu", 256, "TPU v5 lite", 64),
        ("v5e:1x1", "tpu", 1, "TPU v5 lite", 1),
        ("v5p:2x2x4", "tpu", 16, "TPU v5", 4),
        ("v4:2x2x1", "tpu", 4, "TPU v4", 1),
        ("H100:8", "cuda", 8, "NVIDIA H100 80GB HBM3", 1),
        ("h100:20", "cuda", 20, "NVIDIA H100 80GB HBM3", 3),
        ("h100-pcie:2", "cuda", 2, "NVIDIA H100 PCIe", 1),
        ("cpu:16", "cpu", 16, "cpu", 1),
    ],
)
def test_a_name_gives_platform_size_kind_and_hosts(name, platform, size, kind, hosts):
    found = parse_topology(name)
    assert (found.platform, found.size, found.kind, found.hosts) == (platform, size, kind, hosts)
    assert platform == "cpu" or found.device.memory >= 16e9


@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_the_rates_of_every_named_device_are_known(name):
    shape = "x".join("1" * TPUS[name][1]) if name in TPUS else "1"
    assert parse_topology(f"{name}:{shape}").device


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "topology is missing: it must be cpu:8; h100:8 or another"),
        ("v9:8", "topology v9:8 is unknown: it must be cpu:8"),
        ("h100", "is unknown"),
        ("h100:0", "is unknown"),
        ("h100:2x4", "is unknown"),
        (
            "v5e:3x5",
            "v5e takes 2 numbers, each 1, 2 or a multiple of 4, for at most 256 devices, such "
            "as 2x2 or 2x4",
        ),
        ("v5e:16x32", "at most 256 devices"),
        ("v5p:16x16", "v5p takes 3 numbers"),
    ],
)
def test_an_invalid_name_is_rejected_with_valid_ones(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_topology(name)


def test_simulated_devices():
    assert open_devices(parse_topology("cpu:4")) == jax.devices("cpu")[:4]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "JAX TPU support not installed; cannot generate TPU topology.",
            "needs libtpu: pip install 'gptjax[tpu]', or else",
        ),
        (
            "INVALID_ARGUMENT: no such layout\nand more",
            "libtpu refuses the topology v5e:4x4: INVALID_ARGUMENT: no such layout",
        ),
    ],
)
def test_a_missing_or_refusing_libtpu_is_a_config_error(said, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_devices(parse_topology("v5e:4x4"), ", or else")


SLICES = [
    "v5e:1x1",
    "v5e:2x2",
    "v5e:2x4",
    "v5e:16x16",
    "v6e:4x4",
    "v4:2x2x1",
    "v4:2x2x4",
    "v5p:1x1x1",
    "v5p:4x4x8",
]
COUNT = """
import sys
from gptjax.plan.topology import open_devices, parse_topology, start
for name in sys.argv[1:]:
    topology = parse_topology(name)
    start(topology)
    devices = open_devices(topology)
    print(name, len(devices), len({device.process_index for device in devices}), devices[0].device_kind, sep=",")
"""


@needs_libtpu
def test_slices_have_the_devices_that_libtpu_describes():
    """In a process of its own, as libtpu reads the environment before Python can change it."""
    found = subprocess.run(
        [sys.executable, "-c", COUNT, *SLICES], capture_output=True, text=True, check=True
    ).stdout
    expected = [(name, parse_topology(name)) for name in SLICES]
    assert found.splitlines() == [
        f"{name},{each.size},{each.hosts},{each.kind}" for name, each in expected
    ]
