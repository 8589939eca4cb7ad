"""The command in the process of the tests, and what compiles for TPUs."""

import importlib.util
import os

import jax
import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the [tpu] extra)"
)


@pytest.fixture
def as_a_process(monkeypatch):
    """What the command sets for its process, given back; and numbers of 32 bits, as outside the
    tests.
    """
    monkeypatch.setattr(os, "environ", dict(os.environ))
    platforms = jax.config.jax_platforms
    with jax.enable_x64(False):
        yield
    jax.config.update("jax_platforms", platforms)
