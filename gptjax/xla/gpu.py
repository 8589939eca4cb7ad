"""Compile for a GPU that is not in this machine."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

CUDNN = (9, 10)
H100: dict[str, Any] = {  # an H100 SXM: NVIDIA's data sheet, and what its driver reports
    "gpu_device_info": {
        "cuda_compute_capability": {"major": 9},
        "core_count": 132,  # streaming multiprocessors
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84_942_979_072,
        "memory_bandwidth": 3_352_320_000_000,  # bytes a second
        "l2_cache_size": 50 << 20,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 1 << 16,
        "registers_per_core_limit": 1 << 16,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": 227 << 10,
        "shared_memory_per_core": 228 << 10,
        "block_dim_limit_x": (1 << 31) - 1,
        "block_dim_limit_y": (1 << 16) - 1,
        "block_dim_limit_z": (1 << 16) - 1,
    },
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H100 80GB HBM3",
    "runtime_version": {"major": 12, "minor": 8},
    "dnn_version_info": {"major": CUDNN[0], "minor": CUDNN[1]},
}


def proto_text(fields: dict[str, Any]) -> str:
    """A protocol buffer message in text format: numbers, strings, and messages as dictionaries."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, dict):
            lines.append(f"{name} {{\n{proto_text(value)}}}\n")
        else:
            lines.append(f'{name}: "{value}"\n' if isinstance(value, str) else f"{name}: {value}\n")
    return "".join(lines)


def open_h100s(count: int) -> list[Any]:
    """Compile-only devices: ``count`` H100s of one process.

    Raises:
        NotImplementedError: JAX's CUDA plugin is not installed.

    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", target_config=proto_text(H100), topology=f"1x1x{count}"
    ).devices


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Let JAX trace cuDNN's attention without an installed cuDNN, as if it were version `CUDNN`.

    The version check is internal to JAX; a version of JAX without it is left alone.
    """
    version = CUDNN[0] * 10_000 + CUDNN[1] * 100
    try:
        module: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        installed = module.check_cudnn_version
    except (ImportError, AttributeError):
        yield
        return

    def answer() -> int:
        try:
            return installed()
        except RuntimeError:
            return version

    module.check_cudnn_version = answer
    try:
        yield
    finally:
        module.check_cudnn_version = installed
