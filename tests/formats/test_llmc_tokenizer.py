import contextlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import FormatError
from gptjax.formats.llmc_tokenizer import is_tokenizer, read_tokenizer, write_tokenizer
from tests.mutations import mutated

TOKENS = [b"a", b"bc", b"\x00\xff" * 127, b"<|endoftext|>"]


@given(st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=40), st.data())
def test_what_is_written_is_read_back(tmp_path_factory, tokens, data):
    path = tmp_path_factory.mktemp("written") / "t.bin"
    end_of_text = data.draw(st.integers(0, len(tokens) - 1))
    write_tokenizer(path, tokens, end_of_text)
    assert is_tokenizer(path)
    assert read_tokenizer(path) == (tokens, end_of_text)


def test_bytes_are_llm_cs(tmp_path):
    """256 uint32 of header, then a length and as many bytes for each token."""
    write_tokenizer(tmp_path / "t.bin", [b"a", b"bc"], 1)
    content = (tmp_path / "t.bin").read_bytes()
    assert content[:16] == bytes.fromhex("c8d73401 02000000 02000000 01000000")  # 20240328, 2, 2, 1
    assert content[16:1024] == bytes(1008)
    assert content[1024:] == b"\x01a\x02bc"


def test_version_1_has_gpt2s_end_of_text_and_does_not_say_so(tmp_path):
    tokens = [b"x"] * 50257
    write_tokenizer(tmp_path / "t.bin", tokens, 50256, version=1)
    assert (tmp_path / "t.bin").read_bytes()[:16] == bytes.fromhex(
        "c8d73401 01000000 51c40000 00000000"
    )
    assert read_tokenizer(tmp_path / "t.bin") == (tokens, 50256)


@pytest.mark.parametrize(
    ("tokens", "end_of_text", "version", "message"),
    [
        ([b""], 0, 2, "1 to 255 bytes can be written, not of 0 to 0"),
        ([b"x" * 256], 0, 2, "1 to 255 bytes can be written, not of 256 to 256"),
        ([b"x"], 1, 2, "version 2 cannot hold 1 tokens with end-of-text 1"),
        ([], 0, 2, "version 2 cannot hold 0 tokens"),
        ([b"x"], 0, 1, "version 1 cannot hold 1 tokens with end-of-text 0"),
        ([b"x"], 0, 3, "version 1 or 2 can be written, not 3"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path, tokens, end_of_text, version, message):
    with pytest.raises(ValueError, match=message):
        write_tokenizer(tmp_path / "t.bin", tokens, end_of_text, version)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:500], "truncated: 500 bytes"),
        (lambda b: b[:-1], "do not end where the file does"),
        (lambda b: b + b"\x01x", "do not end where the file does"),
        (lambda b: b.replace(b"\x01a\x02bc", b"\x00\x03abc"), "do not end where the file does"),
        (lambda b: b"\0" + b[1:], "is not an llm.c tokenizer"),
        (lambda b: b[:4] + b"\x03" + b[5:], "20240328, 3 where"),
        (lambda b: b[:4] + b"\x01" + b[5:], "4 tokens with end-of-text 50256 do not fit"),
        (
            lambda b: b[:8] + b"\xff\xff\xff\x7f" + b[12:],
            "2147483647 tokens with end-of-text 3 do not fit",
        ),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "-1 tokens"),
        (lambda b: b[:12] + b"\x04" + b[13:], "4 tokens with end-of-text 4 do not fit"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    path = tmp_path / "t.bin"
    write_tokenizer(path, TOKENS, 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)


def test_an_impossible_vocabulary_size_is_refused_unread(tmp_path):
    write_tokenizer(tmp_path / "t.bin", TOKENS, 3)
    with (tmp_path / "t.bin").open("r+b") as file:
        file.seek(8)
        file.write((2**30).to_bytes(4, "little"))
        file.truncate(2**35)  # a hole: it takes no room, and would hold so many tokens
    with pytest.raises(FormatError, match="1073741824 tokens with end-of-text 3 do not fit"):
        read_tokenizer(tmp_path / "t.bin")


@settings(max_examples=60)
@given(data=st.data())
def test_a_mutated_file_loads_as_it_stands_or_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "t.bin"
    write_tokenizer(path, TOKENS, 3)
    content = data.draw(mutated(path.read_bytes()))
    path.write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(FormatError):
        tokens, end_of_text = read_tokenizer(path)
        assert b"".join(bytes([len(t)]) + t for t in tokens) == content[1024:]
        assert end_of_text < len(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_gpt2_in_llm_cs_file_encodes_as_tiktoken(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tokenizers.gpt2.cache_clear()
    gpt2 = tokenizers.gpt2()
    path = tmp_path / "gpt2_tokenizer.bin"
    write_tokenizer(path, gpt2.pieces, gpt2.end_of_text)
    assert path.stat().st_size == 1024 + 50257 + sum(map(len, gpt2.pieces))
    again = tokenizers.find(path)
    assert (again.vocab_size, again.end_of_text) == (50257, 50256)
    text = (shared / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    assert again.encode(text) == gpt2.encode(text)
    assert again.decode(again.encode(text)) == text
