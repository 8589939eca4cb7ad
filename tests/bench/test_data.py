import ctypes
import mmap
import os
import sys

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.bench import data
from gptjax.datasets.batches import BatchShape
from gptjax.formats.token_shards import open_shard, write_shard


def test_every_way_makes_the_same_tokens(tmp_path, monkeypatch):
    """What is timed is the same work: the counts behind the rates agree."""
    counts = {}
    monkeypatch.setattr(
        data,
        "_interleaved",
        lambda ways, rounds: counts.update({name: run() for name, run in ways.items()}),
    )
    monkeypatch.setattr(data, "BATCHES", 3)
    tokenizer = tokenizers.byte()
    write_shard(
        tmp_path / "train.bin", np.frombuffer(b"It was the best of times. " * 500, np.uint8)
    )
    shards = [open_shard(tmp_path / "train.bin")]
    data.tokenizing(tokenizer, shards, 1)
    data.loading(shards, BatchShape(1, 2, 8), "shuffle", 257, 1)
    # The document's end-of-text
    assert counts.pop("ours") == counts["in one go"] + 1 == counts.pop("tiktoken alone") + 1
    assert counts == {"in one go": 13_000, "cold": 48, "warm": 48, "random crops": 48}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it caches")
def test_a_cold_cache_is_cold(tmp_path):
    """No page of the file is in memory, also where it is mapped and was read."""
    write_shard(tmp_path / "train.bin", np.arange(60_000))
    shard = open_shard(tmp_path / "train.bin")
    assert shard.tokens.sum() > 0
    assert cached_pages(tmp_path / "train.bin") > 0
    data.drop_page_cache(shard)
    left = cached_pages(tmp_path / "train.bin")
    if left and os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("a file system in memory keeps its files there")
    assert left == 0


def cached_pages(path):
    """By mincore(2), of a map that no page was read through."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        )
        return sum(page & 1 for page in pages)
