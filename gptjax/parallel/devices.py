"""Peak rates and memory sizes of devices, from their makers' data sheets.

NVIDIA: the data sheets of the A100, H100, H200 and L4 Tensor Core GPUs. Those of the last three
give bfloat16 rates with sparsity, twice the dense ones, and all give NVLink and PCIe rates for both
directions together. Networks follow the reference architecture of DGX BasePOD: eight GPUs with
eight adapters of 400 Gb/s.

Google: docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e, which give the links of v5e, v5p
and v6e for both directions together. A v4 chip has six links of 400 Gb/s each way (Zu et al. 2024,
"Resiliency at Scale"); all-reduce of a v3 pod runs at 340 TB/s.
"""

from typing import NamedTuple


class Device(NamedTuple):
    """Rates and sizes of one JAX device."""

    flops: float
    """Peak dense bfloat16 FLOP/s."""
    memory: float
    """Bytes of device memory."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    link: float
    """Bytes a second to its neighbours, over all links at once, in one direction."""
    neighbours: int
    """Devices that these links connect; others are reached over a network."""


GIB = 2**30
NETWORK = 50e9  # bytes a second that a GPU can send to other machines

V5E = Device(197e12, 16 * GIB, 819e9, 200e9, 256)
V5P = Device(459e12, 95 * GIB, 2.765e12, 600e9, 8960)
V6E = Device(918e12, 32 * GIB, 1.6e12, 400e9, 256)

DEVICES = {  # by JAX's `device_kind`
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9, 1.555e12, 300e9, 8),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80e9, 2.039e12, 300e9, 8),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 40e9, 1.555e12, 32e9, 8),
    "NVIDIA A100 80GB PCIe": Device(312e12, 80e9, 1.935e12, 32e9, 8),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9, 3.35e12, 450e9, 8),
    "NVIDIA H100 PCIe": Device(756e12, 80e9, 2.0e12, 64e9, 8),
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12, 450e9, 8),
    "NVIDIA L4": Device(121e12, 24e9, 300e9, 32e9, 8),
    "TPU v3": Device(61.5e12, 16 * GIB, 450e9, 166e9, 2048),  # one of a chip's two cores
    "TPU v4": Device(275e12, 32 * GIB, 1.2e12, 300e9, 4096),
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
}


def device_of(device_kind: str) -> Device | None:
    """The device with exactly this name in JAX (an NVIDIA L40 is not an NVIDIA L4), or None."""
    return DEVICES.get(device_kind)
