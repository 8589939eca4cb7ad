"""Topologies by name: the devices of a plan, which need not be present."""

import math
import os
import re
from typing import Any, NamedTuple

import jax

from gptjax.errors import ConfigError
from gptjax.parallel.devices import DEVICES, Device
from gptjax.xla.gpu import open_gpus

TPUS = {  # name: JAX's device_kind, the axes of its torus
    "v4": ("TPU v4", 3),
    "v5e": ("TPU v5 lite", 2),
    "v5p": ("TPU v5", 3),
    "v6e": ("TPU v6 lite", 2),
}
GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h200": "NVIDIA H200",
    "l4": "NVIDIA L4",
    "cuda": "NVIDIA H100 80GB HBM3",
}
CPU = "cpu"
# Devices per machine: TPUs as in libtpu's slices, GPUs as in the usual servers
PER_HOST = {"tpu": 4, "cuda": 8}
NAMES = (
    "cpu:8; h100:8 or another GPU's name ("
    + ", ".join(GPUS)
    + "); v5e:4x4, v6e:4x4, v4:2x2x4 or v5p:2x2x4"
)
ENVIRONMENT = {
    # Compiling takes no device, so several processes may
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Keep libtpu from querying this machine for the slice that it is part of
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Topology(NamedTuple):
    """A number of devices of one kind."""

    name: str
    platform: str
    """cpu, cuda or tpu."""
    kind: str
    """JAX's ``device_kind``."""
    shape: tuple[int, ...]
    """The sides of the torus, or the number of devices."""
    device: Device | None
    """Rates and memory of each; None for CPU, which has no data sheet."""

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """The number of machines, each of which runs a process."""
        return -(-self.size // PER_HOST.get(self.platform, self.size))


def parse_topology(name: str) -> Topology:
    """The topology of a name such as ``v5e:4x4``, ``h100:8`` or ``cpu:8``.

    Raises:
        ConfigError: the name is unknown; the message lists those that work.

    """
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
    family, shape = (match[1].lower(), tuple(map(int, match[2].split("x")))) if match else ("", ())
    if family in TPUS:
        kind, axes = TPUS[family]
        if (
            len(shape) != axes
            or not all(_is_side(side) for side in shape)
            or math.prod(shape) > DEVICES[kind].neighbours
        ):
            example = " or ".join(
                {2: ("2x2", "2x4", "4x4", "16x16"), 3: ("1x1x1", "2x2x1", "2x2x4", "4x4x8")}[axes]
            )
            raise ConfigError(
                f"topology {name} is invalid: {family} takes {axes} numbers, each 1, 2 or a "
                f"multiple of 4, for at most {DEVICES[kind].neighbours} devices, such as {example}"
            )
        return Topology(name, "tpu", kind, shape, DEVICES[kind])
    if len(shape) == 1 and shape[0] > 0:
        if family in GPUS:
            return Topology(name, "cuda", GPUS[family], shape, DEVICES[GPUS[family]])
        if family == CPU:
            return Topology(name, "cpu", "cpu", shape, None)
    raise ConfigError(
        f"topology {name} is unknown: it must be {NAMES}"
        if name
        else f"topology is missing: it must be {NAMES}"
    )


def _is_side(n: int) -> bool:
    return n in (1, 2) or (n > 0 and n % 4 == 0)


def start(topology: Topology) -> None:
    """Restrict JAX to the CPU, with the number of devices of a CPU topology.

    Raises:
        ConfigError: JAX has already started with fewer devices.

    """
    os.environ.update(
        {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    )
    config: Any = jax.config
    config.update("jax_platforms", "cpu")
    if topology.platform == "cpu":
        try:
            config.update("jax_num_cpu_devices", topology.size)
        except RuntimeError as error:
            if len(jax.devices("cpu")) < topology.size:
                raise ConfigError(
                    f"JAX has started with {len(jax.devices('cpu'))} devices, too few for "
                    f"{topology.name}"
                ) from error


def open_devices(topology: Topology, otherwise: str = "") -> list[Any]:
    """The devices to compile for: simulated CPUs, GPUs, or the TPUs of a slice.

    Args:
        topology: the topology.
        otherwise: text that ends the error about a missing compiler: an alternative to installing
            it.

    Raises:
        ConfigError: the compiler is not installed, or cannot compile for this topology.

    """
    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.size]
    if topology.platform == "cuda":
        try:
            return open_gpus(topology.kind, topology.size)
        except NotImplementedError as error:  # JAX has no such platform
            message = (
                f"compiling for {topology.name} needs jax-cuda12-plugin: pip install "
                f"'gptjax[cuda-aot]'{otherwise}"
            )
            raise ConfigError(message) from error
    from jax.experimental import topologies

    single = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}
    # Both cores as one device, as on a TPU VM
    both_cores = {"chip_config_name": "megacore"} if topology.kind == "TPU v4" else {}
    try:
        described = topologies.get_topology_desc(topology.name, "tpu", **single, **both_cores)
    # JAX raises RuntimeError if there is no libtpu, or if it refuses
    except (ImportError, RuntimeError) as error:
        if "not installed" in str(error):
            message = (
                f"compiling for {topology.name} needs libtpu: pip install 'gptjax[tpu]'{otherwise}"
            )
            raise ConfigError(message) from error
        raise ConfigError(
            f"libtpu refuses the topology {topology.name}: {str(error).splitlines()[0]}"
        ) from error
    return described.devices
