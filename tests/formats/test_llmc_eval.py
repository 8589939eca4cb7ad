import struct

import pytest

from gptjax.errors import FormatError
from gptjax.formats.llmc_eval import Question, is_questions, read_questions

EXAMPLE = [[7, 8, 9], [1], [2, 3], [4, 5, 6], [7]]  # the context, then the endings


def evaluation_file(examples, label=2, **header):
    """As llm.c's ``write_evalfile`` lays the bytes out, the example's fields in its order."""
    body = b""
    longest = 0
    for index, parts in enumerate(examples):
        numbers = [65535, 0, index, label, 4] + [n for part in parts for n in (len(part), *part)]
        numbers[1] = 2 * len(numbers)
        longest = max(longest, numbers[1])
        body += struct.pack(f"<{len(numbers)}H", *numbers)
    fields = {"magic": 20240522, "version": 1, "count": len(examples), "longest": longest} | header
    return struct.pack("<256i", *fields.values(), *[0] * 252) + body


def words_changed(**changes):
    """The file of `EXAMPLE` twice, uint16 number n of its body set to the value under ``wN``."""
    content = bytearray(evaluation_file([EXAMPLE, EXAMPLE]))
    for name, value in changes.items():
        struct.pack_into("<H", content, 1024 + 2 * int(name[1:]), value)
    return bytes(content)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hellaswag_val.bin"


def test_what_is_read(path):
    path.write_bytes(evaluation_file([EXAMPLE, [[50256], *EXAMPLE[1:]]]))
    assert is_questions(path)
    assert read_questions(path) == [
        Question([7, 8, 9], EXAMPLE[1:], 2),
        Question([50256], EXAMPLE[1:], 2),
    ]


WHOLE = evaluation_file([EXAMPLE, EXAMPLE])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:1000], "is truncated: 1000 bytes, but its header alone takes 1024"),
        (WHOLE[:-2], "example 1 of 2, at byte 1064 of 1102, is not a question with 4 endings"),
        (WHOLE[:-1], "truncated or malformed"),
        (WHOLE[:1024], "2 examples of at most 40 bytes do not fit its 1024 bytes"),
        (WHOLE + b"\0\0", "2 examples of at most 40 bytes do not fit its 1106 bytes"),
        (
            evaluation_file([EXAMPLE], magic=20240520),
            "it begins 20240520, 1 where 20240522, 1 is expected",
        ),
        (evaluation_file([EXAMPLE], version=2), "it begins 20240522, 2"),
        (evaluation_file([EXAMPLE], count=-1), "-1 examples"),
        (
            evaluation_file([EXAMPLE, EXAMPLE], count=1, longest=90),
            "its 1 examples end at byte 1064 of 1104",
        ),
        (
            evaluation_file([[[1] * 9, *EXAMPLE[1:]], [[1], *EXAMPLE[1:]]], longest=48),
            "example 0 of 2",
        ),
        (evaluation_file([EXAMPLE], label=4), "example 0 of 1"),
        (words_changed(w0=1), "example 0 of 2"),  # where an example begins
        (words_changed(w21=2), "example 1 of 2"),  # its size
        (words_changed(w22=0), "example 1 of 2"),  # its index
        (words_changed(w24=3), "example 1 of 2"),  # its number of endings
        (words_changed(w25=0), "example 1 of 2"),  # its context's length
        (words_changed(w25=4), "example 1 of 2"),
        (words_changed(w38=2), "example 1 of 2"),  # the last ending's
        (evaluation_file([[*EXAMPLE[:4], []]], longest=40), "example 0 of 1"),
    ],
)
def test_a_damaged_file_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(FormatError, match="hellaswag_val.bin") as caught:
        read_questions(path)
    assert message in str(caught.value)


def test_other_files(path, tmp_path):
    path.write_bytes(b"text")
    assert not is_questions(path)
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        read_questions(tmp_path / "none.bin")
