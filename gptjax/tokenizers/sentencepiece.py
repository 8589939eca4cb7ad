"""SentencePiece (Kudo and Richardson 2018): its ``.model`` files, run by its own library.

A file is a protocol buffer, with the fields of ``sentencepiece_model.proto``. We read the pieces
and the settings ourselves, to reject those under which encoding text in parts, or decoding ids one
by one, would give another result.
"""

import base64
import dataclasses
import functools
import io
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gptjax.errors import DataError
from gptjax.tokenizers.bpe import LARGEST, interruptible
from gptjax.tokenizers.space_first import OVER_BLANKS, SPACE, SpaceFirst

UNKNOWN_TEXT = " \N{DOUBLE QUESTION MARK} "
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
NO_NORMALIZATION = b"\x1a\x04\x18\x00\x20\x00"
"""After a model, sets add_dummy_prefix and remove_extra_whitespaces of its normalizer to false."""
TRAINED_ON = 1 << 28  # characters, at most: the trainer holds them in memory
LONGEST_LINE = 1 << 10  # characters, in training: the trainer leaves out lines above 4192 bytes


class _Piece(NamedTuple):
    """A token."""

    text: str = ""
    score: float = 0.0
    kind: int = NORMAL

    @property
    def bytes(self) -> bytes:
        """The text's bytes."""
        if self.kind == BYTE:
            return bytes([int(self.text[3:5], 16)])
        if self.kind == UNKNOWN:
            return UNKNOWN_TEXT.encode()
        return self.text.replace(SPACE, " " if self.kind != CONTROL else SPACE).encode()


class _Model(NamedTuple):
    """The contents of a ``.model``."""

    pieces: tuple[_Piece, ...]
    kind: int
    space_first: bool


