"""The interface of every tokenizer."""

import abc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from gptjax.files import write_whole

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def as_text(piece: bytes) -> str:
    r"""A token's text on one line: line ends and what is not printable as ``\n`` or ``\xe2``."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Tokenizer(abc.ABC):
    """Text <-> token ids. Immutable, compared by value, thread-safe and picklable."""

    kind: ClassVar[str]
    """The kind of tokenizer, as saved in its file."""

    name: str
    """The vocabulary's name, for people."""

    @property
    @abc.abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The bytes of each id, including end-of-text."""

    @property
    @abc.abstractmethod
    def end_of_text(self) -> int | None:
        """The id that separates documents, or None."""

    @property
    def begin_of_text(self) -> int | None:
        """The id that begins each document, as Llama's BOS; None where the separator does."""
        return None

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by their text, such as ``<|im_start|>``; `encode` never gives
        them.
        """
        return {}

    @property
    def document_start(self) -> int | None:
        """The id before each document: `begin_of_text`, or where there is none the separator."""
        return self.end_of_text if self.begin_of_text is None else self.begin_of_text

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids after which a text is over: the separator, or the beginning of another text."""
        return tuple(i for i in (self.end_of_text, self.begin_of_text) if i is not None)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; ``<|endoftext|>`` in it is ordinary text.

        Raises:
            DataError: the text cannot be encoded, for example because the vocabulary lacks a
                character.

        """

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on after others; some tokenizers put a space before a first one.

        Raises:
            DataError: see `encode`.

        """
        return self.encode(text)

    @abc.abstractmethod
    def content(self) -> dict[str, object]:
        """The JSON data that `save` writes in addition to kind and name."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, including end-of-text."""
        return len(self.pieces)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both encode and decode alike, whatever their names."""
        return self.kind == other.kind and self.content() == other.content()

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; an id outside the vocabulary becomes U+FFFD."""
        pieces = self.pieces
        return b"".join(pieces[i] if 0 <= i < len(pieces) else REPLACEMENT for i in ids)

    def decode_more(self, before: Sequence[int], ids: Sequence[int]) -> bytes:
        """The bytes of some ids that follow others: `decode_bytes` of both, without the first's."""
        return self.decode_bytes([*before, *ids])[len(self.decode_bytes(before)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; an incomplete character, or an id outside the vocabulary, becomes
        U+FFFD.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer atomically as a JSON file, for `gptjax.tokenizers.load`."""
        with write_whole(Path(path)) as file:
            file.write(json.dumps({"kind": self.kind, "name": self.name} | self.content()).encode())

    @property
    def sha256(self) -> str:
        """Hash of kind and content, by which a run recognises its tokenizer."""
        return hashlib.sha256(
            json.dumps({"kind": self.kind} | self.content(), sort_keys=True).encode()
        ).hexdigest()
