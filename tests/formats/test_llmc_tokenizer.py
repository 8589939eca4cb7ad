import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import FormatError
from gptjax.formats.llmc_tokenizer import is_tokenizer, read_tokenizer, write_tokenizer

TOKENS = [b"a", b"bc", b"\x00\xff" * 127, b"<|endoftext|>"]


def test_what_is_written_is_read_back(tmp_path):
    write_tokenizer(tmp_path / "t.bin", TOKENS, 3)
    assert is_tokenizer(tmp_path / "t.bin")
    assert read_tokenizer(tmp_path / "t.bin") == (TOKENS, 3)


def test_bytes_are_llm_cs(tmp_path):
    """256 uint32 of header, then a length and as many bytes for each token."""
    write_tokenizer(tmp_path / "t.bin", [b"a", b"bc"], 1)
    content = (tmp_path / "t.bin").read_bytes()
    assert content[:16] == bytes.fromhex("c8d73401 02000000 02000000 01000000")  # 20240328, 2, 2, 1
    assert content[1024:] == b"\x01a\x02bc"


def test_version_1_has_gpt2s_end_of_text(tmp_path):
    write_tokenizer(tmp_path / "t.bin", [b"x"] * 50257, 7)
    content = bytearray((tmp_path / "t.bin").read_bytes())
    content[4:8], content[12:16] = (1).to_bytes(4, "little"), bytes(4)
    (tmp_path / "t.bin").write_bytes(content)
    assert read_tokenizer(tmp_path / "t.bin")[1] == 50256


@pytest.mark.parametrize("tokens", [[b""], [b"x" * 256]])
def test_tokens_that_do_not_fit(tmp_path, tokens):
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        write_tokenizer(tmp_path / "t.bin", tokens, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:500], "truncated: 500 bytes"),
        (lambda b: b[:-1], "do not end where the file does"),
        (lambda b: b + b"\x01x", "do not end where the file does"),
        (lambda b: b"\0" + b[1:], "is not an llm.c tokenizer"),
        (lambda b: b[:4] + b"\x03" + b[5:], "20240328, 3 where"),
        (lambda b: b[:8] + b"\xff\xff\xff\x7f" + b[12:], "2147483647 tokens with end-of-text 3 do not fit"),
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


@given(st.binary(max_size=300))
def test_arbitrary_bytes_after_the_header_raise_only_the_format_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "t.bin"
    write_tokenizer(path, TOKENS, 3)
    path.write_bytes(path.read_bytes()[:1024] + content)
    with contextlib.suppress(FormatError):
        tokens, _ = read_tokenizer(path)
        assert b"".join(bytes([len(t)]) + t for t in tokens) == content


def test_gpt2_in_llm_cs_file_encodes_as_tiktoken(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tokenizers.gpt2.cache_clear()
    gpt2 = tokenizers.gpt2()
    write_tokenizer(tmp_path / "gpt2_tokenizer.bin", [*gpt2.tokens(), b"<|endoftext|>"], gpt2.end_of_text)
    again = tokenizers.find(str(tmp_path / "gpt2_tokenizer.bin"))
    assert (again.vocab_size, again.end_of_text) == (50257, 50256)
    text = (shared / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    assert again.encode(text) == gpt2.encode(text)
    assert again.decode(again.encode(text)) == text
