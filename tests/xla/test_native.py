"""The C++ kernels, held to what XLA computes; and what happens where they cannot be compiled."""

import _ctypes
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import ConfigError
from gptjax.train.optimizer import make_optimizer
from gptjax.xla import native
from tests.models import tiny
from tests.train.test_optimizer import SETTINGS, assert_equals_optax, gradients_like, step_function


@pytest.fixture(autouse=True)
def _strict():
    """Optax's schedules, which these tests go through, change dtypes."""


@pytest.fixture
def compiler():
    if not native.available("adamw"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")


CFG = tiny.config(dtype="float32")
OPTIMIZER = make_optimizer(SETTINGS, 10, CFG)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("changes", "channels"), [({}, 160), ({"grad_clip": 0.0}, 8), ({"weight_decay": 0.0}, 8)]
)
def test_adamw_equals_optaxs(changes, channels):
    """Of tensors smaller than what a thread takes at a time, and of larger ones that are no
    multiple of it.
    """
    with jax.enable_x64(False):
        cfg = tiny.config(dtype="float32", channels=channels, num_heads=4)
        params = tiny.params(cfg, jnp.float32)
        assert (params.blocks[1].fcw.size > 2 * 2**15) == (channels == 160)
        assert_equals_optax(
            dataclasses.replace(SETTINGS, **changes),
            cfg,
            params,
            2e-6,
            fused=True,
            native_code=True,
        )


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nothing_changes_where_loss_or_gradient_are_not_finite(bad):
    with jax.enable_x64(False):
        before = tiny.params(CFG, jnp.float32)
        (good,) = gradients_like(before, 1)
        step = step_function(OPTIMIZER, fused=True, native_code=True)
        *state, _ = step((before, OPTIMIZER.transform.init(before)), good)
        for loss, grads in ((bad, good), (1.0, good._replace(wpe=good.wpe.at[0, 0].set(bad)))):
            *after, metrics = step(tuple(state), grads, loss)
            assert not metrics.finite
            jax.tree.map(np.testing.assert_array_equal, tuple(after), tuple(state))


@pytest.mark.usefixtures("compiler")
def test_what_is_not_donated_is_left_as_it_was():
    """XLA then has the kernel overwrite copies."""
    with jax.enable_x64(False):
        before = tiny.params(CFG, jnp.float32)
        kept = jax.tree.map(np.array, before)
        (grads,) = gradients_like(before, 1)
        step = step_function(OPTIMIZER, fused=True, native_code=True)
        after, _, _ = step((before, OPTIMIZER.transform.init(before)), grads)
        jax.tree.map(np.testing.assert_array_equal, before, kept)
        assert jnp.abs(after.wte - before.wte).max() > 1e-3


@pytest.fixture
def kept(monkeypatch, tmp_path, tmp_path_factory):
    """A folder of its own to keep what is compiled, nothing in it yet; and less to compile."""
    monkeypatch.setattr("gptjax.xla.native.compiled_folder", lambda: tmp_path)
    folder = tmp_path_factory.mktemp("source")
    (folder / "adamw.cc").write_text('extern "C" void adamw() {}')
    monkeypatch.setattr(native, "FOLDER", folder)
    return tmp_path


def script(path, *lines):
    """A program of ``path``'s, for ``CXX``."""
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


# The last argument is the output
GARBAGE = 'for last; do :; done; printf "\\177ELF and nothing that follows" > "$last"'


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", '"unclosed', GARBAGE])
def test_without_a_compiler_that_works_it_is_not_available(
    kept, monkeypatch, caplog, tmp_path_factory, compiler
):
    if compiler == GARBAGE:
        compiler = script(tmp_path_factory.mktemp("bin") / "c++", GARBAGE)
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level("INFO", "gptjax.xla.native"):
        assert not native.registered.__wrapped__("adamw")
    assert "adamw is computed by XLA" in caplog.text
    assert not list(kept.iterdir())


