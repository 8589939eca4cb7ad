"""Tokenizers found and loaded, and files that are none."""

import base64
import contextlib
import dataclasses
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError, FormatError
from gptjax.formats import llmc_tokenizer
from gptjax.tokenizers import tokenizer_json
from tests.mutations import mutated
from tests.tokenizers.test_hugging_face import hugging_face

BPE = tokenizers.train_bpe(["the cat sat on the mat", "the dog sat on the log"] * 20, 265, "cats")
BYTES = [bytes([b]) for b in range(256)]


def test_found_by_word_file_and_folder(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    assert tokenizers.find("byte") == tokenizers.byte()
    for which in (str(tmp_path), tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizers.find(which) == BPE


def test_llm_cs_file_is_found_by_its_magic(tmp_path):
    llmc_tokenizer.write_tokenizer(tmp_path / "any.name", BPE.pieces, BPE.end_of_text)
    found = tokenizers.find(tmp_path / "any.name")
    assert (found.tokens, found.end_of_text) == (BPE.tokens, BPE.end_of_text)
    assert found.encode("the cat") == BPE.encode("the cat")


def test_hugging_faces_file_is_found(tmp_path):
    tokenizer_json.write(tmp_path, BPE)
    for which in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizers.find(which).same_as(BPE)
    (tmp_path / "other.json").write_text(
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    )
    with pytest.raises(FormatError, match="is not a supported BPE"):
        tokenizers.find(tmp_path / "other.json")


@pytest.mark.parametrize("end", [-1, 257, 2**70, "x"])
def test_an_end_of_text_that_no_token_has(tmp_path, end):
    hugging_face(BYTES, []).save(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(content | {"end_of_text": end}))
    with pytest.raises(FormatError, match="not a gptjax tokenizer file"):
        tokenizers.load(tmp_path / "t.json")


def test_gpt2_is_found(monkeypatch):
    monkeypatch.setattr(tokenizers, "gpt2", lambda: "the real one")
    assert tokenizers.find("gpt2") == "the real one"


def test_which_ids_are_gpt2s(monkeypatch):
    """Another vocabulary of as many ids is not; where GPT-2's own cannot be had, their number has
    to do.
    """
    own = dataclasses.replace(
        tokenizers.byte(), tokens=(*tokenizers.byte().tokens, *(b"%06d" % n for n in range(50_000)))
    )
    assert own.vocab_size == tokenizers.GPT2_IDS
    monkeypatch.setattr(tokenizers, "gpt2", lambda: dataclasses.replace(own, name="gpt2"))
    assert tokenizers.is_gpt2(own)
    assert not tokenizers.is_gpt2(tokenizers.byte())
    monkeypatch.setattr(
        tokenizers, "gpt2", lambda: dataclasses.replace(own, tokens=(*own.tokens[:-1], b"more"))
    )
    assert not tokenizers.is_gpt2(own)

    def not_to_be_had():
        raise DataError("no network")

    monkeypatch.setattr(tokenizers, "gpt2", not_to_be_had)
    assert tokenizers.is_gpt2(own)


@pytest.mark.parametrize("which", ["gpt3", "nowhere/tokenizer.json"])
def test_no_such_tokenizer(which):
    with pytest.raises(
        DataError, match=f"there is no tokenizer {which}: name gpt2, byte, or a file or folder with"
    ):
        tokenizers.find(which)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"there is no tokenizer .*tokenizer\.json"):
        tokenizers.find(tmp_path)


def test_files_from_before_the_kind_was_written(tmp_path, monkeypatch):
    def load(content):
        (tmp_path / "t.json").write_text(json.dumps(content))
        return tokenizers.load(tmp_path / "t.json")

    tokens = [base64.b64encode(token).decode() for token in BPE.tokens]
    assert load({"name": "cats", "tokens": tokens}) == BPE
    assert load({"name": "char", "characters": "ab"}) == tokenizers.Characters("ab")
    monkeypatch.setattr(tokenizers, "gpt2", lambda: "the real one")
    assert load({"name": "gpt2"}) == "the real one"


@pytest.mark.parametrize(
    ("tokens", "end_of_text", "message"),
    [
        ([*BYTES, b"ab", b"<|endoftext|>"], 0, "end-of-text at 0 of 258 tokens"),
        ([*BYTES, b"ab", b"<|end|>"], 257, r"last token is b'<\|end\|>'"),
        ([*BYTES[1:], b"ab", b"<|endoftext|>"], 256, "is not a byte-level BPE"),
        (
            [*BYTES, b"abc", b"<|endoftext|>"],
            257,
            "b'abc', is not the merge of two tokens before it",
        ),
    ],
)
def test_llm_cs_file_must_hold_a_byte_level_bpe(tmp_path, tokens, end_of_text, message):
    llmc_tokenizer.write_tokenizer(tmp_path / "t.bin", tokens, end_of_text)
    with pytest.raises(FormatError, match=message):
        tokenizers.find(tmp_path / "t.bin")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "[" * 100_000,
        '{"name": "x"}',
        '{"name": "x", "tokens": [1]}',
        '{"name": "x", "tokens": ["YQ=="]}',
        '{"name": "x", "tokens": ["?"]}',
        '{"kind": "char", "name": 3, "characters": "ab"}',
        '{"kind": "words", "name": "x"}',
        '{"kind": ["bpe"], "name": "x"}',
        '{"name": "char", "characters": "ba"}',
        '{"name": "char", "characters": ""}',
        '{"name": "char", "characters": 3}',
        '{"name": "char", "characters": ["a", "b"]}',
        r'{"name": "char", "characters": "\ud800"}',
        '{"kind": "hf", "name": "x"}',
        '{"kind": "hf", "name": "x", "tokenizer": 3, "end_of_text": 0}',
        '{"kind": "hf", "name": "x", "tokenizer": {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "end_of_text": 0}',
    ],
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(FormatError, match="not a gptjax tokenizer file .* make one with") as caught:
        tokenizers.load(tmp_path / "t.json")
    assert len(str(caught.value)) < 600


def test_a_file_too_large_to_be_one_is_not_read(tmp_path):
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(FormatError, match="has more than the 268435456 bytes"):
        tokenizers.load(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["none.json", "."])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(FormatError, match="cannot be read"):
        tokenizers.load(tmp_path / name)


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["bpe", "char", "llmc"]))
def test_a_mutated_file_loads_or_is_refused(data, kind, tmp_path_factory):
    """In one sentence that names the file, and within memory of the order of the file's."""
    path = tmp_path_factory.mktemp("fuzz") / "t"
    if kind == "llmc":
        llmc_tokenizer.write_tokenizer(path, BPE.pieces, BPE.end_of_text)
    else:
        (BPE if kind == "bpe" else tokenizers.train_characters(["abc déf\n"])).save(path)
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    tracemalloc.start()
    try:
        tokenizer = refusal = None
        with contextlib.suppress(FormatError):
            tokenizer = tokenizers.find(path)
        if not tokenizer:
            with pytest.raises(FormatError, match=re.escape(str(path))) as refusal:
                tokenizers.find(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000
    if tokenizer:
        assert len(set(tokenizer.pieces)) == tokenizer.vocab_size
        assert kind == "char" or tokenizer.decode(tokenizer.encode("the cat\0é")) == "the cat\0é"
    else:
        assert "\n" not in str(refusal.value)
