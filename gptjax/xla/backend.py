"""Start JAX's backend and name its platform."""

import jax
import jax.extend.backend

from gptjax.errors import ConfigError


def start_jax(dtype: str) -> None:
    """Start JAX's backend, with 64-bit types enabled for float64.

    Raises:
        ConfigError: the requested platform is not available.

    """
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError, AssertionError and others
        raise ConfigError(
            f"JAX cannot start: {str(error) or 'no such device'}; unset JAX_PLATFORMS to use any "
            "available device"
        ) from error


def platform_name() -> str:
    """The platform that JAX computes on: cpu, cuda, rocm or tpu."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return backend.platform
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"
