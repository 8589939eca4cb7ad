"""Files: only regular ones are read, small ones only up to a limit; what is written appears whole,
or not at all.

A device or a named pipe can be endless, or hang whoever opens it, and a folder of a model or a run
may come from anywhere.
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
    """Open a regular file for reading bytes; links are followed.

    Raises:
        FormatError: it is a folder, a device, a named pipe or a socket, none of which is opened.
        OSError: it is missing, or may not be read.

    """
    check_file(path)  # before opening, since that alone can hang, or set a device going
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced in between
    except BaseException:
        file.close()
        raise
    return file


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise as `open_file` does unless there is a regular file: for libraries that open it
    themselves.
    """
    _check_mode(path, os.stat(path).st_mode)


def read_small(path: str | os.PathLike[str], largest: int) -> bytes:
    """The content of a regular file of at most ``largest`` bytes.

    Raises:
        FormatError: it is larger, or no regular file.
        OSError: it cannot be read.

    """
    with naming(path), open_file(path) as file:
        # It can be wrong: files grow, and those of /proc have 0
        if os.fstat(file.fileno()).st_size > largest:
            raise too_large(path, largest)
        return read_stream(file, path, largest)


def read_stream(file: BinaryIO, name: str | os.PathLike[str], largest: int) -> bytes:
    """All that comes, of at most ``largest`` bytes; ``name`` is for the message.

    Raises:
        FormatError: it is more.

    """
    parts, left = [], largest + 1
    while left and (part := file.read(min(left, PIECE))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise too_large(name, largest)
    return b"".join(parts)


def too_large(name: str | os.PathLike[str], largest: int) -> FormatError:
    """The error of `read_small` and `read_stream`."""
    return FormatError(f"{name} has more than the {largest} bytes that are read of it")


def read_text(path: str | os.PathLike[str], largest: int) -> str:
    """`read_small`, decoded, with every line end as a newline.

    Raises:
        UnicodeDecodeError: it is not UTF-8.

    """
    return read_small(path, largest).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise FormatError(
            f"{path} cannot be read: it is {KINDS.get(stat.S_IFMT(mode), 'something odd')}, not a file"
        )


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name once it is whole and on disk; if the block fails, nothing
    remains.
    """
    # Of this process: others may write the same file
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
    """Let ``write`` fill a temporary folder, then give it its name: a folder that exists is
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
            if not folder.exists():  # else another process made the same folder meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Let one process at a time hold the file ``lock``, which is there meanwhile; the others wait.
    Its death lets it go.
    """
    while True:
        with naming(lock):
            file = lock.open("w")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # who held it has removed it
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                break
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def set_aside(path: Path) -> Path:
    """Rename what is damaged to ``damaged-NAME``, or with -2, -3... after it, so that nothing is
    lost. Returns its new path.
    """
    numbered = (f"damaged-{path.name}-{n}" for n in itertools.count(2))
    names = map(path.with_name, itertools.chain([f"damaged-{path.name}"], numbered))
    return path.rename(next(name for name in names if not name.exists()))
