"""The named corpora, made from a server on this machine: no test goes further."""

import hashlib
import json

import numpy as np
import pytest

from gptjax import datasets, tokenizers
from gptjax.datasets import download, named
from gptjax.errors import DataError, FormatError
from gptjax.formats.token_shards import write_shard
from tests.server import serving

arrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

SPEECHES = [f"Speaker {n}:\nWords, words, words {n * n}." for n in range(5000)]
PLAY = "\n\n".join(SPEECHES) + "\n"


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with serving() as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setattr(named, "TINYSHAKESPEARE_URL", f"{site.url}/input.txt")
        monkeypatch.setattr(
            named, "TINYSHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest()
        )
        site.files["input.txt"] = PLAY.encode()
        yield site


def ids(shards):
    return np.concatenate([shard.tokens for shard in shards])


def test_tinyshakespeare_equals_llm_cs_files_byte_for_byte(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tokenizers.gpt2.cache_clear()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tinyshakespeare.txt").symlink_to(
        shared / "tinyshakespeare" / "input.txt"
    )
    corpus = datasets.find_corpus("tinyshakespeare", tmp_path)
    for (shard,), count in ((corpus.train, 305_260), (corpus.val, 32_768)):
        assert shard.tokens.size == count
        assert (
            shard.path.read_bytes() == (shared / "tinyshakespeare" / shard.path.name).read_bytes()
        )


def test_tinyshakespeare_has_a_document_a_speech(site, tmp_path):
    corpus = datasets.find_corpus("tinyshakespeare", tmp_path, "byte")
    assert corpus.val[0].tokens.size == named.TINYSHAKESPEARE_VAL_TOKENS
    text = corpus.tokenizer.decode(np.concatenate([ids(corpus.val), ids(corpus.train)]).tolist())
    assert text == tokenizers.END_OF_TEXT + PLAY.replace("\n\n", f"\n\n{tokenizers.END_OF_TEXT}")
    site.files.clear()
    # Offline, once it is made
    assert datasets.find_corpus("tinyshakespeare", tmp_path, "byte").sha256 == corpus.sha256


def test_shakespeare_char_is_cut_as_nanogpt_cuts_it(site, tmp_path):
    corpus = datasets.find_corpus("shakespeare-char", tmp_path)
    rank = {c: i for i, c in enumerate(sorted(set(PLAY)))}
    everything = [rank[c] for c in PLAY]
    n = int(0.9 * len(PLAY))
    assert ids(corpus.train).tolist() == everything[:n]
    assert ids(corpus.val).tolist() == everything[n:]
    (tmp_path / "downloads" / "tinyshakespeare.txt").unlink()
    site.files.clear()
    # Offline, once it is there
    assert datasets.find_corpus("shakespeare-char", tmp_path).folder == corpus.folder


def test_a_changed_source_is_refused(site, tmp_path):
    site.files["input.txt"] = PLAY.encode()[:-1]
    with pytest.raises(DataError, match="has the SHA-256"):
        datasets.find_corpus("shakespeare-char", tmp_path)


@pytest.fixture
def stories(site):
    """TinyStories' two files, with blanks around the stories."""
    stories = {"train": [f"Tom has {n} cats." for n in range(500)], "valid": ["Ann has a dog."]}
    for split, texts in stories.items():
        content = "".join(f"\n  {text} \n<|endoftext|>\n" for text in texts) + " \n"
        site.files[
            f"datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{split}.txt"
        ] = content.encode()
    return stories


def test_tinystories_keeps_its_own_split(stories, tmp_path):
    corpus = datasets.find_corpus("tinystories", tmp_path, "bpe:300")
    assert corpus.tokenizer.vocab_size == 300
    found = [
        corpus.tokenizer.decode(ids(s).tolist()).split(tokenizers.END_OF_TEXT)[1:]
        for s in (corpus.train, corpus.val)
    ]
    assert found == list(stories.values())
    some = datasets.find_corpus("tinystories", tmp_path, "byte", tokens=1000)
    assert (
        ids(some.train).tolist()
        == ids(datasets.find_corpus("tinystories", tmp_path, "byte").train)[:1000].tolist()
    )


def test_stories_are_cut_as_llama2_c_cuts_them(stories, tmp_path, shared):
    """Each story stripped, BOS (1) before it, and no EOS (2)."""
    tok512 = tokenizers.find(shared / "llama2c" / "tok512.bin")
    corpus = datasets.find_corpus("tinystories", tmp_path, tok512)
    for split, texts in zip((corpus.train, corpus.val), stories.values(), strict=True):
        expected = [i for text in texts for i in (1, *tok512.encode(text))]
        assert ids(split).tolist() == expected
        assert 2 not in expected


