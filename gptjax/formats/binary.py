"""llm.c's common file layout: a header of 256 little-endian int32, then arrays without gaps up to
the end of the file. llama2.c's files have another header.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import FormatError
from gptjax.files import open_file, write_whole

HEADER_BYTES = 1024


def read_header(path: Path, kind: str) -> tuple[list[int], int]:
    """Read the 256 numbers of the header, and the file's size in bytes.

    Args:
        path: the file.
        kind: the expected kind of file, for error messages.

    Raises:
        FormatError: it cannot be read, or is shorter than a header.

    """
    start, size = read_start(path, kind, HEADER_BYTES)
    return np.frombuffer(start, "<i4").tolist(), size


def read_start(path: Path, kind: str, length: int) -> tuple[bytes, int]:
    """Read a header of ``length`` bytes, and the file's size in bytes.

    Raises:
        FormatError: it cannot be read, or is shorter than that.

    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(length)
    except OSError as error:
        raise FormatError(f"{kind} {path} cannot be read: {error.strerror or error}") from error
    if len(start) < length:
        raise FormatError(
            f"{kind} {path} is truncated: {size} bytes, but its header alone takes {length}"
        )
    return start, size


def check_size(path: Path, kind: str, size: int, expected: int, announced: str) -> None:
    """Raise `FormatError` unless the file has exactly the size that its header implies."""
    if size != expected:
        raise FormatError(
            f"{kind} {path} is {'truncated' if size < expected else 'malformed'}: its header "
            f"announces {announced}, "
            f"{expected} bytes, but the file has {size}; write it again"
        )


def write_file(
    path: str | os.PathLike[str], header: Sequence[int], arrays: Iterable[np.ndarray]
) -> None:
    """Write header and arrays durably and atomically.

    Raises:
        OSError: it cannot be written; the message names the file.

    """
    padded = np.zeros(HEADER_BYTES // 4, "<i4")
    padded[: len(header)] = header
    write_arrays(path, padded.tobytes(), arrays)


def write_arrays(path: str | os.PathLike[str], header: bytes, arrays: Iterable[np.ndarray]) -> None:
    """Write a header of any length and arrays durably and atomically.

    Raises:
        OSError: it cannot be written; the message names the file.

    """
    with write_whole(Path(path)) as file:
        file.write(header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
