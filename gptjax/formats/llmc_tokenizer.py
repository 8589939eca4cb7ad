"""llm.c's ``gpt2_tokenizer.bin``: the bytes of each token.

A header of 256 little-endian uint32, ``[20240328, version, number of tokens, end-of-text id,
0...]`` (version 1 does not hold the end-of-text id, which is 50256), then for each token its
length, at least 1, in one byte, and that many bytes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import FormatError
from gptjax.files import open_file, read_small
from gptjax.formats.binary import HEADER_BYTES, read_header, write_file

MAGIC, KIND = 20240328, "llm.c tokenizer"
GPT2_END_OF_TEXT = 50256
LONGEST = 255  # bytes of a token
LARGEST = 1 << 20  # tokens: beyond any vocabulary


def is_tokenizer(path: Path) -> bool:
    """Whether the file begins with the magic number of an llm.c tokenizer."""
    with open_file(path) as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[list[bytes], int]:
    """Read the bytes of each token, and the end-of-text id.

    Raises:
        FormatError: wrong magic or version, or a token count that differs from the header's.

    """
    path = Path(path)
    (magic, version, count, end_of_text, *_), size = read_header(path, KIND)
    if magic != MAGIC or version not in (1, 2):
        raise FormatError(
            f"{path} is not an {KIND}: it begins {magic}, {version} where {MAGIC}, 1 or 2 is "
            "expected"
        )
    end_of_text = GPT2_END_OF_TEXT if version == 1 else end_of_text
    body = size - HEADER_BYTES
    if not (0 <= end_of_text < count <= LARGEST and 2 * count <= body <= (1 + LONGEST) * count):
        raise FormatError(
            f"{KIND} {path} is malformed: {count} tokens with end-of-text {end_of_text} do not "
            f"fit its {size} bytes"
        )
    content = read_small(path, size)
    tokens: list[bytes] = []
    at = HEADER_BYTES
    while len(tokens) < count and at < len(content) and content[at]:
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    if len(tokens) != count or at != len(content):
        raise FormatError(
            f"{KIND} {path} is truncated or malformed: its {count} tokens, each of 1 to {LONGEST} "
            "bytes, "
            "do not end where the file does"
        )
    return tokens, end_of_text


def write_tokenizer(
    path: str | os.PathLike[str], tokens: Sequence[bytes], end_of_text: int, version: int = 2
) -> None:
    """Write version 1 or 2, durably and atomically.

    Raises:
        ValueError: a token is empty or longer than 255 bytes; the end-of-text id is out of range,
            or not 50256 in version 1; or the version is neither 1 nor 2.
        OSError: it cannot be written.

    """
    if version not in (1, 2):
        raise ValueError(f"version 1 or 2 can be written, not {version}")
    if not 0 <= end_of_text < len(tokens) <= LARGEST or (
        version == 1 and end_of_text != GPT2_END_OF_TEXT
    ):
        raise ValueError(
            f"version {version} cannot hold {len(tokens)} tokens with end-of-text {end_of_text}"
        )
    lengths = [len(token) for token in tokens]
    if not 1 <= min(lengths) <= max(lengths) <= LONGEST:
        raise ValueError(
            f"tokens of 1 to {LONGEST} bytes can be written, not of {min(lengths)} to "
            f"{max(lengths)}"
        )
    body = b"".join(bytes([len(token)]) + token for token in tokens)
    header = [MAGIC, version, len(tokens), *([end_of_text] if version == 2 else [])]
    write_file(path, header, [np.frombuffer(body, np.uint8)])
