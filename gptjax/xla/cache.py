"""The cache of compiled programs, so that the next start need not compile them again.

Compiled code runs with this user's rights, so it is read only from places that nobody else can
write to, and only if intact.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import stat
from pathlib import Path
from typing import Any

import jax

LARGEST = 2**26  # bytes of a file that `read_private` reads


class NotPrivateError(OSError):
    """A file or folder that users other than this one and root can change."""


def processor() -> str:
    """A hash of the kind of processor, 12 hex digits: code compiled for one kind may crash on
    another.
    """
    cpuinfo = Path("/proc/cpuinfo")
    kind = (
        re.search(r"^(?:flags|Features)\s*:.*", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.exists()
        else None
    )
    return hashlib.sha256(
        f"{platform.machine()} {kind[0] if kind else platform.processor()}".encode()
    ).hexdigest()[:12]


def compiled_folder() -> Path:
    """Make the cache folder: JAX's own if one is configured on this machine, else
    ``~/.cache/gptjax/compiled-PROCESSOR``.

    Raises:
        NotPrivateError: others can write to it.
        OSError: it cannot be made.
        RuntimeError: there is no home folder.

    """
    config: Any = jax.config
    configured = config.jax_compilation_cache_dir
    if configured and "://" not in configured:
        folder = Path(configured)
    else:
        folder = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "gptjax"
            / f"compiled-{processor()}"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _assert_private(folder.stat(), folder)
    return folder


def read_private(path: Path) -> bytes:
    """Read a regular file that only this user or root can have written, through one descriptor.

    Raises:
        NotPrivateError: the file or its folder belongs to someone else, or others may write to it.
        OSError: it cannot be read, is not a regular file, or is larger than `LARGEST`.

    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _assert_private(os.fstat(folder), path.parent)
        # Without O_NONBLOCK, opening a pipe would wait for a writer
        descriptor = os.open(
            path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
        )
    finally:
        os.close(folder)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _assert_private(status, path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise OSError(f"{path} is not a regular file of at most {LARGEST} bytes")
        return file.read(LARGEST)


def _assert_private(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise NotPrivateError(
            f"{path} belongs to another user (uid {status.st_uid}), who could plant programs there"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivateError(f"other users may write to {path} and could plant programs there")


def enable_compilation_cache() -> None:
    """Cache JAX's compiled programs in ``~/.cache/gptjax`` (``XDG_CACHE_HOME``), so that the next
    start need not compile them again.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` turns
    the cache off. Each kind of processor has its own folder, which may be deleted at any time; its
    size is not limited. If the folder cannot be made, nothing is cached; likewise if others could
    write to it, which is logged.
    """
    config: Any = jax.config
    replace_damaged_programs()
    try:
        folder = compiled_folder()
    except NotPrivateError as error:
        logging.getLogger(__name__).warning(
            "compiled programs are not cached: %s; delete the folder, or name one of your own in "
            "JAX_COMPILATION_CACHE_DIR",
            error,
        )
        config.update("jax_enable_compilation_cache", False)
    except (OSError, RuntimeError):
        pass
    else:
        if not config.jax_compilation_cache_dir:
            config.update("jax_compilation_cache_dir", str(folder))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class CheckedPrograms:
    """JAX's store of compiled programs with a checksum for each; a damaged program is removed, so
    that JAX stores it again.

    JAX itself warns of a damaged program at every start but never replaces it, and without a
    checksum in its compression format it runs the damaged code. Entries are named differently from
    JAX's own, which have no checksum.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._path = store._path  # JAX logs it

    def get(self, key: str) -> bytes | None:
        """The program stored as ``key``; None if it is missing or damaged."""
        found = self._store.get(_checked(key))
        if found is None:
            return None
        checksum, program = found[:32], found[32:]
        if hashlib.sha256(program).digest() == checksum:
            return program
        for path in (self._path / f"{_checked(key)}-{suffix}" for suffix in ("cache", "atime")):
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Store a program unless the key exists."""
        self._store.put(_checked(key), hashlib.sha256(value).digest() + value)


def _checked(key: str) -> str:
    return f"{key}-sha256"


def replace_damaged_programs() -> None:
    """Let JAX store its programs in `CheckedPrograms`. Call before JAX compiles anything.

    JAX has no public interface for that. A later version without the internals used here keeps its
    own behaviour.
    """
    try:
        from jax._src import compilation_cache as jaxs

        make = jaxs.get_file_cache
    except (ImportError, AttributeError):
        logging.getLogger(__name__).info(
            "this version of JAX warns of damaged programs but does not replace them"
        )
        return
    if getattr(make, "checked", False):
        return

    def checked(path: str) -> Any:
        made = make(path)
        return made and (CheckedPrograms(made[0]), made[1])

    checked.checked = True  # type: ignore[attr-defined]
    jaxs.get_file_cache = checked
