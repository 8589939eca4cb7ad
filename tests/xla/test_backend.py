from types import SimpleNamespace

import pytest

from gptjax.errors import ConfigError
from gptjax.xla.backend import platform_name, start_jax


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no such device")])
def test_a_platform_that_is_not_there(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(ConfigError, match="JAX cannot start: no such device; unset JAX_PLATFORMS"):
        start_jax("float32")


@pytest.mark.parametrize(
    ("platform", "version", "name"),
    [
        ("cpu", "cpu", "cpu"),
        ("tpu", "libtpu", "tpu"),
        ("gpu", "PJRT C API\ncuda 12090", "cuda"),
        ("gpu", "ROCm 6", "rocm"),
    ],
)
def test_a_gpu_is_called_by_its_maker(monkeypatch, platform, version, name):
    backend = SimpleNamespace(platform=platform, platform_version=version)
    monkeypatch.setattr("jax.extend.backend.get_backend", lambda: backend)
    assert platform_name() == name
