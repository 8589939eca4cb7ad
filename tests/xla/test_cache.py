import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax._src import compilation_cache as jaxs
from jax._src.lru_cache import LRUCache

from gptjax.xla import cache
from gptjax.xla.cache import (
    CheckedPrograms,
    NotPrivateError,
    compiled_folder,
    enable_compilation_cache,
    processor,
    read_private,
)

NOBODY = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def unset():
    """JAX keeps no programs."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_each_processor_has_a_folder_in_the_users_cache(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled_folder()
    assert first.is_dir()
    assert first.parent == tmp_path / "gptjax"
    assert processor() in first.name
    monkeypatch.setattr("gptjax.xla.cache.processor", lambda: "another")
    assert compiled_folder() == tmp_path / "gptjax" / "compiled-another"


def test_where_jax_keeps_its_programs_is_where_all_is_kept(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "here"))
    assert compiled_folder() == tmp_path / "here"
    assert compiled_folder().is_dir()


def test_what_is_kept_far_away_is_jaxs_alone(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    assert compiled_folder().parent == tmp_path / "gptjax"


def test_a_folder_that_cannot_be_made_is_an_error(unset, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(OSError, match="/dev/null"):
        compiled_folder()


# Whose the folder is


def test_nobody_else_can_write_to_the_folder_whatever_the_umask(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0)
    try:
        assert compiled_folder().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(unset, tmp_path, mode):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here").chmod(mode)
    with pytest.raises(NotPrivateError, match=f"other users may write to {tmp_path}/here"):
        compiled_folder()


@root
def test_a_folder_of_another_user_is_refused(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(
        NotPrivateError, match=f"{tmp_path} belongs to another user \\(uid {NOBODY}\\)"
    ):
        compiled_folder()


@pytest.mark.parametrize("configured", [True, False])
def test_nothing_is_cached_in_a_folder_that_others_can_write_to(
    unset, monkeypatch, tmp_path, caplog, configured
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled_folder()
    folder.chmod(0o777)
    if configured:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    enable_compilation_cache()
    assert not jax.config.jax_enable_compilation_cache
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING
    assert message.startswith(
        f"compiled programs are not cached: other users may write to {folder} and could plant "
        "programs there; delete"
    )


def test_programs_are_kept_where_only_this_user_writes(unset, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir == str(compiled_folder())
    assert not caplog.records


# What is read


def test_a_private_file_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"code")
    assert read_private(tmp_path / "file") == b"code"


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "absent", "large"])
def test_only_a_regular_file_is_read(tmp_path, monkeypatch, what):
    (tmp_path / "real").write_bytes(b"code")
    path = tmp_path / "file"
    monkeypatch.setattr(cache, "LARGEST", 4)
    {
        "link": lambda: path.symlink_to(tmp_path / "real"),
        "pipe": lambda: os.mkfifo(path, 0o600),
        "folder": path.mkdir,
        "absent": lambda: None,
        "large": lambda: path.write_bytes(b"codes"),
    }[what]()
    with pytest.raises(OSError, match="."):
        read_private(path)


@pytest.mark.parametrize("writable", ["file", "."])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_can_write_is_not_read(tmp_path, writable, mode):
    (tmp_path / "file").write_bytes(b"code")
    (tmp_path / writable).chmod(mode)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        read_private(tmp_path / "file")


@root
@pytest.mark.parametrize("foreign", ["file", "."])
def test_what_belongs_to_another_user_is_not_read(tmp_path, foreign):
    (tmp_path / "file").write_bytes(b"code")
    os.chown(tmp_path / foreign, NOBODY, NOBODY)
    with pytest.raises(NotPrivateError, match="belongs to another user"):
        read_private(tmp_path / "file")


# JAX's programs


@pytest.fixture
def programs(tmp_path):
    return CheckedPrograms(LRUCache(str(tmp_path), max_size=-1))


def test_a_whole_program_is_found(programs):
    assert programs.get("key") is None
    programs.put("key", b"program")
    assert programs.get("key") == b"program"


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-1], lambda b: b + b"x", lambda b: bytes([b[0] ^ 1]) + b[1:]],
)
def test_a_damaged_program_is_absent_and_can_be_stored_anew(programs, tmp_path, damage):
    programs.put("key", b"program")
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert programs.get("key") is None
    assert not path.exists()
    programs.put("key", b"program")
    assert programs.get("key") == b"program"


def test_what_jax_stores_by_itself_is_left_alone(programs, tmp_path):
    plain = LRUCache(str(tmp_path), max_size=-1)
    plain.put("key", b"program")
    assert programs.get("key") is None
    programs.put("key", b"another")
    assert plain.get("key") == b"program"
    assert programs.get("key") == b"another"


COMPILE = """
import jax, jax.numpy as jnp
from gptjax.xla.cache import enable_compilation_cache
enable_compilation_cache()

@jax.jit
def sines(x):
    return jnp.sin(x).sum()

print(sines(jnp.arange(9.0)))
"""


def test_jax_stores_a_damaged_program_anew(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start() -> tuple[float, dict[str, bytes]]:
        command = [sys.executable, "-W", "error", "-c", COMPILE]
        out = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        return float(out), {path.name: path.read_bytes() for path in tmp_path.glob("jit_sines-*")}

    expected, stored = start()
    assert expected == pytest.approx(np.sin(np.arange(9.0)).sum())
    (name,) = stored
    for size in (0, 20, len(stored[name]) // 2):
        (tmp_path / name).write_bytes(stored[name][:size])
        found, new = start()
        assert found == expected
        assert len(new[name]) > 100
        assert start() == (expected, new)


@pytest.mark.parametrize("missing", ["the function", "the module"])
def test_a_jax_without_these_internals_is_left_alone(monkeypatch, caplog, missing):
    if missing == "the function":
        monkeypatch.delattr(jaxs, "get_file_cache")
    else:
        monkeypatch.setitem(sys.modules, "jax._src.compilation_cache", None)
        monkeypatch.delattr("jax._src.compilation_cache")
    with caplog.at_level("INFO", "gptjax.xla.cache"):
        cache.replace_damaged_programs()
    assert "does not replace them" in caplog.text


def test_programs_are_checked_once():
    before = jaxs.get_file_cache
    cache.replace_damaged_programs()
    assert jaxs.get_file_cache is before
