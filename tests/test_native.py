"""The C++ kernels, held to what XLA computes; and what happens where they cannot be compiled."""

import _ctypes
import dataclasses
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import native
from gptjax.optim import init_opt_state, make_optimizer
from tests.models import tiny
from tests.test_optim import SETTINGS, assert_equals_optax, compiled, gradients_like


@pytest.fixture
def compiler():
    if not native.available():
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")


def params(**changes):
    return tiny.params(tiny.config(dtype="float32", **changes), jnp.float32)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("changes", "channels"), [({}, 160), ({"grad_clip": 0.0}, 8), ({"weight_decay": 0.0}, 8)])
def test_adamw_equals_optaxs(changes, channels):
    """Of tensors smaller than what a thread takes at a time, and of larger ones that are no multiple of it."""
    with jax.enable_x64(False):
        large = params(channels=channels, num_heads=4)
        assert (max(x.size for x in large.fcw) > 2 * 2**15) == (channels == 160)
        assert_equals_optax(dataclasses.replace(SETTINGS, **changes), large, 2e-6, native=True)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nothing_changes_where_loss_or_gradient_are_not_finite(bad):
    with jax.enable_x64(False):
        before = params()
        optimizer = make_optimizer(SETTINGS, 10)
        (good,) = gradients_like(before, 1)
        step = compiled(optimizer, native=True)
        *state, _ = step((before, init_opt_state(optimizer, before)), good)
        for loss, grads in ((bad, good), (1.0, good._replace(wpe=good.wpe.at[0, 0].set(bad)))):
            *after, metrics = step(tuple(state), grads, loss)
            assert not metrics.finite
            jax.tree.map(np.testing.assert_array_equal, tuple(after), tuple(state))


@pytest.mark.usefixtures("compiler")
def test_what_is_not_donated_is_left_as_it_was():
    """XLA then has the kernel overwrite copies."""
    with jax.enable_x64(False):
        before = params()
        kept = jax.tree.map(np.array, before)
        optimizer = make_optimizer(SETTINGS, 10)
        (grads,) = gradients_like(before, 1)
        after, _, _ = compiled(optimizer, native=True)((before, init_opt_state(optimizer, before)), grads)
        jax.tree.map(np.testing.assert_array_equal, before, kept)
        assert jnp.abs(after.wte - before.wte).max() > 1e-3


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A folder of its own to keep what is compiled, nothing in it yet."""
    monkeypatch.setattr("gptjax.native.compiled_folder", lambda: tmp_path)
    monkeypatch.setattr(native, "FLAGS", [flag for flag in native.FLAGS if flag != "-O3"])  # quicker
    return tmp_path


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", '"unclosed', "sleep 9 #"])
def test_without_a_compiler_that_works_it_is_not_available(kept, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "PATIENCE", 0.2)
    with caplog.at_level("INFO", "gptjax.native"):
        assert not native.available.__wrapped__()
    assert "AdamW is XLA's" in caplog.text
    assert not list(kept.iterdir())


def compilers_calls(monkeypatch):
    """A list that grows with each call of the compiler."""
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options))
    return calls


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_once_for_each_processor(kept, monkeypatch):
    calls = compilers_calls(monkeypatch)
    assert native.library().adamw
    assert native.library().adamw
    assert (len(calls), len(list(kept.iterdir()))) == (1, 1)
    monkeypatch.setattr("gptjax.native.processor", lambda: "another")
    native.library()
    assert (len(calls), len(list(kept.iterdir()))) == (2, 2)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("content", ["nothing", "another library"])
def test_a_damaged_one_is_made_anew(kept, monkeypatch, content):
    native.library()
    (path,) = kept.iterdir()
    path.unlink()  # it is loaded: writing into it would be writing into this process
    path.write_bytes(b"" if content == "nothing" else Path(_ctypes.__file__).read_bytes())
    calls = compilers_calls(monkeypatch)
    assert native.library().adamw
    assert len(calls) == 1
    assert b"adamw" in path.read_bytes()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("place", ["not a folder", "not wanted"])
def test_without_a_place_to_keep_it_it_is_compiled_anew_and_nothing_is_left(kept, monkeypatch, tmp_path, place):
    def folder():
        return Path("/dev/null") if place == "not a folder" else kept

    monkeypatch.setattr("gptjax.native.compiled_folder", folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    calls, enabled = compilers_calls(monkeypatch), jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", place != "not wanted")
    try:
        assert native.library().adamw
        assert native.library().adamw
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
