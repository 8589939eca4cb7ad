"""llama2.c's ``tokenizer.bin``, laid out here by hand."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import FormatError
from gptjax.formats.llama2c_tokenizer import read_tokenizer, write_tokenizer
from tests.formats.test_hostile import damage

CONTROLS = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
TOKENS = [*CONTROLS, *(f"<0x{b:02X}>".encode() for b in range(256)), b" ", b"a", b" a", b"aa"]
SCORES = [*[0.0] * 259, -3.0, -2.0, -0.5, -1.0]
WHOLE = struct.pack("<I", 6) + b"".join(
    struct.pack("<fI", score, len(token)) + token
    for score, token in zip(SCORES, TOKENS, strict=True)
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.bin"


def test_it_is_written_as_llama2_c_does(path):
    write_tokenizer(path, TOKENS, SCORES)
    assert path.read_bytes() == WHOLE


def test_it_is_read(path):
    path.write_bytes(WHOLE)
    assert read_tokenizer(path) == (TOKENS, SCORES)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:3], "truncated: 3 bytes, but its header alone takes 4"),
        (lambda b: b[:4], "0 tokens"),
        (lambda b: b[:-1], "token 262 has the score -1 and 2 bytes"),
        (lambda b: b + b"\0", "truncated: token 263 is cut"),
        (lambda b: b[:3000], "truncated"),
        (lambda b: bytes(4) + b[4:], "announces tokens of up to 0 bytes"),
        (lambda b: b"\xff" * 4 + b[4:], "announces tokens of up to 4294967295 bytes"),
        (lambda b: b"\x05" + b[1:], "token 2 has the score 0 and 6 bytes"),
        (lambda b: b"\x07" + b[1:], "text of at most 7 bytes"),
        (lambda b: b[:4] + struct.pack("<f", float("nan")) + b[8:], "token 0 has the score nan"),
        (lambda b: b[:8] + bytes(4) + b[12:], "token 0 has the score 0 and 0 bytes"),
        (lambda b: b[:8] + b"\xff" * 4 + b[12:], "token 0 has the score 0 and 4294967295 bytes"),
        (lambda b: b.replace(b"<0x41>", b"<0x4Z>"), "the bytes <0x00> to <0xFF>"),
    ],
)
def test_damaged_files_are_named(path, damage, message):
    path.write_bytes(damage(WHOLE))
    with pytest.raises(FormatError, match=message) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_size_that_no_vocabulary_has_is_refused_before_it_is_read(path):
    path.write_bytes(WHOLE)
    with path.open("r+b") as file:
        file.truncate(2**35)  # a hole: it takes no room
    with pytest.raises(FormatError, match="and has 34359738368"):
        read_tokenizer(path)


@settings(max_examples=60)
@given(content=damage(WHOLE) | st.binary(max_size=99))
def test_a_damaged_file_is_read_as_it_stands_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "t.bin"
    path.write_bytes(content)
    with contextlib.suppress(FormatError):
        tokens, scores = read_tokenizer(path)
        write_tokenizer(path, tokens, scores)
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["tok512.bin", "tokenizer.bin"])
def test_real_files_there_and_back(name, shared, path):
    tokens, scores = read_tokenizer(shared / "llama2c" / name)
    assert len(tokens) == {"tok512.bin": 512, "tokenizer.bin": 32000}[name]
    write_tokenizer(path, tokens, scores)
    assert path.read_bytes() == (shared / "llama2c" / name).read_bytes()
