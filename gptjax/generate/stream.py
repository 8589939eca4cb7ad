"""From tokens to text as they arrive."""

import codecs
from collections.abc import Sequence

from gptjax.errors import DataError
from gptjax.tokenizers import Tokenizer


class TextStream:
    """Text of tokens that arrive one after the other, shown as soon as no later token can change
    it.

    A character may span tokens, and a stop string too: what may still become either is held back.
    The text ends before the first stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: int | None = None
    ) -> None:
        """Nothing has arrived after the id ``before``, if any; a ``stops`` that is empty text is
        ignored.
        """
        self.tokenizer = tokenizer
        self._before = [] if before is None else [before]
        self.stops = [stop for stop in stops if stop]
        self.text = ""
        """All that is certain so far."""
        self.stopped = False
        """Whether a stop string has arrived; nothing is taken after it."""
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Take some ids, the last ones if so said; returns the text that has become certain."""
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
        """Length of the longest end of what is held that is the beginning of a stop string."""
        lengths = (
            n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])
        )
        return max(lengths, default=0)


def prompt_ids(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """At least one id to start a sample from: begin-of-text, where the tokenizer has one, and the
    prompt's.

    If that is none, end-of-text, or a line end where there is none. Without a tokenizer, or where
    its vocabulary has no line end, the first id.

    Raises:
        DataError: the vocabulary lacks a character of the prompt, other than a line end.

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
