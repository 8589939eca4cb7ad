"""Read regular files only, up to a limit, and write files atomically.

The folder of a model or a run may come from anywhere, and opening or reading a device or a named
pipe in it could hang.
"""

import contextlib
import io
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptjax.errors import FormatError, naming

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

PIECE = 1 << 20  # bytes read at a time
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading bytes, following links.

    Raises:
        FormatError: it is a folder, a device, a named pipe or a socket.
        OSError: it is missing, or may not be read.

    """
    check_file(path)  # before opening, which can hang or start a device
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced since
    except BaseException:
        file.close()
        raise
    return file


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise as `open_file` does unless the path is a regular file; for libraries that open files
    themselves.
    """
    _check_mode(path, os.stat(path).st_mode)


def read_small(path: str | os.PathLike[str], largest: int) -> bytes:
    """Read a regular file of at most ``largest`` bytes.

    Raises:
        FormatError: it is larger, or not a regular file.
        OSError: it cannot be read.

    """
    with naming(path), open_file(path) as file:
        # A first check only: files grow, and those in /proc have size 0
        if os.fstat(file.fileno()).st_size > largest:
            raise too_large(path, largest)
        return read_stream(file, path, largest)


def read_stream(file: BinaryIO, name: str | os.PathLike[str], largest: int) -> bytes:
    """Read a stream of at most ``largest`` bytes; ``name`` is for the error message.

    Raises:
        FormatError: it is longer.

    """
    chunks, left = [], largest + 1
    while left and (chunk := file.read(min(left, PIECE))):
        chunks.append(chunk)
        left -= len(chunk)
    if not left:
        raise too_large(name, largest)
    return b"".join(chunks)


def too_large(name: str | os.PathLike[str], largest: int) -> FormatError:
    """The error that `read_small` and `read_stream` raise."""
    return FormatError(f"{name} has more than the {largest} bytes that are read of it")


def read_text(path: str | os.PathLike[str], largest: int) -> str:
    """Read a small text file, with all line ends converted to newlines; see `read_small`.

    Raises:
        UnicodeDecodeError: it is not UTF-8.

    """
    return read_small(path, largest).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise FormatError(
            f"{path} cannot be read: "
            f"it is {KINDS.get(stat.S_IFMT(mode), 'something odd')}, not a file"
        )


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name once complete and on disk, or is removed if the
    block fails.
    """
    # The process id is in the name because others may write the same file
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary folder, then rename it, so that a folder that exists is
    complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process made it first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def file_lock(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock for the block; other processes wait. The file ``lock`` exists while it
    is held. The lock is released if the process dies.
    """
    while True:
        with naming(lock):
            file = lock.open("w")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the previous holder removed it
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                break
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``damaged-NAME``, with -2, -3... appended if taken.

    Returns the new path.
    """
    numbered = (f"damaged-{path.name}-{n}" for n in itertools.count(2))
    names = map(path.with_name, itertools.chain([f"damaged-{path.name}"], numbered))
    return path.rename(next(name for name in names if not name.exists()))
