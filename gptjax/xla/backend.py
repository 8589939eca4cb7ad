"""JAX's backend: its start, and the platform that it computes on."""

import jax
import jax.extend.backend

from gptjax.errors import ConfigError


def start_jax(dtype: str) -> None:
    """Start JAX's backend, with 64-bit numbers where they are computed with.

    Raises:
        ConfigError: the platform that JAX was told to use is not there.

    """
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError, AssertionError and others
        raise ConfigError(
            f"JAX cannot start: {str(error) or 'no such device'}; unset JAX_PLATFORMS to use what "
            "there is"
        ) from error


def platform_name() -> str:
    """The platform that JAX computes on: cpu, cuda, rocm or tpu."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return backend.platform
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"
