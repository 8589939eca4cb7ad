"""What the rest of the project knows of a tokenizer."""

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


class Tokenizer(abc.ABC):
    """Text <-> token ids. Immutable and compared by value; may be used by several threads at once,
    and pickled.
    """

    kind: ClassVar[str]
    """What the file it is saved as calls it."""

    name: str
    """Of this vocabulary, for people."""

    @property
    @abc.abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The bytes that each id stands for, the end-of-text id included."""

    @property
    @abc.abstractmethod
    def end_of_text(self) -> int | None:
        """The id that separates documents; None where there is none."""

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
        """Ids of a text. ``<|endoftext|>`` in it is ordinary text, never the separator.

        Raises:
            DataError: it cannot be encoded: it holds a character that the vocabulary lacks, say.

        """

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on after others; some tokenizers put a space before a first one.

        Raises:
            DataError: see `encode`.

        """
        return self.encode(text)

    @abc.abstractmethod
    def content(self) -> dict[str, object]:
        """What `save` writes beside kind and name, as JSON."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this number; the end-of-text id included."""
        return len(self.pieces)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both give the same ids for any text, and the same text for any ids, whatever
        their names.
        """
        return self.kind == other.kind and self.content() == other.content()

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of some ids; for an id outside the vocabulary, those of U+FFFD."""
        pieces = self.pieces
        return b"".join(pieces[i] if 0 <= i < len(pieces) else REPLACEMENT for i in ids)

    def decode_more(self, before: Sequence[int], ids: Sequence[int]) -> bytes:
        """The bytes of some ids that follow others: `decode_bytes` of both, without the first's."""
        return self.decode_bytes([*before, *ids])[len(self.decode_bytes(before)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; a cut character at either end becomes U+FFFD, an id outside the
        vocabulary likewise.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one JSON file, for `gptjax.tokenizers.load`, durably: the whole file appears,
        or nothing does.
        """
        with write_whole(Path(path)) as file:
            file.write(json.dumps({"kind": self.kind, "name": self.name} | self.content()).encode())

    @property
    def sha256(self) -> str:
        """Hash of all but the name, by which a run knows its own tokenizer."""
        return hashlib.sha256(
            json.dumps({"kind": self.kind} | self.content(), sort_keys=True).encode()
        ).hexdigest()
