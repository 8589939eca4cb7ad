import math
from typing import ClassVar

import jax
import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.datasets.batches import Sequences, in_order
from gptjax.evaluate import corpus
from gptjax.evaluate.corpus import score_corpus, token_bytes
from gptjax.models import transformer
from tests.datasets.test_batches import shard
from tests.models import tiny

# Ids 0..4 have the losses 1, 2, 3, 4, 4 bits wherever they stand.
CFG = tiny.config(num_layers=1, vocab_size=5, dtype="float32", layers="scan")
PARAMS = tiny.unigram(CFG, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])
IDS = [3, 0, 1, 0, 2, 4, 0]  # in windows of 3 targets: 0 1 0 of 4 bits, 2 4 0 of 8
ABCD = tokenizers.train_characters(["abcé"])  # é takes two bytes


class Ended(tokenizers.Characters):
    """Characters and an end-of-text."""

    end_of_text = 4
    pieces = (b"a", b"b", b"c", "é".encode(), b"<|endoftext|>")


def found(batch_size=2, tokenizer=None, ids=IDS, advance=lambda n, text: None):
    windows = Sequences([shard(1)._replace(tokens=np.array(ids, np.uint16))], 3, 1, CFG.vocab_size)
    return score_corpus(
        PARAMS, in_order(windows, len(windows), batch_size), CFG, tokenizer, advance
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_model_whose_losses_are_known(batch_size):
    """12 bits over 6 tokens; the windows' means, 4/3 and 8/3, are 2/3 off theirs, 2: their mean by
    sqrt(2 4/9 / 2).
    """
    score = found(batch_size)
    assert (score.tokens, score.sequences, score.bytes, score.bits_per_byte) == (6, 2, None, None)
    assert score.loss.value == pytest.approx(2 * math.log(2), rel=1e-6)
    assert score.loss.error == pytest.approx(2 / 3 * math.log(2), rel=1e-6)
    assert score.perplexity.value == pytest.approx(4, rel=1e-6)
    assert score.perplexity.error == pytest.approx(4 * score.loss.error, rel=1e-6)


def test_bits_per_byte_count_the_end_of_text_but_not_its_bytes():
    """The targets a b a c END a: 12 bits over 5 bytes, 3 of them in the first window; with é for
    the first a over 6.
    """
    tokenizer = Ended("abcé")
    score = found(tokenizer=tokenizer)
    assert score.bytes == 5
    assert score.bits_per_byte.value == pytest.approx(12 / 5, rel=1e-6)
    off = 4 - 3 * 12 / 5  # and the other window the same with the other sign
    assert score.bits_per_byte.error == pytest.approx(abs(off) / 2.5, rel=1e-5)
    assert found(tokenizer=tokenizer, ids=[0, 3, *IDS[2:]]).bytes == 6


def test_an_id_that_the_tokenizer_lacks():
    assert token_bytes(ABCD, 6).tolist() == [1, 1, 1, 2, -1, -1]
    assert found(tokenizer=ABCD).bytes is None
    assert found(tokenizer=ABCD).bits_per_byte is None
    assert found(tokenizer=ABCD, ids=[4, *IDS[1:5]]).bytes == 3  # a first token is not scored


def test_one_window_has_no_standard_error():
    assert found(ids=IDS[:4]).loss.error is None


def test_what_is_told_on_the_way():
    seen = []
    found(1, advance=lambda n, text: seen.append((n, text)))
    assert seen == [(1, f"loss {4 / 3 * math.log(2):.4f}"), (1, f"loss {2 * math.log(2):.4f}")]


def test_all_batches_are_traced_once(monkeypatch):
    """The last one too, which is not full."""
    traced = []
    losses = jax.jit(
        lambda *args: traced.append(1) or transformer.token_losses(*args), static_argnums=2
    )
    monkeypatch.setattr(corpus, "compiled_losses", losses)
    found(batch_size=3, ids=IDS * 5)
    assert len(traced) == 1


def test_the_next_batch_is_dispatched_before_one_is_fetched():
    asked = []
    windows = Sequences(
        [shard(13)._replace(tokens=np.array(IDS * 2, np.uint16))], 3, 1, CFG.vocab_size
    )
    batches = (asked.append(n) or batch for n, batch in enumerate(in_order(windows, 4, 1)))
    for n, _ in enumerate(corpus.score(PARAMS, batches, CFG)):
        assert len(asked) == min(n + 2, 4)


class Begun(Ended):
    """Id 3 begins a text, and a space after it, id 2, is none of it."""

    begin_of_text = 3
    special_tokens: ClassVar = {"<s>": 3}
    pieces = (b"a", b"b", b" ", b"<s>", b"</s>")

    def decode_bytes(self, ids):
        """Without the space after id 3."""
        found = [self.pieces[i] for i in ids]
        before = [None, *ids]
        return b"".join(
            piece.removeprefix(b" ") if i == 3 else piece
            for piece, i in zip(found, before, strict=False)
        )


def test_neither_begin_of_text_nor_its_space_has_bytes():
    tokenizer = Begun("abcé")
    assert token_bytes(tokenizer, 5).tolist() == [1, 1, 1, 0, 0]
    assert token_bytes(tokenizer, 5, [3]).tolist() == [1, 1, 0, 0, 0]
    assert found(tokenizer=tokenizer, ids=[3, 2, 0, 2, 4, 3, 2]).bytes == 2
