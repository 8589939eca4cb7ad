"""Run folders: their names, and the lock of the one process that may write into each."""

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gptjax.errors import CheckpointError, naming

LOCK_FILE = "lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class RunInUseError(CheckpointError):
    """Another process is training this run."""


@contextlib.contextmanager
def claim(runs: Path, name: str, resume: str | None) -> Iterator[Path]:
    """Lock the folder of a run for the block, and unlock it even if the block raises.

    A new run gets a new folder, ``NAME``, ``NAME-2``, ``NAME-3``... A folder that is empty but for
    its lock is unused: it is removed at the end of the block, and the next run takes one that a
    killed process left.

    Args:
        runs: the folder that holds all runs.
        name: the run's name.
        resume: ``auto`` for the newest run of that name, or a new one if there is none; a run's
            folder to resume that run; None for a new run.

    Raises:
        CheckpointError: the folder to resume is not a run's, or another process is training it.

    """
    if resume is not None and resume != "auto":
        folder = Path(resume)
        if not (folder / "checkpoints").is_dir():
            raise CheckpointError(
                f"--resume {resume} is not the folder of a run: it has no checkpoints/ in it"
            )
        lock = _lock(folder)
    else:
        folder, lock = _newest(runs, name) if resume else _new(runs, name, _numbers(runs, name))
    try:
        yield folder
    finally:
        if _is_unused(folder):
            with contextlib.suppress(OSError):
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
        lock.close()


def _newest(runs: Path, name: str) -> tuple[Path, TextIO]:
    with contextlib.ExitStack() as kept:
        unused: tuple[Path, TextIO] | None = None
        numbers = _numbers(runs, name)
        for number in numbers:
            folder = _numbered(runs, name, number)
            with contextlib.suppress(FileNotFoundError):  # its process failed and removed it
                # In this order, in which a process that starts meanwhile makes them true
                if not (_is_unused(folder) or (folder / LOCK_FILE).exists() or is_run(folder)):
                    continue
                lock = _lock(folder)  # only then nothing changes
                if is_run(folder):
                    return folder, lock
                if unused or not _is_unused(folder):
                    lock.close()
                    continue
                # Keep the lock: two processes that search at once would each find it locked
                unused = folder, kept.enter_context(lock)
        kept.pop_all()
    return unused or _new(runs, name, numbers, resume=True)


def _new(runs: Path, name: str, numbers: list[int], resume: bool = False) -> tuple[Path, TextIO]:
    runs.mkdir(parents=True, exist_ok=True)
    taken = itertools.dropwhile(lambda number: _is_unused(_numbered(runs, name, number)), numbers)
    for number in itertools.count(next(taken, 0) + 1):
        folder = _numbered(runs, name, number)
        try:
            folder.mkdir()
        except FileExistsError:
            if not resume and not _is_unused(folder):
                continue
        try:
            lock = _lock(folder)
        except FileNotFoundError:
            continue
        except RunInUseError:  # another process was faster
            if resume:
                raise
            continue
        # When resuming, take over a run that another process has just started and left
        if resume or not is_run(folder):
            break
        lock.close()
    return folder, lock


def is_run(folder: Path) -> bool:
    """Whether training has begun in this folder."""
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def _is_unused(folder: Path) -> bool:
    """Whether the folder is empty, or holds only the lock of a process that ended before
    training.
    """
    with contextlib.suppress(OSError):
        return set(os.listdir(folder)) <= {LOCK_FILE}
    return False


def _numbers(runs: Path, name: str) -> list[int]:
    """Numbers of the existing folders with this name, newest first."""
    matches = (
        re.fullmatch(re.escape(name) + r"(?:-([1-9]\d*))?", path.name)
        for path in runs.glob(f"{glob.escape(name)}*")
    )
    return sorted({int(match[1] or 1) for match in matches if match}, reverse=True)


def _numbered(runs: Path, name: str, number: int) -> Path:
    return runs / (name if number == 1 else f"{name}-{number}")


def _lock(folder: Path) -> TextIO:
    """Lock a run's folder until the returned file is closed or the process ends. The file names the
    process.

    Raises:
        RunInUseError: another process holds the lock.
        FileNotFoundError: the folder was removed meanwhile.

    """
    path = folder / LOCK_FILE
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")  # noqa: SIM115
    try:
        _flock(file, folder)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _flock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        for _ in range(20):
            time.sleep(0.1)  # time for the owner to write its name
            file.seek(0)
            if owner := file.read(300).strip():
                break
        raise RunInUseError(
            f"{folder} is being trained by {owner or 'another process'}: wait until it ends, or "
            "stop it"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{folder} cannot be locked on this file system: do not start a second process there",
            stacklevel=2,
        )
