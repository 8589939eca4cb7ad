"""Vocabularies of single characters, as in nanoGPT's shakespeare_char and in femtoGPT."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from gptjax.errors import DataError
from gptjax.tokenizers.interface import Tokenizer


@dataclasses.dataclass(frozen=True)
class Characters(Tokenizer):
    """One id for each character, in order of code points, without end-of-text.

    Raises:
        ValueError: there are no characters, or they are not sorted, repeat, or include half of a
            surrogate pair.

    """

    characters: str
    """All characters, sorted, each once."""
    name: str = "char"
    kind = "char"
    end_of_text = None

    def __post_init__(self) -> None:
        if not self.characters or sorted(set(self.characters)) != list(self.characters):
            raise ValueError("its characters are not sorted, or repeat, or there are none")
        self.characters.encode()

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        return tuple(c.encode() for c in self.characters)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._code_points[ids] != points)
        if unknown.size:
            position = int(unknown[0])
            raise DataError(
                f"the character {text[position]!r} (U+{points[position]:04X}) at position "
                f"{position} of the text is not among the {self.vocab_size} of the vocabulary "
                f"{self.name}: leave it out, or train a vocabulary on text that has it"
            )
        return ids.tolist()

    def content(self) -> dict[str, object]:
        """See `Tokenizer`."""
        return {"characters": self.characters}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def train_characters(texts: Iterable[str], name: str = "char") -> Characters:
    """The vocabulary of all characters in the texts.

    Raises:
        DataError: there are none.

    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise DataError("the text is empty: there are no characters to make a vocabulary of")
    return Characters("".join(sorted(found)), name)
