"""Throughput of tokenizing and batching, compared with how other projects do it."""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gptjax.config import Order
from gptjax.datasets.batches import BatchShape, TrainingBatches
from gptjax.datasets.prepare import encode
from gptjax.datasets.text import Piece
from gptjax.formats.token_shards import Shard
from gptjax.tokenizers import BytePairEncoding, Tokenizer

TEXT_CHARACTERS = 4_000_000
BATCHES = 2000


def tokenizing(tokenizer: Tokenizer, shards: list[Shard], rounds: int) -> dict[str, list[float]]:
    """Measure tokens per second in each round of encoding the corpus.

    ``ours`` prepares a corpus in threads, as this package does; ``tiktoken alone`` encodes pieces
    sequentially in one thread; ``in one go`` encodes all of the text with one call and converts the
    list to an array, as nanoGPT does for a small corpus.
    """
    ids = np.concatenate([shard.tokens[:TEXT_CHARACTERS] for shard in shards])[:TEXT_CHARACTERS]
    text = tokenizer.decode(ids.tolist())[:TEXT_CHARACTERS]
    size = 1 << 18
    pieces = [Piece(0, text[i : i + size]) for i in range(0, len(text), size)]
    ways: dict[str, Callable[[], int]] = {
        "ours": lambda: sum(part.size for part in encode(tokenizer, pieces))
    }
    if isinstance(tokenizer, BytePairEncoding):
        alone = tokenizer.encoding.encode_ordinary
        ways["tiktoken alone"] = lambda: sum(len(alone(piece.text)) for piece in pieces)
        ways["in one go"] = lambda: np.array(alone(text), np.uint16).size
    return _interleaved(ways, rounds)


def loading(
    shards: list[Shard], shape: BatchShape, order: Order, vocab_size: int, rounds: int
) -> dict[str, list[float]]:
    """Measure tokens per second in each round of reading batches from the shards.

    ``cold`` first drops the shards from the system's page cache; ``random crops`` copies each row
    of a batch from a random position in a memory map, as nanoGPT does.
    """
    whole = TrainingBatches(shards, shape, order, 0, vocab_size)

    def ours() -> int:
        return sum(next(whole).inputs.size for _ in range(BATCHES))

    def cold() -> int:
        for shard in shards:
            drop_page_cache(shard)
        batches = TrainingBatches(shards, shape, order, 0, vocab_size)
        return sum(next(batches).inputs.size for _ in range(BATCHES))

    return _interleaved(
        {"cold": cold, "warm": ours, "random crops": lambda: sum(_crops(shards[0], shape))}, rounds
    )


def _crops(shard: Shard, shape: BatchShape) -> Iterator[int]:
    rng = np.random.default_rng(0)
    rows = shape.accumulate * shape.batch_size
    for _ in range(BATCHES):
        starts = rng.integers(0, shard.tokens.size - shape.seq_len - 1, rows)
        inputs, _ = (
            np.stack(
                [
                    shard.tokens[s + shift : s + shift + shape.seq_len].astype(np.int64)
                    for s in starts
                ]
            )
            for shift in (0, 1)
        )
        yield inputs.size


def drop_page_cache(shard: Shard) -> None:
    """Unmap a shard's pages and drop them from the page cache; mapped pages would stay."""
    mapped: Any = shard.tokens
    if hasattr(os, "posix_fadvise"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
        with shard.path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - began))
    return rates
