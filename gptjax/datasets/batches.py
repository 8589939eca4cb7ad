"""Token shards -> batches: seeded, prefetched, resumable at an exact position."""

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from gptjax.config import Order
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
        """Count the windows of each shard; nothing is read yet."""
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
            DataError: it holds an id that the model's vocabulary does not.

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


def to_batch(windows: np.ndarray) -> Batch:
    """(..., T + 1) ids -> inputs and, one to the right, targets, each (..., T)."""
    return Batch(windows[..., :-1], windows[..., 1:])


class TrainingBatches:
    """An endless iterator of batches, each a `Batch` of (A, B, T) arrays (B / n of n processes),
    prefetched by a thread.

    ``sequential``: step n reads the tokens from n A B T on, as llm.c does, and starts over at the
    corpus's end. ``shuffle``: windows in an order drawn from the seed, another one each time round
    the corpus.
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
        """Set the iterator to the first batch.

        Args:
            shards: of the training split.
            shape: of the whole batch, that of all processes together.
            order: see above.
            seed: of the shuffle.
            vocab_size: ids must be below it.
            process: which of how many this one is; process p of n gets rows p B / n up to (p + 1) B
                / n of each micro-batch.

        Raises:
            DataError: the shards are shorter than one batch.
            ConfigError: n does not divide B.

        """
        index, count = process
        if shape.batch_size % count:
            raise ConfigError(
                f"data.batch_size {shape.batch_size} cannot be shared out evenly among {count} "
                "processes"
            )
        per_step = shape.accumulate * shape.batch_size
        windows = Windows(
            shards, shape.seq_len, shape.batch_size if order == "sequential" else 1, vocab_size
        )
        if len(windows) < per_step:
            raise DataError(
                f"the training shards in {shards[0].path.parent} give {len(windows)} sequences of "
                f"{shape.seq_len} tokens, "
                f"but one step takes {per_step}: lower data.batch_size, data.seq_len or "
                "optim.accumulate, or bring more text"
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
        return to_batch(next(self._iterator))

    def position(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        return self._iterator.get_state()

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a `position`."""
        self._iterator.set_state(position)


def validation_batches(
    shards: list[Shard], tokens: int, batch_size: int, seq_len: int, vocab_size: int
) -> list[Batch]:
    """The first ``tokens`` targets of the shards in order, in whole sequences, the same whatever
    the batch size.

    Each batch is (B, T); in the last one, sequences beyond the count are masked out. A corpus that
    is shorter than ``tokens`` is used whole.

    Raises:
        DataError: the shards are shorter than one sequence.

    """
    windows = Windows(shards, seq_len, 1, vocab_size)
    if not len(windows):
        total = sum(shard.tokens.size for shard in shards)
        raise DataError(
            f"the validation shards in {shards[0].path.parent} hold {total} tokens, but one "
            f"sequence takes {seq_len + 1}: "
            "lower data.seq_len, or bring more text"
        )
    return list(in_order(windows, min(len(windows), -(-tokens // seq_len)), batch_size))


def in_order(windows: Windows, count: int, batch_size: int) -> Iterator[Batch]:
    """The first ``count`` windows in batches of (B, T); in the last one, what is beyond the count
    is masked out.
    """
    for begin in range(0, count, batch_size):
        rows = range(begin, begin + batch_size)
        batch = to_batch(np.stack([windows[min(i, count - 1)] for i in rows]))
        mask = np.array([i < count for i in rows], np.float32)
        yield batch._replace(mask=np.broadcast_to(mask[:, None], batch.targets.shape))
