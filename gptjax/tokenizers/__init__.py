"""Tokenizers: text <-> token ids, behind one small interface.

`gpt2`, `byte`, `train_bpe` and llm.c's files give a `BytePairEncoding`, which tiktoken runs; `train_characters` gives
`Characters`. Each is saved as one JSON file beside what was made with it, so that ids can be decoded wherever they turn up.
"""

import base64
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken

from gptjax.errors import DataError, FormatError, naming
from gptjax.formats import llmc_tokenizer

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
FILE = "tokenizer.json"  # a tokenizer's name in the folder of a run or a corpus


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer. Immutable, and may be used by several threads at once."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this number; the end-of-text id included."""

    @property
    def end_of_text(self) -> int | None:
        """The id that separates documents; None where there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. ``<|endoftext|>`` in it is ordinary text, never the separator.

        Raises:
            DataError: it holds a character that the vocabulary lacks.

        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; a cut character at either end becomes U+FFFD, an id outside the vocabulary likewise."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, for `load`."""


@dataclasses.dataclass(frozen=True)
class BytePairEncoding:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): any text encodes, and decoding gives its bytes back."""

    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self.encoding.n_vocab

    @property
    def end_of_text(self) -> int:
        """See `Tokenizer`; always the last id."""
        return self.encoding.encode_single_token(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        known = (self._bytes_of(i) for i in ids)
        return b"".join(known).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\N{REPLACEMENT CHARACTER}".encode()

    def tokens(self) -> list[bytes]:
        """The bytes of each id but end-of-text, which are in the order in which the merges made them."""
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.vocab_size - 1)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its name, and unless that is gpt2 its tokens, in base64."""
        content: dict[str, object] = {"name": self.encoding.name}
        if self.encoding.name != "gpt2":
            content["tokens"] = [base64.b64encode(token).decode("ascii") for token in self.tokens()]
        _write(path, content)


@dataclasses.dataclass(frozen=True)
class Characters:
    """One id for each character of a text, in the order of their code points, as in nanoGPT's shakespeare_char and femtoGPT."""

    characters: str
    """Each once, sorted."""
    end_of_text = None

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return len(self.characters)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._code_points[ids] != points)
        if unknown.size:
            raise DataError(f"the character {text[unknown[0]]!r} (number {unknown[0]} of the text) is not in the vocabulary")
        return ids.tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return "".join(self.characters[i] if 0 <= i < self.vocab_size else "\N{REPLACEMENT CHARACTER}" for i in ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its characters."""
        _write(path, {"name": "char", "characters": self.characters})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _write(path: str | os.PathLike[str], content: dict[str, object]) -> None:
    with naming(path):
        Path(path).write_text(json.dumps(content))


def find(which: str) -> Tokenizer:
    """The tokenizer that a word or a path stands for.

    Args:
        which: ``gpt2``; ``byte``; a file that `save` wrote; llm.c's ``gpt2_tokenizer.bin``; or the folder of a run or a
            corpus, which holds a ``tokenizer.json``.

    Raises:
        DataError: there is no such tokenizer, or GPT-2's cannot be had (see `gpt2`).
        FormatError: the file is damaged.

    """
    if which in ("gpt2", "byte"):
        return gpt2() if which == "gpt2" else byte()
    path = Path(which) / FILE if Path(which).is_dir() else Path(which)
    if not path.exists():
        raise DataError(f"there is no tokenizer {which}: gpt2, byte, or a file or folder that holds one is expected")
    return from_llmc(path) if llmc_tokenizer.is_tokenizer(path) else load(path)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        FormatError: missing, or not such a file.
        DataError: it names GPT-2's vocabulary, which is neither cached nor to be had (see `gpt2`).

    """
    try:
        content = json.loads(Path(path).read_text())
        name, tokens = content["name"], content.get("tokens")
        if name == "gpt2":
            return gpt2()
        if "characters" in content:
            return _checked(Characters(content["characters"]))
        return _from_tokens(name, [base64.b64decode(token, validate=True) for token in tokens])
    except OSError as error:
        raise FormatError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not a gptjax tokenizer file ({error}): remove it to have it made again") from error


def _checked(tokenizer: Characters) -> Characters:
    if not tokenizer.characters or sorted(set(tokenizer.characters)) != list(tokenizer.characters):
        raise ValueError("its characters are not sorted, or repeat")
    return tokenizer


def from_llmc(path: Path) -> BytePairEncoding:
    """The tokenizer in llm.c's ``gpt2_tokenizer.bin``, whose ids are the ranks of the merges.

    Raises:
        FormatError: see `gptjax.formats.llmc_tokenizer.read_tokenizer`; or it is no byte-level BPE with end-of-text last.

    """
    tokens, end_of_text = llmc_tokenizer.read_tokenizer(path)
    if end_of_text != len(tokens) - 1:
        raise FormatError(f"{path} has end-of-text at {end_of_text} of {len(tokens)} tokens: it is expected to be the last")
    try:
        return _from_tokens(path.stem, tokens[:-1])
    except ValueError as error:
        raise FormatError(f"{path} holds no byte-level BPE: {error}") from error


def byte() -> BytePairEncoding:
    """The 256 bytes, and end-of-text."""
    return _from_tokens("byte", [bytes([b]) for b in range(256)])


@functools.cache
def gpt2() -> BytePairEncoding:
    """GPT-2's own BPE, 50,257 ids. tiktoken downloads its two files once and keeps them (``TIKTOKEN_CACHE_DIR``).

    Raises:
        DataError: not cached, and no network to fetch it.

    """
    try:
        return BytePairEncoding(tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a cached file of the wrong hash a ValueError
        raise DataError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor to be downloaded: "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, or go online once"
        ) from error


def train_bpe(texts: Iterable[str], vocab_size: int, name: str) -> BytePairEncoding:
    """A byte-level BPE trained on ``texts`` with GPT-2's splitting pattern: 256 bytes, the merges, then end-of-text.

    Raises:
        ValueError: the texts are too short for that many merges, or fewer than 257 ids are asked for.

    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer  # only training needs it
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"a byte-level vocabulary needs at least 257 ids, not {vocab_size}")
    bpe = HuggingFaceTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(by_id) != vocab_size - 1:
        raise ValueError(f"the text is too short for a vocabulary of {vocab_size}: it gives {len(by_id) + 1} ids")
    to_byte = _byte_of_character()
    return _from_tokens(name, [bytes(to_byte[c] for c in token) for token, _ in by_id])


def train_characters(texts: Iterable[str]) -> Characters:
    """A vocabulary of every character that the texts hold.

    Raises:
        DataError: there are none.

    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise DataError("there is no text to take the characters of")
    return Characters("".join(sorted(found)))


def _from_tokens(name: str, tokens: list[bytes]) -> BytePairEncoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("its tokens repeat or do not cover every byte")
    special = {END_OF_TEXT: len(tokens)}
    return BytePairEncoding(tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: printable Latin-1 is itself, the rest count up from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