@pytest.mark.parametrize(
    ("name", "repo"),
    [("fineweb", "kjj0/fineweb10B-gpt2"), ("fineweb-edu", "kjj0/finewebedu10B-gpt2")],
)
def test_fineweb_fetches_as_many_shards_as_are_wanted(site, tmp_path, name, repo):
    stem = name.replace("-", "")
    for split, number in (("val", 0), ("train", 1), ("train", 2), ("train", 3)):
        file = f"{stem}_{split}_{number:06d}.bin"
        write_shard(tmp_path / file, np.arange(1000) + number)
        site.files[f"datasets/{repo}/resolve/main/{file}"] = (tmp_path / file).read_bytes()
    root = tmp_path / "data"
    assert len(datasets.find_corpus(name, root, tokens=1000).train) == 1
    asked = len(site.requests)
    assert len(datasets.find_corpus(name, root, tokens=2500).train) == 3
    assert len(site.requests) == asked + 2  # only what was missing
    assert len(datasets.find_corpus(name, root, tokens=1001).train) == 2
    assert len(site.requests) == asked + 2
    with pytest.raises(DataError, match="status 404"):
        datasets.find_corpus(name, root)  # all of it, where the server has three
    with pytest.raises(DataError, match="is already tokenized"):
        datasets.find_corpus(name, root, "byte")


def test_openwebtext_is_tokenized_part_by_part(site, tmp_path, monkeypatch):
    """Interrupted and gone on with, each part is fetched once, and its file removed once it is
    tokenized.
    """
    monkeypatch.setattr(named, "OPENWEBTEXT_VAL_EVERY", 10)
    texts = [[f"part {part}, page {n}" for n in range(30)] for part in range(3)]
    for part, pages in enumerate(texts):
        parquet.write_table(arrow.table({"text": pages}), tmp_path / "a.parquet")
        site.files[f"part{part}"] = (tmp_path / "a.parquet").read_bytes()
    listing = json.dumps([f"{site.url}/part{part}" for part in range(3)])
    site.files["api/datasets/Skylion007/openwebtext/parquet/plain_text/train"] = listing.encode()
    missing = site.files.pop("part1")
    with pytest.raises(DataError, match="status 404"):
        datasets.find_corpus("openwebtext", tmp_path / "data", "byte")
    site.files["part1"] = missing
    corpus = datasets.find_corpus("openwebtext", tmp_path / "data", "byte")
    train, val = (
        corpus.tokenizer.decode(ids(s).tolist()).split(tokenizers.END_OF_TEXT)[1:]
        for s in (corpus.train, corpus.val)
    )
    assert train == [page for pages in texts for n, page in enumerate(pages) if n % 10]
    assert val == [page for pages in texts for n, page in enumerate(pages) if n % 10 == 0]
    assert [path for path, _ in site.requests].count("/part0") == 1
    assert not list(corpus.folder.glob("*.parquet"))
    site.files.clear()
    datasets.find_corpus("openwebtext", tmp_path / "data", "byte")  # offline, once it is there
    assert len(datasets.find_corpus("openwebtext", tmp_path / "data", "byte", tokens=1).train) == 1


@pytest.mark.parametrize(
    "name", ["tinyshakespeare", "shakespeare-char", "tinystories", "openwebtext", "fineweb"]
)
def test_offline_the_way_out_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(named, "TINYSHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(DataError, match=r"go online and try again") as caught:
        datasets.find_corpus(name, tmp_path, None if name == "fineweb" else "byte")
    assert "\n" not in str(caught.value)


def test_shards_of_the_hub_are_checked(site, tmp_path):
    site.files["datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin"] = b"not a shard"
    with pytest.raises(FormatError, match="is not a token shard"):
        datasets.find_corpus("fineweb", tmp_path, tokens=10)


@pytest.mark.parametrize("listing", [b"[]", b'{"error": "gone"}', b"[1]", b"[[", b"<html>"])
def test_a_list_of_parts_that_is_none(site, tmp_path, listing):
    site.files["api/datasets/Skylion007/openwebtext/parquet/plain_text/train"] = listing
    with pytest.raises(
        DataError,
        match="parts.json should list the addresses of Parquet files.*remove it and try again",
    ):
        datasets.find_corpus("openwebtext", tmp_path, "byte")
