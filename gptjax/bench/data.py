"""Tokens a second of tokenizing and batching, against the ways that other projects do it."""

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
    """Tokens a second of each round, encoding text of the corpus.

    ``ours`` is how a corpus is prepared, in threads; ``tiktoken alone`` encodes one piece after
    another in one thread; ``in one go`` is nanoGPT's way for a small corpus: all of the text at
    once, and the list made one array.
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
    """Tokens a second of each round, reading batches from the shards.

    ``cold`` first drops the shards from the system's page cache; ``random crops`` is nanoGPT's way:
    each row of a batch is copied from a random place in a memory map.
    """
    whole = TrainingBatches(shards, shape, order, 0, vocab_size)

    def ours() -> int:
        return sum(next(whole).inputs.size for _ in range(BATCHES))

    def cold() -> int:
        for shard in shards:
            forget(shard)
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


def forget(shard: Shard) -> None:
    """Drop a shard from the system's page cache, and before that from this process's map, as mapped
    pages stay.
    """
    mapped: Any = shard.tokens
    if hasattr(os, "posix_fadvise"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
        with shard.path.open("rb") as file:
            os.fsync(file.fileno())  # the system keeps pages that are not on disk yet
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - began))
    return rates
