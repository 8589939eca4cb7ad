"""Batches from token shards: seeded, prefetched, resumable at an exact position."""

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from gptjax.config import Order
from gptjax.datasets.conversations import Conversations, labels_of
from gptjax.errors import ConfigError, DataError
from gptjax.formats.token_shards import Shard
from gptjax.models.batch import Batch

PREFETCH_BATCHES = 4


class Windows:
    """Shards cut into windows of T + 1 ids, each sharing its last id with the next window's first.

    Window i reads ids i T .. i T + T of its shard. A shard's last, incomplete group of ``group``
    windows is left out, so that with ``group = B`` every batch of B windows in order lies within
    one shard: llm.c's reading order.
    """

    def __init__(self, shards: list[Shard], seq_len: int, group: int, vocab_size: int) -> None:
        """Count the windows of each shard without reading any."""
        self.shards = shards
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        counts = [(shard.tokens.size - 1) // (seq_len * group) * group for shard in shards]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).tolist()

    def __len__(self) -> int:
        """Windows in all shards."""
        return self.starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """Window ``index``: (T + 1,) int32.

        Raises:
            DataError: it holds an id beyond the model's vocabulary.

        """
        i = bisect.bisect_right(self.starts, index) - 1
        begin = (int(index) - self.starts[i]) * self.seq_len
        window = self.shards[i].tokens[begin : begin + self.seq_len + 1]
        if window.max() >= self.vocab_size:
            raise DataError(
                f"{self.shards[i].path} holds token id {window.max()} near position {begin}, "
                f"but model.vocab_size is {self.vocab_size}: raise it, or use the corpus that "
                "belongs to this model"
            )
        return np.asarray(window, np.int32)


class BatchShape(NamedTuple):
    """One optimizer step's batch: A micro-batches of B sequences of T tokens."""

    accumulate: int
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """A B T."""
        return self.accumulate * self.batch_size * self.seq_len


def to_batch(window: np.ndarray) -> Batch:
    """(T + 1,) ids -> inputs, and targets shifted by one, each (T,)."""
    return Batch(window[:-1], window[1:])


class Sequences:
    """The sequences of a corpus as `Batch`es of (T,) arrays: windows of text, or packed
    conversations.
    """

    def __init__(self, shards: list[Shard], seq_len: int, group: int, vocab_size: int) -> None:
        """Count the sequences; see `Windows` and `Conversations`."""
        self.source: Windows | Conversations
        if labels_of(shards[0]) is None:
            self.source = Windows(shards, seq_len, group, vocab_size)
        else:
            self.source = Conversations(shards, seq_len, vocab_size)

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        """Sequence ``index``.

        Raises:
            DataError: it holds an id beyond the model's vocabulary.

        """
        found = self.source[index]
        return found if isinstance(found, Batch) else to_batch(found)


class TrainingBatches:
    """An endless iterator of `Batch`es of (A, B, T) arrays, prefetched by a thread. Each of n
    processes gets B / n rows.

    ``sequential``: step n reads from token n A B T on, as in llm.c, and starts over at the end of
    the corpus. ``shuffle``: windows in an order drawn from the seed, anew in every epoch.
    """

    def __init__(
        self,
        shards: list[Shard],
        shape: BatchShape,
        order: Order,
        seed: int,
        vocab_size: int,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        """Start at the first batch.

        Args:
            shards: the training split.
            shape: shape of the whole batch, over all processes.
            order: see above.
            seed: seed of the shuffle.
            vocab_size: upper bound of the ids.
            process: (p, n): this process reads rows p B / n to (p + 1) B / n of each micro-batch.

        Raises:
            DataError: the shards are shorter than one batch.
            ConfigError: n does not divide B.

        """
        index, count = process
        if shape.batch_size % count:
            raise ConfigError(
                f"data.batch_size {shape.batch_size} does not divide evenly among {count} "
                "processes: choose a multiple"
            )
        per_step = shape.accumulate * shape.batch_size
        windows = Sequences(
            shards, shape.seq_len, shape.batch_size if order == "sequential" else 1, vocab_size
        )
        if len(windows) < per_step:
            raise DataError(
                f"the training shards in {shards[0].path.parent} give {len(windows)} sequences of "
                f"{shape.seq_len} tokens, but one step takes {per_step}: lower data.batch_size, "
                "data.seq_len or optim.accumulate, or use more text"
            )
        dataset = grain.MapDataset.source(windows)
        if order == "shuffle":
            dataset = dataset.seed(seed).shuffle()
        rows = dataset.repeat().batch(shape.batch_size // count, drop_remainder=True)[index::count]
        dataset = rows.batch(shape.accumulate, drop_remainder=True)
        self._iterator = iter(
            dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
            )
        )

    def __iter__(self) -> "TrainingBatches":
        """The iterator itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: an id is beyond the model's vocabulary.

        """
        found: Batch = next(self._iterator)
        return found

    def position(self) -> dict[str, Any]:
        """The position of the next batch, as JSON data."""
        return self._iterator.get_state()

    def seek(self, position: dict[str, Any]) -> None:
        """Move to a `position`."""
        self._iterator.set_state(position)


def validation_batches(
    shards: list[Shard], tokens: int, batch_size: int, seq_len: int, vocab_size: int
) -> list[Batch]:
    """Batches (B, T) of the first ``tokens`` targets of the shards, rounded up to whole sequences;
    the same tokens for every batch size.

    In the last batch, sequences beyond the count are masked. A corpus shorter than ``tokens`` is
    used whole.

    Raises:
        DataError: the shards are shorter than one sequence.

    """
    windows = Sequences(shards, seq_len, 1, vocab_size)
    if not len(windows):
        total = sum(shard.tokens.size for shard in shards)
        raise DataError(
            f"the validation shards in {shards[0].path.parent} hold {total} tokens, but one "
            f"sequence takes {seq_len + 1}: lower data.seq_len, or use more text"
        )
    return list(in_order(windows, min(len(windows), -(-tokens // seq_len)), batch_size))


def in_order(windows: Sequences, count: int, batch_size: int) -> Iterator[Batch]:
    """The first ``count`` windows in batches (B, T); in the last one, rows beyond the count are
    masked.
    """
    for begin in range(0, count, batch_size):
        rows = range(begin, begin + batch_size)
        batch: Batch = jax.tree.map(
            lambda *x: np.stack(x), *(windows[min(i, count - 1)] for i in rows)
        )
        mask = np.array([i < count for i in rows], np.float32)
        yield batch._replace(mask=np.broadcast_to(mask[:, None], batch.targets.shape))
