"""Token shards: files of token ids, memory-mapped, never loaded whole.

Four flavours are read, the first two are written:

- llm.c's (and modded-nanogpt's): a header of 256 little-endian int32, ``[20240520, 1, number of tokens, 0...]``, then the
  ids as uint16: exactly ``1024 + 2 n`` bytes;
- llm.c's for Llama 3: ``[20240801, 7, number of tokens, 0...]``, then uint32: ``1024 + 4 n`` bytes;
- without a header, nanoGPT's: uint16;
- without a header, older llm.c's: int32. A file without a header is this if the upper half of every number that is looked
  at, some thousands at the start, in the middle and at the end, is zero: as uint16, every other id would be 0.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import FormatError
from gptjax.formats.binary import HEADER_BYTES, check_size, read_header, write_whole

FLAVOURS: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic: version, dtype
DATES = range(20240101, 20300101)  # llm.c's files begin with the day on which their kind was made up
LOOKED_AT = 4096  # numbers


class Shard(NamedTuple):
    """One opened shard."""

    path: Path
    tokens: np.ndarray
    """(n,) ids, memory-mapped: uint16, uint32 or int32."""


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Validate and map one shard.

    Raises:
        FormatError: missing, unreadable or not a shard: wrong version or size, or nothing in it.

    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = int.from_bytes(file.read(4), "little")
    except OSError as error:
        raise FormatError(f"token shard {path} cannot be read: {error.strerror or error}") from error
    if magic in DATES and magic not in FLAVOURS:
        raise FormatError(f"{path} is not a token shard but another file of llm.c's: it begins {magic}")
    if magic not in FLAVOURS:
        return Shard(path, _without_header(path, size))
    (_, version, count, *_), size = read_header(path, "token shard")
    expected, dtype = FLAVOURS[magic]
    if version != expected:
        raise FormatError(f"{path} is a token shard of version {version}, where {expected} is expected after {magic}")
    check_size(path, "token shard", size, HEADER_BYTES + dtype.itemsize * max(count, 1), f"{count} tokens")
    return Shard(path, np.memmap(path, dtype, "r", HEADER_BYTES, (count,)))


def _without_header(path: Path, size: int) -> np.ndarray:
    if size == 0 or size % 2:
        raise FormatError(
            f"{path} is not a token shard: without the number {' or '.join(map(str, FLAVOURS))} in front it must be uint16 or "
            f"int32 ids, but it has {size} bytes"
        )
    narrow = np.memmap(path, "<u2", "r")
    if size % 4:
        return narrow
    wide = np.memmap(path, "<i4", "r")
    middle = wide.size // 2
    sampled = np.concatenate([wide[:LOOKED_AT], wide[middle : middle + LOOKED_AT], wide[-LOOKED_AT:]])
    return wide if ((sampled >= 0) & (sampled < 1 << 16)).all() else narrow


def write_shard(path: str | os.PathLike[str], tokens: Iterable[Any], dtype: Any = np.uint16) -> int:
    """Write ids as one shard, durably: either the whole file appears under its name, or nothing does.

    Args:
        path: the file.
        tokens: an array of ids, or several, which are written one by one.
        dtype: uint16 for llm.c's flavour, uint32 for Llama 3's.

    Returns:
        How many ids there were.

    Raises:
        ValueError: an id does not fit the dtype.
        OSError: it cannot be written.

    """
    magic, (version, dtype) = next((m, f) for m, f in FLAVOURS.items() if f[1] == np.dtype(dtype))
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    count = 0
    with write_whole(Path(path)) as file:
        file.write(header.tobytes())
        for ids in [tokens] if isinstance(tokens, np.ndarray) else map(np.atleast_1d, tokens):
            if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(dtype).max):
                raise ValueError(f"token ids must be in 0..{np.iinfo(dtype).max} for {dtype}, not {ids.min()}..{ids.max()}")
            file.write(ids.astype(dtype).tobytes())
            count += ids.size
        header[:3] = magic, version, count
        file.seek(0)
        file.write(header.tobytes())
    return count
