import numpy as np
import pytest

from gptjax import datasets, tokenizers
from gptjax.datasets import prepare
from gptjax.errors import DataError, FormatError
from gptjax.formats.token_shards import write_shard

topics = pytest.importorskip("pydoc_data.topics").topics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def pydoc(root):
    return datasets.find_corpus("pydoc", root)


def text_of(corpus, shards):
    return corpus.tokenizer.decode(np.concatenate([s.tokens for s in shards]).tolist())


def test_pydoc_holds_out_every_tenth_topic(pydoc):
    names = sorted(topics)
    held_out = text_of(pydoc, pydoc.val).split(tokenizers.END_OF_TEXT)[1:]
    assert held_out == [topics[name] for name in names[::10]]
    assert text_of(pydoc, pydoc.train).count(tokenizers.END_OF_TEXT) == len(names) - len(held_out)


def test_pydocs_vocabulary_is_known_without_it(pydoc):
    assert datasets.vocabulary_without_corpus("pydoc", None)[0] == pydoc.tokenizer.vocab_size
    assert datasets.vocabulary_without_corpus("pydoc", "byte")[0] == 257


def test_pydoc_trains_on_no_paragraph_that_it_validates_on(pydoc):
    texts = (
        text_of(pydoc, shards).replace(tokenizers.END_OF_TEXT, "\n\n")
        for shards in (pydoc.train, pydoc.val)
    )
    train, val = ({paragraph.strip() for paragraph in text.split("\n\n")} for text in texts)
    assert train & val <= {""}
    assert len(train) > 5 * len(val)


def test_pydoc_is_prepared_once_under_its_texts_hash(pydoc, root):
    import hashlib

    digest = hashlib.sha256("\0".join(topics[name] for name in sorted(topics)).encode()).hexdigest()
    assert digest[:12] in pydoc.folder.name
    before = {p: p.stat().st_mtime_ns for p in pydoc.folder.iterdir()}
    again = datasets.find_corpus("pydoc", root)
    assert again.sha256 == pydoc.sha256
    assert {p: p.stat().st_mtime_ns for p in pydoc.folder.iterdir()} == before
    assert [p.name for p in root.iterdir()] == [pydoc.folder.name]


def test_making_a_corpus_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, *rest):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare, "write_shard", fail)
    with pytest.raises(OSError, match="No space left"):
        datasets.find_corpus("pydoc", tmp_path)
    assert not list(tmp_path.iterdir())


def test_python_without_the_text(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="name your own text with --data.dataset"):
        datasets.find_corpus("pydoc", tmp_path)


def test_a_folder_of_shards(tmp_path):
    for name in ("train_000.bin", "train_001.bin", "fineweb_val_000.bin", "notes.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    tokenizers.train_bpe(["aa bb"] * 9, 258, "x").save(tmp_path / "tokenizer.json")
    corpus = datasets.find_corpus(str(tmp_path), "unused")
    assert [s.path.name for s in corpus.train] == ["train_000.bin", "train_001.bin"]
    assert [s.path.name for s in corpus.val] == ["fineweb_val_000.bin"]
    assert corpus.tokenizer.vocab_size == 258
    write_shard(tmp_path / "train_001.bin", [1, 2, 4])
    assert datasets.find_corpus(str(tmp_path), "unused").sha256 != corpus.sha256


def test_shards_without_a_tokenizer_are_gpt2s_or_go_without(tmp_path, monkeypatch):
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, [1, 2, 3])

    def unavailable():
        raise DataError("offline")

    monkeypatch.setattr(tokenizers, "gpt2", unavailable)
    assert datasets.find_corpus(str(tmp_path), "unused").tokenizer is None
    monkeypatch.setattr(tokenizers, "gpt2", lambda: "the real one")
    assert datasets.find_corpus(str(tmp_path), "unused").tokenizer == "the real one"


def test_nanogpts_folder_of_another_vocabulary(tmp_path, monkeypatch):
    """Its ``meta.pkl`` says that GPT-2 did not make these ids, and is not opened: it is no pickle
    here.
    """
    monkeypatch.setattr(tokenizers, "gpt2", lambda: "the real one")
    for name in ("train.bin", "val.bin"):
        np.arange(65, dtype="<u2").tofile(tmp_path / name)
    assert datasets.find_corpus(str(tmp_path), "unused").tokenizer == "the real one"
    (tmp_path / "meta.pkl").write_text("not a pickle")
    corpus = datasets.find_corpus(str(tmp_path), "unused")
    assert corpus.tokenizer is None
    assert {shard.kind for shard in corpus.train + corpus.val} == {"nanogpt"}
    tokenizers.Characters("ab").save(tmp_path / "tokenizer.json")
    assert datasets.find_corpus(str(tmp_path), "unused").tokenizer == tokenizers.Characters("ab")


def test_missing_corpora(tmp_path):
    with pytest.raises(
        DataError,
        match="is neither a file or folder nor one of pydoc, .*: did you mean tinystories?",
    ):
        datasets.find_corpus("tinystory", tmp_path)
    with pytest.raises(DataError, match="has no text: name a file, folder or pattern"):
        datasets.find_corpus(str(tmp_path), tmp_path)
    write_shard(tmp_path / "val.bin", [1])
    with pytest.raises(DataError, match=r"has no train\*.bin"):
        datasets.find_corpus(str(tmp_path), tmp_path)
    (tmp_path / "val.bin").unlink()
    write_shard(tmp_path / "train.bin", [1])
    with pytest.raises(DataError, match=r"has no val\*.bin"):
        datasets.find_corpus(str(tmp_path), tmp_path)
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="val.bin is not a token shard"):
        datasets.find_corpus(str(tmp_path), tmp_path)
