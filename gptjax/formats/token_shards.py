"""Token shards: llm.c's ``.bin`` files of token ids (the layout that modded-nanogpt shares).

A header of 256 little-endian int32, ``[20240520, 1, number of tokens, 0...]``, then the ids as uint16: exactly
``1024 + 2 n`` bytes. Files are memory-mapped, never loaded whole.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.errors import FormatError, naming

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024


class Shard(NamedTuple):
    """One opened shard: where it lies and its ids, memory-mapped, (n,) uint16."""

    path: Path
    tokens: np.ndarray


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Validate and map one shard.

    Raises:
        FormatError: missing, unreadable or not a shard: wrong magic, version or size.

    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), "<i4") if size >= HEADER_BYTES else None
    except OSError as error:
        raise FormatError(f"token shard {path} cannot be read: {error.strerror or error}") from error
    if header is None:
        raise FormatError(f"token shard {path} is truncated: {size} bytes, but its header alone takes {HEADER_BYTES}")
    magic, version, count = (int(x) for x in header[:3])
    if magic != MAGIC or version != VERSION:
        raise FormatError(f"{path} is not a token shard: it begins {magic}, {version} where {MAGIC}, {VERSION} is expected")
    expected = HEADER_BYTES + 2 * count
    if count < 1 or size != expected:
        raise FormatError(
            f"token shard {path} is {'truncated' if size < expected else 'malformed'}: its header announces {count} tokens, "
            f"{expected} bytes, but the file has {size}; write it again"
        )
    return Shard(path, np.memmap(path, "<u2", "r", HEADER_BYTES, (count,)))


def write_shard(path: str | os.PathLike[str], tokens: Iterable[int] | np.ndarray) -> None:
    """Write ids as one shard, durably: either the whole file appears under its name, or nothing does.

    Raises:
        ValueError: an id does not fit 16 bits.

    """
    path = Path(path)
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"token ids must be in 0..65535 to be written as uint16, not {ids.min()}..{ids.max()}")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, ids.size
    partial = path.with_name(path.name + ".partial")
    with naming(path), partial.open("wb") as file:
        file.write(header.tobytes())
        file.write(ids.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
