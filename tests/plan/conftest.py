"""The command in the process of the tests."""

import os

import jax
import pytest


@pytest.fixture
def as_a_process(monkeypatch):
    """What the command sets for its process, given back; and numbers of 32 bits, as outside the tests."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    platforms = jax.config.jax_platforms
    with jax.enable_x64(False):
        yield
    jax.config.update("jax_platforms", platforms)
