"""How well a model predicts a corpus: loss, perplexity, bits per byte."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import CheckpointError
from gptjax.evaluate.estimate import Estimate, ratio
from gptjax.models.batch import Batch
from gptjax.models.transformer import token_losses
from gptjax.tokenizers import Tokenizer

compiled_losses = jax.jit(token_losses, static_argnames="cfg")


def score(
    params: Any, batches: Iterable[Batch], cfg: ModelConfig
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch, and the loss of each of its targets times its mask: (B, T) float64 in nats,
    without dropout.

    A batch's are fetched after the next one was dispatched. Batches of one shape are compiled once.

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
    """What came of it. Standard errors are over sequences, as if these were independent: where
    neighbours are of one document, and alike, they are somewhat too small.
    """

    tokens: int
    sequences: int
    bytes: int | None
    """Of the text that the scored tokens stand for; None where no tokenizer is known."""
    loss: Estimate
    """Nats a token, end-of-text included: a model has to predict where a text ends."""
    bits_per_byte: Estimate | None
    """All the nats, those of end-of-text too, over the bytes of the text, to which end-of-text adds
    none.
    """

    @property
    def perplexity(self) -> Estimate:
        """exp(loss), its error to first order."""
        value = math.exp(self.loss.value) if self.loss.value < math.log(1e300) else math.inf
        return Estimate(value, None if self.loss.error is None else value * self.loss.error)


def token_bytes(tokenizer: Tokenizer, vocab_size: int, before: Sequence[int] = ()) -> np.ndarray:
    """(V,) int64: the bytes of text that each id stands for where it follows ``before``; 0 for
    control tokens such as end-of-text, -1 for an id that the tokenizer lacks.
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
    """Score the targets of ``batches`` that their masks leave in, a mask being of whole sequences.

    Args:
        params: in the layout of ``cfg.layers``.
        batches: at least one sequence; arrays of NumPy, of one shape.
        cfg: resolved.
        tokenizer: of the corpus. Where it lacks an id that occurs, there are no bits per byte.
        advance: called with the sequences just done, and the loss up to there in words.

    Raises:
        CheckpointError: a loss is not finite.

    """
    lengths = token_bytes(tokenizer, cfg.vocab_size) if tokenizer else None
    begin = tokenizer.begin_of_text if tokenizer else None
    first = token_bytes(tokenizer, cfg.vocab_size, [begin]) if begin is not None else lengths
    nats, tokens, sizes = [], [], []
    unknown = lengths is None
    for batch, losses in score(params, batches, cfg):
        kept = batch.mask[:, 0] > 0
        nats.append(losses[kept].sum(1))
        tokens.append(np.full(kept.sum(), losses.shape[1]))
        if lengths is not None and first is not None:
            targets, begins = batch.targets[kept], batch.inputs[kept] == begin
            found = np.where(begins, first[targets], lengths[targets])
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
