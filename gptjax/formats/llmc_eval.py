"""llm.c's evaluation files: multiple-choice questions as token ids, such as ``hellaswag_val.bin``.

A header of 256 little-endian int32, ``[20240522, 1, number of examples, bytes of the longest,
0...]``, then only uint16. Each example begins with five numbers: 65535, its size in bytes (with
these five), its index, the index of the right ending, and the number of endings, 4. The context and
each ending follow, each as the number of its tokens and their ids. The ids are GPT-2's.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.errors import FormatError
from gptjax.files import open_file
from gptjax.formats.binary import HEADER_BYTES, read_header

MAGIC, VERSION, KIND = 20240522, 1, "llm.c evaluation file"
START = 65535
ENDINGS = 4
FIXED = 5  # numbers before the context's length
SHORTEST = FIXED + 2 * (1 + ENDINGS)  # numbers of an example whose texts have one token each
LARGEST = 1 << 16  # examples, as their index is a uint16


class Question(NamedTuple):
    """A context, `ENDINGS` possible endings, and the right one's index; each text has at least one
    token id.
    """

    context: list[int]
    endings: list[list[int]]
    label: int
    """0..3."""


def is_questions(path: Path) -> bool:
    """Whether the file begins with the magic number of an llm.c evaluation file."""
    with open_file(path) as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read all examples of a file.

    Raises:
        FormatError: wrong magic or version, or an inconsistent example.

    """
    path = Path(path)
    (magic, version, count, longest, *_), size = read_header(path, KIND)
    if magic != MAGIC or version != VERSION:
        raise FormatError(
            f"{path} is not an {KIND}: it begins {magic}, {version} where {MAGIC}, {VERSION} is "
            "expected"
        )
    body = size - HEADER_BYTES
    if not (
        1 <= count <= LARGEST
        and 0 < longest < LARGEST
        and 2 * SHORTEST * count <= body <= longest * count
    ):
        raise FormatError(
            f"{KIND} {path} is truncated or malformed: {count} examples of at most {longest} "
            f"bytes do not fit its {size} bytes"
        )
    with open_file(path) as file:
        numbers = np.fromfile(file, "<u2", body // 2, offset=HEADER_BYTES).tolist()
    questions: list[Question] = []
    at = 0
    while len(questions) < count:
        question, length = _read_one(numbers, at, len(questions), longest // 2)
        if question is None:
            raise FormatError(
                f"{KIND} {path} is truncated or malformed: example {len(questions)} of {count}, "
                f"at byte {HEADER_BYTES + 2 * at} of {size}, is not a question with {ENDINGS} "
                "endings; write it again"
            )
        questions.append(question)
        at += length
    if 2 * at != body:
        raise FormatError(
            f"{KIND} {path} is malformed: its {count} examples end at byte "
            f"{HEADER_BYTES + 2 * at} of {size}"
        )
    return questions


def _read_one(numbers: list[int], at: int, index: int, longest: int) -> tuple[Question | None, int]:
    """Read the example at ``at``, and its length in numbers; None if it is invalid."""
    fixed = numbers[at : at + FIXED]
    if len(fixed) < FIXED:
        return None, 0
    start, size, found, label, endings = fixed
    if (start, found, endings) != (START, index, ENDINGS) or label >= ENDINGS:
        return None, 0
    if size % 2 or size // 2 > min(longest, len(numbers) - at):
        return None, 0
    parts: list[list[int]] = []
    begin, end = at + FIXED, at + size // 2
    while len(parts) <= ENDINGS and begin < end and numbers[begin] and begin + numbers[begin] < end:
        parts.append(numbers[begin + 1 : begin + 1 + numbers[begin]])
        begin += 1 + numbers[begin]
    if len(parts) != 1 + ENDINGS or begin != end:
        return None, 0
    return Question(parts[0], parts[1:], label), size // 2
