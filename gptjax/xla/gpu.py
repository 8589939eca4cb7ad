"""Compile for a GPU that is not in this machine."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

CUDNN = (9, 10)


def _gpu(name: str, major_minor: tuple[int, int], cores: int, fpus: int, **fields: Any) -> Any:
    """XLA's GpuTargetConfigProto of a GPU; sizes in KiB, clock in GHz, bandwidth in GB/s."""
    major, minor = major_minor
    return {
        "gpu_device_info": {
            "cuda_compute_capability": {"major": major} | ({"minor": minor} if minor else {}),
            "core_count": cores,  # streaming multiprocessors
            "fpus_per_core": fpus,
            "clock_rate_ghz": fields["clock"],
            "device_memory_size": fields["memory"],
            "memory_bandwidth": round(fields["bandwidth"] * 10**9),  # bytes a second
            "l2_cache_size": fields["l2"] << 10,
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": fields["threads"],
            "registers_per_block_limit": 1 << 16,
            "registers_per_core_limit": 1 << 16,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_block_optin": (fields["shared"] - 1) << 10,
            "shared_memory_per_core": fields["shared"] << 10,
            "block_dim_limit_x": (1 << 31) - 1,
            "block_dim_limit_y": (1 << 16) - 1,
            "block_dim_limit_z": (1 << 16) - 1,
        },
        "platform_name": "CUDA",
        "device_description_str": name,
        "runtime_version": {"major": 12, "minor": 8},
        "dnn_version_info": {"major": CUDNN[0], "minor": CUDNN[1]},
    }


# NVIDIA's data sheets; memory as its driver reports it
_HOPPER: Any = {"threads": 2048, "shared": 228, "l2": 50 << 10}
_H100: Any = {"clock": 1.98, "memory": 84_942_979_072, "bandwidth": 3352.32}
_A100: Any = {"clock": 1.41, "memory": 84_987_740_160, "bandwidth": 2039}
_L4: Any = {"clock": 2.04, "memory": 23_580_639_232, "bandwidth": 300}
TARGETS: dict[str, Any] = {
    target["device_description_str"]: target
    for target in (
        _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, **_H100, **_HOPPER),
        _gpu(
            "NVIDIA H100 PCIe",
            (9, 0),
            114,
            128,
            **_HOPPER,
            **_H100 | {"bandwidth": 2000, "clock": 1.755},
        ),
        _gpu(
            "NVIDIA H200",
            (9, 0),
            132,
            128,
            **_HOPPER,
            **_H100 | {"bandwidth": 4800, "memory": 150_754_820_096},
        ),
        _gpu(
            "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, **_A100, threads=2048, shared=164, l2=40 << 10
        ),
        _gpu("NVIDIA L4", (8, 9), 58, 128, **_L4, threads=1536, shared=100, l2=48 << 10),
    )
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


def open_gpus(kind: str, count: int) -> list[Any]:
    """Compile-only devices: ``count`` GPUs of one process, of a kind in `TARGETS`.

    Raises:
        NotImplementedError: JAX's CUDA plugin is not installed.

    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", target_config=proto_text(TARGETS[kind]), topology=f"1x1x{count}"
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
