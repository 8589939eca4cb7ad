"""Files and folders that appear whole under their name, or not at all."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptjax.errors import naming

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name once it is whole and on disk; if the block fails, nothing remains."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # of this process: others may write the same file
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary folder, then give it its name: a folder that exists is complete."""
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
    """Let one process at a time hold the file ``lock``, which is there meanwhile; the others wait. Its death lets it go."""
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
    """Rename what is damaged to ``damaged-NAME``, or with -2, -3... after it, so that nothing is lost. Returns its new path."""
    numbered = (f"damaged-{path.name}-{n}" for n in itertools.count(2))
    names = map(path.with_name, itertools.chain([f"damaged-{path.name}"], numbered))
    return path.rename(next(name for name in names if not name.exists()))
