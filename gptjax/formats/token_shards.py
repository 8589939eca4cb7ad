"""Token shards: llm.c's ``.bin`` files of token ids (the layout that modded-nanogpt shares).

A header of 256 little-endian int32, ``[20240520, 1, number of tokens, 0...]``, then the ids as uint16: exactly
``1024 + 2 n`` bytes. Files are memory-mapped, never loaded whole.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.errors import FormatError
from gptjax.formats.binary import HEADER_BYTES, check_size, read_header, write_file

MAGIC, VERSION = 20240520, 1


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
    (magic, version, count, *_), size = read_header(path, "token shard")
    if magic != MAGIC or version != VERSION:
        raise FormatError(f"{path} is not a token shard: it begins {magic}, {version} where {MAGIC}, {VERSION} is expected")
    check_size(path, "token shard", size, HEADER_BYTES + 2 * max(count, 1), f"{count} tokens")
    return Shard(path, np.memmap(path, "<u2", "r", HEADER_BYTES, (count,)))


def write_shard(path: str | os.PathLike[str], tokens: Iterable[int] | np.ndarray) -> None:
    """Write ids as one shard, durably: either the whole file appears under its name, or nothing does.

    Raises:
        ValueError: an id does not fit 16 bits.

    """
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"token ids must be in 0..65535 to be written as uint16, not {ids.min()}..{ids.max()}")
    write_file(path, [MAGIC, VERSION, ids.size], [ids.astype("<u2")])
