"""Token shards: files of token ids, memory-mapped, never loaded whole.

Four kinds can be read, the first two also written:

- ``llm.c`` (and modded-nanogpt): a header of 256 little-endian int32, ``[20240520, 1, number of
  tokens, 0...]``, then the ids as uint16: exactly ``1024 + 2 n`` bytes;
- ``llama3``, llm.c's format for Llama 3: ``[20240801, 7, number of tokens, 0...]``, then uint32:
  ``1024 + 4 n`` bytes;
- ``nanogpt``: no header, uint16;
- ``int32``, from older llm.c: no header, int32.

Files without a header are distinguished by their values: a file is ``int32`` if its size is a
multiple of 4 and the upper half of each sampled number (`LOOKED_AT` at the start, middle and end)
is zero; read as ``nanogpt``, every other id would be 0. An upper half with all bits set is a
negative id, which no tokenizer produces: such a file is refused.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.errors import DataError, FormatError
from gptjax.files import open_file, write_whole
from gptjax.formats.binary import HEADER_BYTES, check_size, read_header
from gptjax.formats.recognise import recognise


class Flavour(NamedTuple):
    """A kind of shard with a header."""

    kind: str
    version: int
    dtype: np.dtype


# By magic
FLAVOURS = {
    20240520: Flavour("llm.c", 1, np.dtype("<u2")),
    20240801: Flavour("llama3", 7, np.dtype("<u4")),
}
# Magic numbers of llm.c are dates
DATES = range(20240101, 20300101)
LOOKED_AT = 1 << 16  # numbers to sample at each of three places
MOST = np.iinfo(np.int32).max  # ids in a shard, because the header's count is an int32


class Shard(NamedTuple):
    """One opened shard."""

    path: Path
    tokens: np.ndarray
    """(n,) ids, memory-mapped: uint16 or uint32. int32 files are mapped as uint32, so
    that a negative id is too large, not an index from the end."""
    kind: str = "llm.c"
    """llm.c, llama3, nanogpt or int32."""


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Validate and map one shard.

    Raises:
        FormatError: missing, unreadable, empty or not a shard: wrong version or size, or negative
            ids.

    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(HEADER_BYTES)
    except OSError as error:
        raise FormatError(
            f"token shard {path} cannot be read: {error.strerror or error}"
        ) from error
    magic = int.from_bytes(start[:4], "little")
    if magic not in FLAVOURS:
        if found := recognise(path):
            raise FormatError(f"{path} is {found}, not a token shard")
        # Text never has 500 zero ids in a row
        if magic in DATES or (len(start) == HEADER_BYTES and not any(start[12:])):
            known = " or ".join(map(str, FLAVOURS))
            raise FormatError(
                f"{path} is not a token shard: it has a header that begins {magic} where {known} "
                "is expected"
            )
        return _without_header(path, size)
    (_, version, count, *_), size = read_header(path, "token shard")
    flavour = FLAVOURS[magic]
    if version != flavour.version:
        raise FormatError(
            f"{path} is a token shard of version {version}, where {flavour.version} is expected "
            f"after {magic}"
        )
    if count < 1:
        raise FormatError(f"token shard {path} is malformed: its header announces {count} tokens")
    check_size(
        path, "token shard", size, HEADER_BYTES + flavour.dtype.itemsize * count, f"{count} tokens"
    )
    return Shard(path, np.memmap(path, flavour.dtype, "r", HEADER_BYTES, (count,)), flavour.kind)


def _without_header(path: Path, size: int) -> Shard:
    if size == 0 or size % 2:
        raise FormatError(
            f"{path} is not a token shard: without the number {' or '.join(map(str, FLAVOURS))} "
            "in front it must be uint16 or "
            f"int32 ids, but it has {size} bytes"
        )
    if size % 4 == 0:
        wide = np.memmap(path, "<u4", "r")
        middle = wide.size // 2
        upper = (
            np.concatenate([wide[:LOOKED_AT], wide[middle : middle + LOOKED_AT], wide[-LOOKED_AT:]])
            >> 16
        )
        negative = upper == 0xFFFF
        if not upper.any():
            return Shard(path, wide, "int32")
        if negative.any() and (negative | (upper == 0)).all():
            raise FormatError(
                f"{path} is not a token shard: as int32 it holds negative ids, as uint16 every "
                "other id is 0 or 65535"
            )
    return Shard(path, np.memmap(path, "<u2", "r"), "nanogpt")


def write_shard(
    path: str | os.PathLike[str],
    tokens: np.ndarray | Sequence[int] | Iterable[np.ndarray],
    dtype: npt.DTypeLike = np.uint16,
) -> int:
    """Write ids as one shard, durably and atomically.

    Args:
        path: the file.
        tokens: the ids; or arrays of them, written one at a time.
        dtype: uint16 for ``llm.c``, uint32 for ``llama3``, whose ids may exceed 65535.

    Returns:
        Number of ids written.

    Raises:
        ValueError: an id does not fit the dtype, there are more than `MOST` ids, or the dtype is
            neither uint16 nor uint32.
        DataError: there are no ids; an empty shard could not be read back.
        OSError: it cannot be written.

    """
    found = [(magic, f) for magic, f in FLAVOURS.items() if f.dtype == np.dtype(dtype)]
    if not found:
        raise ValueError(f"token ids can be written as uint16 or uint32, not as {np.dtype(dtype)}")
    magic, flavour = found[0]
    largest = np.iinfo(flavour.dtype).max
    count = 0
    with write_whole(Path(path)) as file:
        file.write(bytes(HEADER_BYTES))
        for ids in _arrays(tokens):
            if ids.size and (ids.min() < 0 or ids.max() > largest):
                raise ValueError(
                    f"token ids must be in 0..{largest} for {flavour.dtype}, not "
                    f"{ids.min()}..{ids.max()}"
                )
            file.write(np.ascontiguousarray(ids, flavour.dtype).data)
            count += ids.size
        if not count:
            raise DataError(f"there are no token ids to write to {path}: give more text")
        if count > MOST:
            raise ValueError(f"a shard holds up to {MOST} token ids, not {count}: {path}")
        file.seek(0)
        file.write(np.array([magic, flavour.version, count], "<i4").tobytes())
    return count


def _arrays(tokens: np.ndarray | Sequence[int] | Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    if isinstance(tokens, np.ndarray):
        return [tokens]
    if isinstance(tokens, Sequence) and all(np.ndim(ids) == 0 for ids in tokens[:1]):
        return [np.asarray(tokens, np.int64)]
    return tokens  # type: ignore[return-value]  # plain ids are handled above
