"""Scores of a model on a corpus: loss, perplexity, bits per byte."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import CheckpointError
from gptjax.evaluate.statistics import Estimate, ratio
from gptjax.models.batch import Batch
from gptjax.models.transformer import token_losses
from gptjax.ops import IGNORE_INDEX
from gptjax.tokenizers import Tokenizer

compiled_losses = jax.jit(token_losses, static_argnames="cfg")


def score(
    params: Any, batches: Iterable[Batch], cfg: ModelConfig
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with the loss of each target times its mask: (B, T) float64 in nats, without
    dropout.

    A batch's losses are fetched after the next batch is dispatched. Batches of one shape are
    compiled once.

    Raises:
        CheckpointError: a loss is not finite.

    """
    dispatched: Iterator[Any] = (
        (batch, compiled_losses(params, batch._replace(mask=None), cfg)) for batch in batches
    )
    for (batch, found), _ in itertools.pairwise(itertools.chain(dispatched, [None])):
        scored = np.asarray(found, np.float64) * (1 if batch.mask is None else batch.mask)
        if not np.isfinite(scored).all():
            raise CheckpointError(
                "the model gives losses that are not finite: it is damaged, or its training "
                "diverged"
            )
        yield batch, scored


class CorpusScore(NamedTuple):
    """A corpus's scores. Standard errors treat sequences as independent, and are somewhat too small
    where neighbouring sequences come from one document.
    """

    tokens: int
    sequences: int
    bytes: int | None
    """Bytes of text that the scored tokens stand for; None without a tokenizer."""
    loss: Estimate
    """Nats per token, end-of-text included: a model has to predict where a text ends."""
    bits_per_byte: Estimate | None
    """Total loss in bits per byte of text. End-of-text adds to the loss but has no bytes."""

    @property
    def perplexity(self) -> Estimate:
        """exp(loss), with its error to first order."""
        value = math.exp(self.loss.value) if self.loss.value < math.log(1e300) else math.inf
        return Estimate(value, None if self.loss.error is None else value * self.loss.error)


def token_bytes(tokenizer: Tokenizer, vocab_size: int, before: Sequence[int] = ()) -> np.ndarray:
    """(V,) int64: the number of bytes of text that each id stands for after the ids ``before``; 0
    for control tokens such as end-of-text, -1 for an id that the tokenizer lacks.
    """
    lengths = np.full(max(vocab_size, tokenizer.vocab_size), -1)
    lengths[: tokenizer.vocab_size] = [
        len(tokenizer.decode_more(before, [i])) for i in range(tokenizer.vocab_size)
    ]
    lengths[[*tokenizer.ends, *tokenizer.special_tokens.values()]] = 0
    return lengths


def score_corpus(
    params: Any,
    batches: Iterable[Batch],
    cfg: ModelConfig,
    tokenizer: Tokenizer | None = None,
    advance: Callable[[int, str], None] = lambda sequences, text: None,
) -> CorpusScore:
    """Score every sequence of ``batches`` whose mask is not zero; masks cover whole sequences.

    Args:
        params: in the layout of ``cfg.layers``.
        batches: NumPy arrays of one shape, with at least one sequence.
        cfg: resolved.
        tokenizer: the corpus's tokenizer; bits per byte need it, with every id that occurs.
        advance: called with the number of sequences just done and the loss so far as text.

    Raises:
        CheckpointError: a loss is not finite.

    """
    lengths = first = begin = None
    if tokenizer:
        lengths = first = token_bytes(tokenizer, cfg.vocab_size)
        if (begin := tokenizer.begin_of_text) is not None:
            first = token_bytes(tokenizer, cfg.vocab_size, [begin])
    nats, tokens, sizes = [], [], []
    unknown = lengths is None
    for batch, losses in score(params, batches, cfg):
        kept = batch.mask[:, 0] > 0
        nats.append(losses[kept].sum(1))
        counts = batch.targets[kept] != IGNORE_INDEX
        tokens.append(counts.sum(1))
        if lengths is not None and first is not None:
            targets, begins = batch.targets[kept], batch.inputs[kept] == begin
            found = np.where(begins, first[targets], lengths[targets]) * counts
            unknown |= bool((found < 0).any())
            sizes.append(found.sum(1))
        advance(int(kept.sum()), f"loss {sum(map(np.sum, nats)) / sum(map(np.sum, tokens)):.4f}")
    all_nats, all_tokens = np.concatenate(nats), np.concatenate(tokens)
    size = None if unknown else int(sum(map(np.sum, sizes)))
    return CorpusScore(
        tokens=int(all_tokens.sum()),
        sequences=len(all_nats),
        bytes=size,
        loss=ratio(all_nats, all_tokens),
        bits_per_byte=ratio(all_nats, np.concatenate(sizes)).scaled(1 / math.log(2))
        if size
        else None,
    )