@dataclasses.dataclass(frozen=True)
class SentencePiece(SpaceFirst):
    """A SentencePiece model; it can encode any text if its vocabulary has the 256 bytes.

    U+2581 in a text is read as a space. Runs of spaces are kept even if the file says to shorten
    them, as llama2.c keeps them.

    Raises:
        ValueError: the model is damaged, or has an unsupported setting, which the message names.
        DataError: the package ``sentencepiece`` is missing.

    """

    model: bytes = dataclasses.field(repr=False)
    """The content of the ``.model``."""
    name: str = "sentencepiece"
    kind = "sentencepiece"

    def __post_init__(self) -> None:
        pieces = self.read.pieces
        try:
            count = self.library.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"its library cannot read it: {error}") from error
        if count != len(pieces):
            raise ValueError(f"it has {len(pieces)} pieces, but its library reads {count}")

    def __reduce__(self) -> tuple[object, ...]:
        return SentencePiece, (self.model, self.name)

    @functools.cached_property
    def read(self) -> _Model:
        """The model's pieces and settings."""
        return read_model(self.model)

    @functools.cached_property
    def library(self) -> Any:
        """The library's object, without the space before a text."""
        return _library().SentencePieceProcessor(model_proto=self.model + NO_NORMALIZATION)

    @property
    def space_first(self) -> bool:
        """See `SpaceFirst`."""
        return self.read.space_first

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        return tuple(piece.bytes for piece in self.read.pieces)

    @property
    def begin_of_text(self) -> int | None:
        """See `Tokenizer`."""
        return _id(self.library.bos_id())

    @property
    def end_of_text(self) -> int | None:
        """See `Tokenizer`."""
        return _id(self.library.eos_id())

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """See `Tokenizer`."""
        found = enumerate(self.read.pieces)
        return {piece.text: i for i, piece in found if piece.kind in (CONTROL, UNKNOWN)}

    def encode_more(self, text: str) -> list[int]:
        """See `SpaceFirst`. Half a surrogate pair is encoded as U+FFFD.

        Raises:
            DataError: the vocabulary lacks a character of the text.

        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids: list[int] = self.library.encode(text)
        if self.library.unk_id() in ids:
            known = {c for piece in self.read.pieces for c in piece.text}
            lost = next((c for c in text.replace(" ", SPACE) if c not in known), text[:1])
            raise DataError(
                f"the text has the character {lost!r}, which the vocabulary {self.name} lacks: "
                "remove it, or use another tokenizer"
            )
        return ids

    def content(self) -> dict[str, object]:
        """See `Tokenizer`."""
        return {"model": base64.b64encode(self.model).decode("ascii")}


def _id(found: int) -> int | None:
    return None if found < 0 else found


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "a SentencePiece model needs another package: pip install 'gptjax[llama]'"
        ) from error
    return sentencepiece


def read_model(content: bytes) -> _Model:
    """Parse the content of a ``.model``.

    Raises:
        ValueError: it is damaged, or has an unsupported setting.

    """
    pieces: list[_Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(value))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    texts = [piece.text for piece in pieces]
    if not texts or len(texts) > LARGEST or len(set(texts)) < len(texts) or "" in texts:
        raise ValueError(f"its {len(texts)} pieces repeat, are empty, or more than {LARGEST}")
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise ValueError(f"its model_type is {kind!r}: it must be bpe or unigram")
    if normalizer.get(2):
        raise ValueError(
            f"its normalizer {normalizer.get(1, b'')[:20]!r} changes the text: it must be identity"
        )
    if trainer.get(24) or not normalizer.get(5, 1):
        raise ValueError("its spaces end words (its treat_whitespace_as_suffix)")
    for piece in pieces:
        if piece.kind == NORMAL and OVER_BLANKS.search(piece.text):
            raise ValueError(f"its piece {piece.text!r} spans blanks, where long texts may be cut")
    return _Model(tuple(pieces), kind, bool(normalizer.get(3, 1)))


def _piece(message: Any) -> _Piece:
    found = dict(_fields(message))
    text, score, kind = found.get(1, b""), found.get(2, bytes(4)), found.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece has no text or no score")
    if kind == BYTE and not re.fullmatch(rb"<0x[0-9A-F]{2}>", text):
        raise ValueError(f"its piece {text[:20]!r} is no byte")
    return _Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Iterate over a protocol buffer's fields: number, and value as an integer or bytes."""
    if not isinstance(message, bytes):
        raise ValueError("it is not a protocol buffer, or is damaged")
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at == len(message):
                break
            value |= (message[at] & 127) << shift
            at += 1
            if message[at - 1] < 128:
                return value
        raise ValueError("it is not a protocol buffer, or is cut off")

    while at < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else len(message) + 1)
        if at + size > len(message):
            raise ValueError("it is not a protocol buffer, or is cut off")
        at += size
        yield number, message[at - size : at]


def train_sentencepiece(texts: Iterable[str], vocab_size: int, name: str) -> SentencePiece:
    """Train a BPE on the lines of ``texts`` with the settings of llama2.c's ``tinystories.py``,
    except that runs of spaces are kept.

    Digits are separate tokens, and characters outside the vocabulary become bytes. At most
    `TRAINED_ON` characters are used.

    Raises:
        ValueError: ``vocab_size`` is too large for the length of the texts, or too small for the
            number of their characters.
        DataError: the package ``sentencepiece`` is missing.

    """
    if not 0 < vocab_size <= LARGEST:
        raise ValueError(f"a vocabulary has up to {LARGEST} ids, not {vocab_size}")
    library, model = _library(), io.BytesIO()

    def train(texts: Iterable[str]) -> None:
        library.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            num_threads=os.cpu_count(),
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )

    try:
        interruptible(train, texts)
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\D*\d+ vs (\d+)", str(error))
        if "sentences_.empty" in str(error):
            reason = "there is no text"
        elif most:
            reason = f"the text is too short: it gives at most {most[1]} ids"
        elif least:
            reason = f"the bytes and the text's characters are {least[1]} ids already"
        else:
            reason = str(error).splitlines()[-1]
        raise ValueError(f"no vocabulary of {vocab_size} can be trained: {reason}") from error
    return SentencePiece(model.getvalue(), name)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINED_ON
    for line in itertools.chain.from_iterable(text.split("\n") for text in texts):
        for begin in range(0, min(len(line), left), LONGEST_LINE):
            yield line[begin : begin + LONGEST_LINE]
        left -= len(line)
        if left <= 0:
            return
