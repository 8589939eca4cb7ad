"""The compiler's options for the programs of a training step."""

from typing import Any

import jax

OPTIONS: dict[str, dict[str, Any]] = {
    # Keep few arrays alive at once
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "cuda": {
        # Round to 16 bits where the code does; else XLA writes float32 between its kernels
        "xla_allow_excess_precision": False,
        # Products by cuBLASLt, which takes bias, GELU and residual stream in
        "xla_gpu_enable_triton_gemm": False,
        # Three products for q, k and v, or their results would be cut out and joined again
        "xla_gpu_dot_merger_threshold_mb": 0,
        # Scatter each layer's gradient as soon as it is computed; XLA combines them all otherwise
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 << 20,
    },
}


def compile_tuned(lowered: jax.stages.Lowered, device: Any) -> Any:
    """Compile with the `OPTIONS` of the device's platform, those that this XLA has."""
    name = "cuda" if device.device_kind.startswith("NVIDIA") else device.platform
    options = dict(OPTIONS.get(name, {}))
    while True:
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            unknown = [option for option in options if f"'{option}'" in str(error)]
            if "compile option" not in str(error) or not unknown:
                raise
            for option in unknown:
                del options[option]
