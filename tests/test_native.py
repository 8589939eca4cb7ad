"""The C++ kernels, held to what XLA computes; and what happens where they cannot be compiled."""

import dataclasses
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import native
from gptjax.optim import init_opt_state, make_optimizer
from tests.models import tiny
from tests.test_optim import SETTINGS, assert_equals_optax, gradients_like, step

needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


def params(**changes):
    return tiny.params(tiny.config(dtype="float32", **changes), jnp.float32)


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"grad_clip": 0.0}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("channels", [8, 160])
def test_adamw_equals_optaxs(changes, channels):
    """Of tensors smaller than what a thread takes at a time, and of larger ones that are no multiple of it."""
    with jax.enable_x64(False):
        large = params(channels=channels, num_heads=4)
        assert (max(x.size for x in large.fcw) > 2 * 2**15) == (channels == 160)
        assert_equals_optax(dataclasses.replace(SETTINGS, **changes), large, 2e-6, native=True)


@needs_compiler
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nothing_changes_where_loss_or_gradient_are_not_finite(bad):
    with jax.enable_x64(False):
        before = params()
        optimizer = make_optimizer(SETTINGS, 10)
        (good,) = gradients_like(before, 1)
        state = before, init_opt_state(optimizer, before)
        *state, _ = step(optimizer, state, good, native=True)
        for loss, grads in ((bad, good), (1.0, good._replace(wpe=good.wpe.at[0, 0].set(bad)))):
            *after, metrics = step(optimizer, state, grads, loss, native=True)
            assert not metrics.finite
            jax.tree.map(np.testing.assert_array_equal, tuple(after), tuple(state))


@needs_compiler
def test_what_is_not_donated_is_left_as_it_was():
    """XLA then gives the kernel other memory to write to, with what is to be overwritten in it or not."""
    with jax.enable_x64(False):
        before = params()
        kept = jax.tree.map(np.array, before)
        optimizer = make_optimizer(SETTINGS, 10)
        (grads,) = gradients_like(before, 1)
        after, _, _ = step(optimizer, (before, init_opt_state(optimizer, before)), grads, native=True)
        jax.tree.map(np.testing.assert_array_equal, before, kept)
        assert jnp.abs(after.wte - before.wte).max() > 1e-3


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and a folder of its own to keep it in."""
    monkeypatch.setattr("gptjax.native.compiled_folder", lambda: tmp_path)
    native.available.cache_clear()
    yield tmp_path
    native.available.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_that_works_they_are_not_available(fresh, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert not native.available()
    assert not list(fresh.iterdir())


@needs_compiler
def test_they_are_compiled_once(fresh, monkeypatch):
    path = native.library()
    assert list(fresh.iterdir()) == [path]
    monkeypatch.setattr(subprocess, "run", None)
    assert native.library() == path
    monkeypatch.setattr("gptjax.native.processor", lambda: "another")
    with pytest.raises(TypeError):  # of another processor's there are none
        native.library()


@needs_compiler
def test_without_a_place_to_keep_them_they_are_compiled_anew(monkeypatch):
    def no_place():
        raise OSError

    monkeypatch.setattr("gptjax.native.compiled_folder", no_place)
    first, second = native.library(), native.library()
    assert first != second
    assert first.exists()


def test_the_source_is_part_of_the_package():
    assert Path(native.SOURCE).suffix == ".cc"
    assert "native/*.cc" in (Path(__file__).parents[1] / "pyproject.toml").read_text()
