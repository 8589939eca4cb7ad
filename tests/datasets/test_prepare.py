import gzip
import json

import numpy as np
import pytest

from gptjax import datasets, tokenizers
from gptjax.datasets import prepare
from gptjax.datasets.prepare import Scan, count, encode, of_split
from gptjax.datasets.text import Piece
from gptjax.errors import DataError
from tests.tokenizers.test_llama2c import TOKENIZER

STORIES = [f"Story {n}: the cat sat on mat {n * n}." for n in range(100)]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    return path


def split_text(corpus):
    return [
        corpus.tokenizer.decode(np.concatenate([shard.tokens for shard in shards]).tolist()).split(
            tokenizers.END_OF_TEXT
        )[1:]
        for shards in (corpus.train, corpus.val)
    ]


# Your own text, from end to end


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_of_many_documents_every_tenth_is_held_out_whole(stories, tmp_path, tokenizer):
    train, val = split_text(datasets.find_corpus(str(stories), tmp_path / "data", tokenizer))
    assert val == STORIES[::10]
    assert train == [story for n, story in enumerate(STORIES) if n % 10]


def test_of_one_document_the_last_tenth_is_held_out(tmp_path):
    """To the character, as nanoGPT cuts: train is text[: int(0.9 n)]."""
    text = "To be, or not to be, that is the question. " * 23
    (tmp_path / "hamlet.txt").write_text(text)
    corpus = datasets.find_corpus(str(tmp_path / "hamlet.txt"), tmp_path / "data", "char")
    train, val = (
        corpus.tokenizer.decode(shards[0].tokens.tolist()) for shards in (corpus.train, corpus.val)
    )
    assert (train, val) == (text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :])
    assert corpus.tokenizer.vocab_size == len(set(text))


def test_made_once_for_a_content_and_tokenizer(stories, tmp_path):
    def make(*rest):
        return datasets.find_corpus(str(stories), tmp_path / "data", *rest).folder

    first = make("byte")
    made = (first / "train_000000.bin").stat().st_mtime_ns
    assert make("byte") == first
    assert (first / "train_000000.bin").stat().st_mtime_ns == made
    assert make("bpe:300") != first
    stories.write_text(json.dumps({"text": "another story"}) * 1)
    assert make("byte") != first
    source = json.loads((first / "source.json").read_text())
    assert (source["documents"], source["files"]) == (100, [str(stories)])


def test_shards_are_cut_at_their_size(stories, tmp_path, monkeypatch):
    whole = datasets.find_corpus(str(stories), tmp_path / "one", "byte")
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    cut = datasets.find_corpus(str(stories), tmp_path / "many", "byte")
    assert [shard.tokens.size for shard in cut.train[:-1]] == [1000] * (len(cut.train) - 1)
    assert len(cut.train) == -(-whole.train[0].tokens.size // 1000) > 2
    np.testing.assert_array_equal(
        np.concatenate([shard.tokens for shard in cut.train]), whole.train[0].tokens
    )


@pytest.mark.parametrize("tokenizer", ["bpe", "bpe:many", "bpe:100000", "nonesuch"])
def test_tokenizers_that_cannot_be(stories, tmp_path, tokenizer):
    with pytest.raises(DataError, match=tokenizer):
        datasets.find_corpus(str(stories), tmp_path / "data", tokenizer)
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("text", ["", "a"])
def test_text_that_is_too_short_to_split(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=r"no text|too short"):
        datasets.find_corpus(str(tmp_path / "a.txt"), tmp_path / "data", "byte")
    assert not list((tmp_path / "data").glob("*"))


def test_an_interruption_leaves_the_text_in_place(stories, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.find_corpus(str(stories), tmp_path / "data", "byte")
    assert not list((tmp_path / "data").iterdir())
    monkeypatch.undo()
    assert datasets.find_corpus(str(stories), tmp_path / "data", "byte").train


# Its parts


def test_a_large_corpus_holds_out_no_more_than_it_needs():
    documents = [Piece(n, "x" * 1000) for n in range(1000)]
    scan = count(documents)
    assert scan == Scan(1000, 1_000_000)
    large = scan._replace(characters=50 * prepare.VAL_CHARACTERS)
    assert [piece.document for piece in of_split(documents, large, "val")] == list(
        range(0, 1000, 50)
    )
    assert len(list(of_split(documents, large, "train"))) == 980


def test_splits_of_pieces_share_out_the_text():
    """A boundary within a piece, and pieces of either side of it."""
    parts = [
        Piece(n // 2, letters) for n, letters in enumerate(["abcd", "efgh", "ijkl", "mnop", "qrst"])
    ]
    train, val = (list(of_split(parts, count(parts), split)) for split in ("train", "val"))
    assert train == [*parts[:-1], Piece(2, "qr")]
    assert val == [Piece(2, "st")]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_ids_come_in_order_whatever_the_number_of_threads(workers):
    tokenizer = tokenizers.find("byte")
    parts = [Piece(n // 3, f"piece {n} ") for n in range(100)]
    found = list(encode(tokenizer, parts, workers))
    assert {a.dtype for a in found} == {np.dtype(np.uint16)}
    whole = [
        p
        for n in range(0, 100, 3)
        for p in (tokenizers.END_OF_TEXT, *(f"piece {m} " for m in range(n, min(n + 3, 100))))
    ]
    assert tokenizer.decode(np.concatenate(found).tolist()) == "".join(whole)


def test_no_more_is_read_ahead_than_the_threads_can_use():
    read = []

    def parts():
        for n in range(1000):
            read.append(n)
            yield Piece(n, "text")

    next(encode(tokenizers.find("byte"), parts(), 2))
    assert len(read) <= 2 * prepare.AHEAD + 2


def test_a_tokenizer_file_is_known_by_its_content(stories, tmp_path):
    """The same name for another vocabulary is another corpus, and another name for the same one is
    not.
    """
    which = tmp_path / "tokenizer.json"
    folders = []
    for size in (260, 262):
        tokenizers.train_bpe(STORIES, size, "cats").save(which)
        corpus = datasets.find_corpus(str(stories), tmp_path / "data", str(which))
        assert corpus.tokenizer.vocab_size == size
        folders.append(corpus.folder)
    assert folders[0] != folders[1]
    which.rename(tmp_path / "other.json")
    assert (
        datasets.find_corpus(str(stories), tmp_path / "data", str(tmp_path / "other.json")).folder
        == folders[1]
    )


def test_the_same_bytes_under_another_name_are_another_text(tmp_path):
    content = gzip.compress(
        b"".join(json.dumps({"text": story}).encode() + b"\n" for story in STORIES), mtime=0
    )
    folders = set()
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        folders.add(datasets.find_corpus(str(tmp_path / name), tmp_path / "data", "byte").folder)
    assert len(folders) == 2


@pytest.mark.parametrize("tokens", [0, -1])
def test_tokens_that_cannot_be(tokens, stories, tmp_path):
    with pytest.raises(DataError, match=f"^tokens must be at least 1, not {tokens}"):
        datasets.find_corpus(str(stories), tmp_path, "byte", tokens=tokens)


def test_begin_of_text_goes_before_each_document_and_a_space_before_its_first_part():
    text = [Piece(0, "ab"), Piece(0, " a"), Piece(1, "c")]
    found = np.concatenate(list(encode(TOKENIZER, text, 2))).tolist()
    whole = [1, *TOKENIZER.encode("ab a"), 1, *TOKENIZER.encode("c")]
    assert found == whole
