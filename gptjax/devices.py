"""What devices can do at most: one table, from their makers' data sheets."""

from typing import NamedTuple


class Device(NamedTuple):
    """Rates and sizes of one of what JAX calls a device."""

    flops: float
    """Peak dense bfloat16 FLOP/s."""
    memory: float
    """Bytes of its own memory."""
    bandwidth: float
    """Bytes a second between it and its memory."""
    link: float
    """Bytes a second that it can send to its neighbours, over all its links, in one direction."""
    neighbours: int
    """Devices that these links connect; beyond, there is a network."""


GIB = 2**30
POD = 8960  # more than any topology here has
NETWORK = 50e9  # bytes a second and GPU between machines: a 400 Gb/s adapter each, which is what such machines are sold with

# By the start of JAX's `device_kind`; the first that fits counts.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9, 1.555e12, 300e9, 8),
    "NVIDIA A100": Device(312e12, 80e9, 2.039e12, 300e9, 8),
    "NVIDIA H100 PCIe": Device(756e12, 80e9, 2.0e12, 64e9, 8),
    "NVIDIA H100": Device(989e12, 80e9, 3.35e12, 450e9, 8),
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12, 450e9, 8),
    "NVIDIA L4": Device(121e12, 24e9, 300e9, 32e9, 8),
    "TPU v3": Device(61.5e12, 16 * GIB, 450e9, 164e9, 2048),  # a device is one of a chip's two cores
    "TPU v4": Device(275e12, 32 * GIB, 1.2e12, 300e9, POD),
    "TPU v5 lite": Device(197e12, 16 * GIB, 819e9, 200e9, 256),
    "TPU v5e": Device(197e12, 16 * GIB, 819e9, 200e9, 256),
    "TPU v5": Device(459e12, 95 * GIB, 2.765e12, 600e9, POD),
    "TPU v6 lite": Device(918e12, 32 * GIB, 1.64e12, 400e9, 256),
    "TPU v6e": Device(918e12, 32 * GIB, 1.64e12, 400e9, 256),
}


def device_of(device_kind: str) -> Device | None:
    """The row of a device that JAX names so, or None where there is none."""
    return next((device for kind, device in DEVICES.items() if device_kind.startswith(kind)), None)
