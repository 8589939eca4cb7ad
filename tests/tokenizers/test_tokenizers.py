import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError, FormatError
from gptjax.formats import llmc_tokenizer

TEXT = ["the cat sat on the mat", "the dog sat on the log", "über die Straße"] * 20
BPE = tokenizers.train_bpe(TEXT, 280, "cats")


@given(st.text())
def test_any_text_round_trips(text):
    assert BPE.decode(BPE.encode(text)) == text
    assert all(0 <= i < BPE.end_of_text for i in BPE.encode(text))


def test_training_merges_what_is_frequent():
    assert BPE.vocab_size == 280
    assert BPE.end_of_text == 279
    assert len(BPE.encode(" the")) == 1
    assert len(BPE.encode(" zebra")) > 3


def test_encoding_equals_the_library_that_trained_it():
    """Tiktoken applies the merges as Hugging Face's tokenizers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=279, initial_alphabet=alphabet, show_progress=False))
    for text in [*TEXT[:3], "the  mat\n\n  sat?! 'll 123 Straßen", "\x00\ufeff"]:
        assert BPE.encode(text) == theirs.encode(text).ids


def test_end_of_text_is_not_text():
    assert BPE.end_of_text not in BPE.encode(tokenizers.END_OF_TEXT)
    assert BPE.decode([BPE.end_of_text]) == tokenizers.END_OF_TEXT


def test_undecodable_ids_become_the_replacement_character():
    ids = BPE.encode("ü")
    assert BPE.decode(ids[:1]) == "\ufffd" or len(ids) == 1
    assert BPE.decode([999_999, *BPE.encode("a")]) == "\ufffda"


def test_saved_and_loaded(tmp_path):
    BPE.save(tmp_path / "t.json")
    again = tokenizers.load(tmp_path / "t.json")
    assert again.encode(TEXT[2]) == BPE.encode(TEXT[2])
    assert (again.vocab_size, again.end_of_text) == (280, 279)


# Characters


@given(st.text(), st.text())
def test_characters_are_numbered_in_the_order_of_their_code_points(vocabulary, text):
    tokenizer = tokenizers.train_characters([vocabulary, text, "x"])
    rank = {c: i for i, c in enumerate(sorted(set(vocabulary + text + "x")))}
    assert tokenizer.encode(text) == [rank[c] for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(rank)
    assert tokenizer.end_of_text is None


def test_a_character_that_the_vocabulary_lacks_is_named():
    tokenizer = tokenizers.train_characters(["hello"])
    for text in ("help", "hexe", "h\x00", "he\U0001f600"):
        with pytest.raises(DataError, match=r"number [123] of the text\) is not in the vocabulary"):
            tokenizer.encode(text)
    assert tokenizer.decode([0, 99, -1]) == "e\ufffd\ufffd"
    with pytest.raises(DataError, match="no text"):
        tokenizers.train_characters([])


def test_characters_saved_and_loaded(tmp_path):
    tokenizer = tokenizers.train_characters(["größer\n\U0001f600"])
    tokenizer.save(tmp_path / "t.json")
    assert tokenizers.load(tmp_path / "t.json") == tokenizer


# Bytes, and finding


@given(st.text())
def test_bytes(text):
    tokenizer = tokenizers.byte()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_found_by_word_file_and_folder(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    assert tokenizers.find("byte").vocab_size == 257
    assert tokenizers.find(str(tmp_path)).vocab_size == tokenizers.find(str(tmp_path / "tokenizer.json")).vocab_size == 280
    with pytest.raises(DataError, match="there is no tokenizer gpt3: gpt2, byte, or a file"):
        tokenizers.find("gpt3")


@pytest.mark.parametrize("last", [0, 258])
def test_llm_cs_file_must_hold_a_byte_level_bpe(tmp_path, last):
    tokens = [*(bytes([b]) for b in range(256)), b"ab", b"cd", b"<|endoftext|>"]
    llmc_tokenizer.write_tokenizer(tmp_path / "t.bin", tokens, last)
    if last == 258:
        assert tokenizers.find(str(tmp_path / "t.bin")).encode("abc") == [256, 99]
    else:
        with pytest.raises(FormatError, match="expected to be the last"):
            tokenizers.find(str(tmp_path / "t.bin"))
    llmc_tokenizer.write_tokenizer(tmp_path / "t.bin", tokens[1:], 257)
    with pytest.raises(FormatError, match="no byte-level BPE"):
        tokenizers.find(str(tmp_path / "t.bin"))


# Files


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"name": "char", "characters": "ba"}',
        '{"name": "char", "characters": ""}',
        '{"name": "char", "characters": 3}',
        "{",
        "[]",
        '{"name": "x"}',
        '{"name": "x", "tokens": [1]}',
        '{"name": "x", "tokens": ["YQ=="]}',
        '{"name":"x","tokens":["?"]}',
    ],
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(FormatError, match="not a gptjax tokenizer file"):
        tokenizers.load(tmp_path / "t.json")


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        tokenizers.load(tmp_path / "none.json")


@pytest.mark.parametrize(("size", "message"), [(256, "at least 257"), (5000, "too short for a vocabulary of 5000")])
def test_impossible_vocabulary_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.train_bpe(TEXT, size, "x")


def test_gpt2(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tokenizers.gpt2.cache_clear()
    gpt2 = tokenizers.gpt2()
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("First Citizen:") == [5962, 22307, 25]
    assert gpt2.encoding._pat_str == tokenizers.GPT2_PATTERN
    gpt2.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {"name": "gpt2"}
    assert tokenizers.load(tmp_path / "t.json") == gpt2


def test_gpt2_offline_says_what_to_do(monkeypatch, tmp_path):
    def refuse(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    tokenizers.gpt2.cache_clear()
    with pytest.raises(DataError, match="set TIKTOKEN_CACHE_DIR"):
        tokenizers.gpt2()
    tokenizers.gpt2.cache_clear()