@pytest.mark.usefixtures("compiler")
def test_a_crashing_library_crashes_only_a_child_process(
    kept, monkeypatch, caplog, tmp_path_factory
):
    """The first half of a library: the dynamic linker reads behind its end."""
    folder = tmp_path_factory.mktemp("bin")
    half = folder / "half.so"
    code = native.compiled("adamw", native.compiler(), None)
    half.write_bytes(code[: len(code) // 2])
    monkeypatch.setenv("CXX", script(folder / "c++", f'for last; do :; done; cp {half} "$last"'))
    with caplog.at_level("INFO", "gptjax.xla.native"):
        assert not native.registered.__wrapped__("adamw")
    assert "adamw is computed by XLA" in caplog.text
    assert not list(kept.iterdir())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("leader", ["hangs", "exits"])
def test_all_that_a_compiler_started_ends_with_it(kept, monkeypatch, tmp_path_factory, leader):
    folder = tmp_path_factory.mktemp("bin")
    lines = f"sleep 600 & echo $! > {folder}/child", "wait" if leader == "hangs" else "exit 1"
    monkeypatch.setenv("CXX", script(folder / "c++", *lines))
    monkeypatch.setattr(native, "PATIENCE", 2.0 if leader == "hangs" else 60.0)
    before = time.monotonic()
    assert not native.registered.__wrapped__("adamw")
    assert time.monotonic() - before < 60
    child, end = int((folder / "child").read_text()), time.monotonic() + 30
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_a_compiler_that_hangs_is_not_asked_again_for_a_day(
    kept, monkeypatch, caplog, tmp_path_factory
):
    """Until the file that says so is deleted, or CXX names another."""
    slow = script(tmp_path_factory.mktemp("bin") / "c++", "sleep 600")
    monkeypatch.setenv("CXX", slow)
    monkeypatch.setattr(native, "PATIENCE", 0.2)
    calls = compilers_calls(monkeypatch)
    assert not native.registered.__wrapped__("adamw")
    assert len(calls) == 1
    (marker,) = kept.iterdir()
    with caplog.at_level("INFO", "gptjax.xla.native"):
        assert not native.registered.__wrapped__("adamw")
    assert len(calls) == 1
    assert f"delete {marker}, or name another compiler in CXX" in caplog.text
    yesterday = time.time() - native.LEFT_ALONE - 1
    os.utime(marker, (yesterday, yesterday))
    assert not native.registered.__wrapped__("adamw")
    assert len(calls) == 2
    assert time.time() - marker.stat().st_mtime < native.LEFT_ALONE
    monkeypatch.setenv("CXX", f"{slow} -O0")
    assert not native.registered.__wrapped__("adamw")
    assert len(calls) == 3


def compilers_calls(monkeypatch):
    """A list that grows with each call of the compiler."""
    calls, run = [], native.run

    def counted(command):
        if str(native.source("adamw")) in command:
            calls.append(command)
        run(command)

    monkeypatch.setattr(native, "run", counted)
    return calls


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_once_for_each_processor(kept, monkeypatch):
    """Whatever the umask."""
    calls = compilers_calls(monkeypatch)
    before = os.umask(0)
    try:
        assert native.library("adamw").adamw
    finally:
        os.umask(before)
    assert native.library("adamw").adamw
    assert (len(calls), len(list(kept.glob("*.so")))) == (1, 1)
    monkeypatch.setattr("gptjax.xla.native.processor", lambda: "another")
    native.library("adamw")
    assert (len(calls), len(list(kept.glob("*.so")))) == (2, 2)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "content", ["nothing", "half", "another library", "another library with its hash"]
)
def test_a_damaged_one_is_made_anew(kept, monkeypatch, content):
    native.library("adamw")
    (path,) = kept.glob("*.so")
    whole = path.read_bytes()
    damaged = {"nothing": b"", "half": whole[: len(whole) // 2]}.get(
        content, Path(_ctypes.__file__).read_bytes()
    )
    path.write_bytes(damaged)
    if content.endswith("hash"):
        native.recorded(path).write_text(native.sha256(damaged))
    calls = compilers_calls(monkeypatch)
    assert native.library("adamw").adamw
    assert len(calls) == 1
    assert path.read_bytes() == whole
    assert native.library("adamw").adamw
    assert len(calls) == 1


@pytest.mark.usefixtures("compiler")
def test_the_environment_chooses_an_instruction_set(monkeypatch):
    """Plain C++ is always there. A wrong name is refused for every kernel."""
    for kernel, name in (("product", "portable"), ("adamw", "AVX2"), ("attention", "mmx")):
        script = (
            "from gptjax.xla import native;"
            f"print(native.available({kernel!r}), native.instruction_set_in_use())"
        )
        environment = {**os.environ, native.ISA: name}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if name == "portable":
            assert done.stdout == "True portable\n"
        else:
            expected = f"{native.ISA} is {name!r}: choose avx512vnni, avxvnni, avx2 or portable"
            assert expected in done.stderr


@pytest.mark.usefixtures("compiler")
def test_an_instruction_set_that_the_processor_lacks_is_refused():
    library = native.registered("product")
    with pytest.raises(ConfigError, match="'another', which this processor does not have"):
        native.use_instruction_set(library, "another")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("place", ["not a folder", "not wanted"])
def test_without_a_cache_folder_it_compiles_and_leaves_nothing(kept, monkeypatch, tmp_path, place):
    def folder():
        return Path("/dev/null") if place == "not a folder" else kept

    monkeypatch.setattr("gptjax.xla.native.compiled_folder", folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    calls, enabled = compilers_calls(monkeypatch), jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", place != "not wanted")
    try:
        assert native.library("adamw").adamw
        assert native.library("adamw").adamw
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
