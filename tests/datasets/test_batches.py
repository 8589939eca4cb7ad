import itertools
from pathlib import Path

import numpy as np
import pytest

from gptjax.datasets.batches import BatchShape, TrainingBatches, Windows, validation_batches
from gptjax.errors import ConfigError, DataError
from gptjax.formats.token_shards import Shard, open_shard

VOCAB = 1000


def shard(n: int, start: int = 0, name: str = "train.bin") -> Shard:
    """Ids start, start + 1, ...: each id says where it lay."""
    return Shard(Path("corpus") / name, np.arange(start, start + n, dtype=np.uint16))


def batches(shards, A=1, B=2, T=4, order="sequential", seed=0):
    return TrainingBatches(shards, BatchShape(A, B, T), order, seed, VOCAB)


def test_sequential_reads_as_llm_c_does():
    """Step n reads ids n B T .. n B T + B T, targets one further; at the end it starts over,
    leaving the rest out.
    """
    reader = batches([shard(30)])  # (30 - 1) // 8 = 3 batches a round
    for n in (0, 1, 2, 0, 1):
        batch = next(reader)
        assert batch.inputs.shape == (1, 2, 4)
        assert batch.inputs.ravel().tolist() == list(range(8 * n, 8 * n + 8))
        assert batch.targets.ravel().tolist() == list(range(8 * n + 1, 8 * n + 9))


def test_sequential_takes_one_shard_after_the_other():
    reader = batches([shard(17), shard(9, start=100)])
    starts = [int(next(reader).inputs[0, 0, 0]) for _ in range(4)]
    assert starts == [0, 8, 100, 0]


@pytest.mark.parametrize("order", ["sequential", "shuffle"])
def test_one_sequence_a_step(order):
    reader = batches([shard(30)], B=1, order=order)
    assert sorted(int(next(reader).inputs[0, 0, 0]) for _ in range(7)) == list(range(0, 28, 4))


def test_accumulation_splits_the_same_tokens():
    one, four = next(batches([shard(100)], A=1, B=8)), next(batches([shard(100)], A=4, B=2))
    assert four.inputs.shape == (4, 2, 4)
    np.testing.assert_array_equal(one.inputs.ravel(), four.inputs.ravel())


def test_shuffle_visits_every_window_once_an_epoch():
    rounds = [
        [int(x) for b in itertools.islice(reader, 6) for x in b.inputs[0, :, 0]]
        for reader in [batches([shard(49)], order="shuffle")]
        for _ in range(2)
    ]
    for seen in rounds:
        assert sorted(seen) == list(range(0, 48, 4))
    assert rounds[0] != rounds[1] != sorted(rounds[1])
    again = [
        int(x)
        for b in itertools.islice(batches([shard(49)], order="shuffle"), 6)
        for x in b.inputs[0, :, 0]
    ]
    other = [
        int(x)
        for b in itertools.islice(batches([shard(49)], order="shuffle", seed=1), 6)
        for x in b.inputs[0, :, 0]
    ]
    assert again == rounds[0] != other


@pytest.mark.parametrize("order", ["sequential", "shuffle"])
def test_position_is_restored_exactly(order):
    reader = batches([shard(60)], order=order)
    for _ in range(9):  # past the end of the first round
        next(reader)
    position = reader.position()
    expected = [next(reader).inputs for _ in range(9)]
    fresh = batches([shard(60)], order=order)
    fresh.seek(position)
    np.testing.assert_array_equal([next(fresh).inputs for _ in range(9)], expected)


@pytest.mark.parametrize("order", ["sequential", "shuffle"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_out_the_rows_of_every_batch(order, count):
    """Side by side, the processes' batches are the single process's, round after round: nothing
    twice, nothing missing.
    """
    shape, shards = BatchShape(3, 4, 2), [shard(101)]
    whole = TrainingBatches(shards, shape, order, 0, VOCAB)
    parts = [
        TrainingBatches(shards, shape, order, 0, VOCAB, (index, count)) for index in range(count)
    ]
    for _ in range(9):  # past the end of the first round
        rows = [next(part).inputs for part in parts]
        assert {r.shape for r in rows} == {(3, 4 // count, 2)}
        np.testing.assert_array_equal(np.concatenate(rows, 1), next(whole).inputs)


def test_rows_that_processes_cannot_share_out():
    with pytest.raises(ConfigError, match="batch_size 4 does not divide evenly among 3 processes"):
        TrainingBatches([shard(101)], BatchShape(1, 4, 2), "shuffle", 0, VOCAB, (0, 3))


def test_tinyshakespeare_in_llm_cs_order(shared):
    path = shared / "tinyshakespeare" / "tiny_shakespeare_train.bin"
    reader = TrainingBatches([open_shard(path)], BatchShape(1, 4, 64), "sequential", 0, 50257)
    raw = np.fromfile(path, np.uint16)[512:]
    for n in range(3):
        np.testing.assert_array_equal(next(reader).inputs.ravel(), raw[n * 256 : n * 256 + 256])


def test_id_beyond_the_vocabulary_is_named():
    tokens = np.zeros(100, np.uint16)
    tokens[33] = VOCAB
    windows = Windows([Shard(Path("corpus/train.bin"), tokens)], 4, 1, VOCAB)
    windows[7]
    with pytest.raises(
        DataError,
        match="train.bin holds token id 1000 near position 32, but model.vocab_size is 1000",
    ):
        windows[8]
    reader = TrainingBatches(windows.shards, BatchShape(1, 2, 4), "sequential", 0, VOCAB)
    with pytest.raises(DataError, match="token id 1000"):
        for _ in range(9):
            next(reader)


@pytest.mark.parametrize("tokens", [np.full(9, 2**32 - 1, np.uint32), np.full(9, 2**31, np.uint32)])
def test_id_that_would_be_negative_as_int32_is_named(tokens):
    with pytest.raises(DataError, match=f"holds token id {tokens[0]} near position 4"):
        Windows([Shard(Path("corpus/train.bin"), tokens)], 4, 1, VOCAB)[1]


def test_corpus_shorter_than_a_batch():
    with pytest.raises(
        DataError, match="give 0 sequences of 4 tokens, but one step takes 2: lower data.batch_size"
    ):
        batches([shard(8)])
    next(batches([shard(9)]))
    with pytest.raises(
        DataError, match="validation shards in corpus hold 4 tokens, but one sequence takes 5"
    ):
        validation_batches([shard(4)], 100, 2, 4, VOCAB)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_validation_counts_the_same_tokens_whatever_the_batch_size(batch_size):
    """20 tokens wanted: 5 sequences of 4, the last batch filled up with masked rows."""
    found = validation_batches([shard(30, name="val.bin")], 20, batch_size, 4, VOCAB)
    assert {b.inputs.shape for b in found} == {(batch_size, 4)}
    counted = np.concatenate([b.targets[b.mask > 0] for b in found])
    assert counted.tolist() == list(range(1, 21))


def test_validation_uses_a_short_corpus_whole():
    (only,) = validation_batches([shard(9, name="val.bin")], 10_000, 4, 4, VOCAB)
    assert only.mask.sum() == 8
