"""llama2.c's ``tokenizer.bin``: the text and the score of each token.

The longest token's length as uint32, then for each token a float32 score, a uint32 length of at
least 1, and that many bytes. The tokens go on to the end of the file, which does not hold their
number. Ids 0, 1 and 2 are the unknown token, the beginning and the end of a text; then come the 256
bytes, written as in ``<0x41>``.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import FormatError
from gptjax.files import read_small
from gptjax.formats.binary import read_start, write_arrays

KIND = "llama2.c tokenizer"
ENTRY = struct.Struct("<fI")
LONGEST = 1 << 12  # bytes of a token
LARGEST_FILE = 1 << 26  # bytes
UNKNOWN, BEGIN, END, FIRST_BYTE, FIRST_TEXT = 0, 1, 2, 3, 259
BYTES = tuple(f"<0x{byte:02X}>".encode() for byte in range(256))


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[list[bytes], list[float]]:
    """Read the bytes of each token as they are in the file, and its score.

    Raises:
        FormatError: a token is truncated, empty or longer than the header says, a score is not
            finite, or tokens 3 to 258 are not the 256 bytes.

    """
    path = Path(path)
    start, size = read_start(path, KIND, 4)
    longest = int.from_bytes(start, "little")
    if not 1 <= longest <= LONGEST or size > LARGEST_FILE:
        raise FormatError(
            f"{path} is not a {KIND}: it announces tokens of up to {longest} bytes and has {size}, "
            f"where at most {LONGEST} and {LARGEST_FILE} are expected"
        )
    content = read_small(path, LARGEST_FILE)
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    while at < len(content):
        if at + ENTRY.size > len(content):
            raise FormatError(f"{KIND} {path} is truncated: token {len(tokens)} is cut")
        score, length = ENTRY.unpack_from(content, at)
        at += ENTRY.size + length
        if not (np.isfinite(score) and 1 <= length <= longest and at <= len(content)):
            raise FormatError(
                f"{KIND} {path} is truncated or malformed: token {len(tokens)} has the score "
                f"{score:g} and {length} bytes, where the longest has {longest} and "
                f"{len(content) - at + length} are left"
            )
        tokens.append(content[at - length : at])
        scores.append(score)
    if tuple(tokens[FIRST_BYTE:FIRST_TEXT]) != BYTES or max(map(len, tokens)) != longest:
        raise FormatError(
            f"{path} is not a {KIND}: its {len(tokens)} tokens are not the unknown one, two "
            f"controls, the bytes <0x00> to <0xFF> and text of at most {longest} bytes"
        )
    return tokens, scores


def write_tokenizer(
    path: str | os.PathLike[str], tokens: Sequence[bytes], scores: Sequence[float]
) -> None:
    """Write it, durably and atomically.

    Args:
        path: the file.
        tokens: as `read_tokenizer` gives them.
        scores: one for each.

    Raises:
        OSError: it cannot be written.

    """
    body = b"".join(
        ENTRY.pack(score, len(token)) + token for token, score in zip(tokens, scores, strict=True)
    )
    header = struct.pack("<I", max(map(len, tokens)))
    write_arrays(path, header, [np.frombuffer(body, np.uint8)])
