"""Tokenizers that treat a space as the first character of the next word, as SentencePiece."""

import abc
import re
from collections.abc import Sequence

from gptjax.tokenizers.interface import REPLACEMENT, Tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in a token
OVER_BLANKS = re.compile(rf"[^\s{SPACE}][ \n{SPACE}]")
"""Matches a token that spans blanks, so that text cannot be cut before a blank."""


class SpaceFirst(Tokenizer):
    """A tokenizer that adds a space before a text, and drops it in decoding."""

    @property
    def space_first(self) -> bool:
        """Whether it does so; if not, it is an ordinary tokenizer."""
        return True

    @abc.abstractmethod
    def encode_more(self, text: str) -> list[int]:
        """See `Tokenizer`; no space is added."""

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`; a space is added before a text that is not empty."""
        return self.encode_more(" " + text if text and self.space_first else text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`; a space directly after begin-of-text is dropped."""
        pieces, begin = self.pieces, self.begin_of_text
        found = [pieces[i] if 0 <= i < len(pieces) else REPLACEMENT for i in ids]
        if self.space_first and begin is not None:
            for place, token in enumerate(ids[:-1], 1):
                if token == begin:
                    found[place] = found[place].removeprefix(b" ")
        return b"".join(found)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`; the ids begin a text, with or without begin-of-text."""
        if not self.space_first:
            return super().decode(ids)
        rest = ids[1:] if len(ids) and ids[0] == self.begin_of_text else ids
        return self.decode_bytes(rest).removeprefix(b" ").decode("utf-8", errors="replace")
