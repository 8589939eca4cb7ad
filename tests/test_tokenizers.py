import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError, FormatError

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


@pytest.mark.parametrize(
    "content",
    [
        "",
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
