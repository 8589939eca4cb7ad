import importlib
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError
from gptjax.tokenizers.bpe import LONGEST_RUN, LONGEST_WORD, BytePairEncoding

TEXT = ["the cat sat on the mat", "the dog sat on the log", "über die Straße"] * 20
BPE = tokenizers.train_bpe(TEXT, 280, "cats")
BYTES = tuple(bytes([b]) for b in range(256))


@pytest.fixture
def gpt2(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tokenizers.gpt2.cache_clear()
    return tokenizers.gpt2()


@pytest.fixture(scope="module")
def theirs():
    """Hugging Face's own tokenizer, trained on the same text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=279, initial_alphabet=alphabet, show_progress=False)
    )
    return trained


def test_training_merges_what_is_frequent():
    assert BPE.vocab_size == 280
    assert BPE.end_of_text == 279
    assert len(BPE.encode(" the")) == 1
    assert len(BPE.encode(" zebra")) > 3


@given(st.text(st.sampled_from("the catsondlg\n  ßü'1") | st.characters()))
def test_encoding_equals_the_library_that_trained_it(theirs, text):
    """Tiktoken applies the merges as Hugging Face's tokenizers does."""
    assert BPE.encode(text) == theirs.encode(text).ids


def test_merges_are_those_that_were_trained(theirs):
    """As Hugging Face's tokenizers lists them in its own file."""
    listed = json.loads(theirs.to_str())["model"]["merges"]
    assert [[tokenizers.printable(part) for part in pair] for pair in BPE.merges()] == [
        list(pair) for pair in listed
    ]
    assert len(listed) == 279 - 256


def test_the_bytes_alone_have_no_merges():
    assert tokenizers.byte().merges() == []
    assert tokenizers.byte().encode("né") == [110, 195, 169]


def test_a_token_that_no_merge_makes_is_named():
    odd = BytePairEncoding("odd", (*BYTES, b"abc"))
    with pytest.raises(DataError, match="token 256 of odd, b'abc', is not the merge of two"):
        odd.merges()


@pytest.mark.parametrize("tokens", [BYTES[1:], (*BYTES, b"ab", b"ab"), (*BYTES, b"")])
def test_vocabularies_that_cannot_be(tokens):
    with pytest.raises(ValueError, match="empty, repeat, or do not cover every byte"):
        BytePairEncoding("x", tokens)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "from 257 to 1048576 ids, not 256"),
        (2**60, "from 257 to"),
        (5000, "too short for a vocabulary of 5000"),
    ],
)
def test_impossible_vocabulary_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.train_bpe(TEXT, size, "x")


def test_training_on_long_words_cuts_them():
    """A run of one character gives merges up to the length at which words are cut."""
    trained = tokenizers.train_bpe(["a" * 300_000 + " cat" * 9], 269, "run")
    assert max(map(len, trained.tokens)) == LONGEST_WORD
    assert trained.encode("a" * LONGEST_WORD) == [trained.tokens.index(b"a" * LONGEST_WORD)]


def test_an_error_of_what_gives_the_text_ends_training():
    def texts():
        yield "the cat"
        raise DataError("no more text")

    with pytest.raises(DataError, match="no more text"):
        tokenizers.train_bpe(texts(), 257, "x")


@pytest.mark.parametrize("blanks", [" ", "\n \t"])
@pytest.mark.parametrize("begin", ["", "the cat" * 12_345])
def test_a_run_of_blanks_that_tiktoken_alone_panics_on(blanks, begin):
    text = begin + blanks * (2_500_000 // len(blanks)) + "sat"
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert ids[-3:] == BPE.encode(text[-1000:])[-3:]


def test_blanks_are_cut_only_where_they_have_to_be():
    """One shorter than the longest run is left to tiktoken whole."""
    text = "\n" * (LONGEST_RUN - 1) + "b" + " " * 3000 + "c"
    assert BPE.encode(text) == BPE.encoding.encode_ordinary(text)


def test_only_the_long_run_is_cut():
    pairs = BytePairEncoding("pairs", (*BYTES, b"  "))
    short, long = [97, 256, 32, 98], [256] * (LONGEST_RUN // 2)
    text = "a   b" + " " * (2 * LONGEST_RUN + 4) + "\nc"
    assert pairs.encode(text) == [*short, *long, *long, 256, 256, 10, 99]


def test_gpt2(gpt2):
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.encode("First Citizen:") == [5962, 22307, 25]
    assert gpt2.decode_bytes([50256, 198, 0]) == b"<|endoftext|>\n!"
    assert tokenizers.gpt2() is gpt2


@given(text=st.text())
def test_gpt2_encodes_as_tiktokens_own(shared, text):
    import os
    from unittest import mock

    import tiktoken

    with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=str(shared / "tiktoken_cache")):
        own = tiktoken.get_encoding("gpt2")
        ids = tokenizers.gpt2().encode(text)
    assert ids == own.encode_ordinary(text)
    assert tokenizers.gpt2().decode(ids) == own.decode(ids) == text


def test_gpt2s_pattern_is_tiktokens(gpt2):
    import tiktoken

    assert tiktoken.get_encoding("gpt2")._pat_str == tokenizers.GPT2_PATTERN


def test_gpt2s_vocabulary_and_merges_are_openais(gpt2, shared):
    """As OpenAI published them, in the two files that tiktoken caches: ``encoder.json`` and
    ``vocab.bpe``.
    """
    files = sorted(
        (path.read_text(encoding="utf-8") for path in (shared / "tiktoken_cache").iterdir()),
        key=len,
    )
    merges, vocabulary = files[0].splitlines()[1:], json.loads(files[1])
    assert [" ".join(map(tokenizers.printable, pair)) for pair in gpt2.merges()] == merges
    ours = {tokenizers.printable(token): rank for rank, token in enumerate(gpt2.tokens)}
    assert ours | {tokenizers.END_OF_TEXT: gpt2.end_of_text} == vocabulary


def test_gpt2_is_saved_whole(gpt2, tmp_path, monkeypatch):
    """A run's folder decodes where tiktoken has neither cache nor network."""
    gpt2.save(tmp_path / "tokenizer.json")
    sent = pickle.dumps(gpt2)
    monkeypatch.setattr(importlib.import_module("tiktoken"), "get_encoding", None)
    assert tokenizers.load(tmp_path / "tokenizer.json") == pickle.loads(sent) == gpt2
    assert tokenizers.load(tmp_path / "tokenizer.json").encode("First Citizen:") == [
        5962,
        22307,
        25,
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host"), ValueError("Hash mismatch")]
)
def test_gpt2_offline_says_what_to_do(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    tokenizers.gpt2.cache_clear()
    with pytest.raises(DataError, match="set TIKTOKEN_CACHE_DIR"):
        tokenizers.gpt2()
    tokenizers.gpt2.cache_clear()
