"""Decode tokens to text as they arrive."""

import codecs
from collections.abc import Sequence

from gptjax.errors import DataError
from gptjax.tokenizers import Tokenizer


class TextStream:
    """Decodes tokens as they arrive, and returns text once no later token can change it.

    Characters and stop strings may span tokens, so the beginning of either is held back. The text
    ends before the first stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: int | None = None
    ) -> None:
        """Start with no tokens after the id ``before``, if any; empty ``stops`` are ignored."""
        self.tokenizer = tokenizer
        self._before = [] if before is None else [before]
        self.stops = [stop for stop in stops if stop]
        self.text = ""
        """All text that is final so far."""
        self.stopped = False
        """Whether a stop string has appeared; later tokens are ignored."""
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Add ids, ``last`` for the final ones; returns the text that is now final."""
        if self.stopped:
            return ""
        arrived = self.tokenizer.decode_more(self._before, ids)
        self._before = [*self._before, *ids][-1:]
        self._held += self._decoder.decode(arrived, last)
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(self._held) - (0 if last else self._undecided())
        certain, self._held = self._held[:end], self._held[end:]
        self.text += certain
        return certain

    def _undecided(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        lengths = (
            n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])
        )
        return max(lengths, default=0)


def prompt_ids(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """The ids to start a sample from, at least one: begin-of-text, if the tokenizer has one, and
    the prompt's.

    If there are none, end-of-text, or a newline if the tokenizer has no end-of-text. Without a
    tokenizer, or if its vocabulary lacks the newline, the sample starts from id 0.

    Raises:
        DataError: the vocabulary lacks a character of the prompt other than a newline.

    """
    if not tokenizer:
        return [0]
    begin = tokenizer.begin_of_text
    if begin is not None:
        return [begin, *tokenizer.encode(prompt)]
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode(prompt or "\n")
    except DataError:
        if prompt.strip("\n"):
            raise
        return [0]
