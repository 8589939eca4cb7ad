"""Tokenizers: text <-> token ids, always through tiktoken.

A `Tokenizer` is saved as one JSON file beside what was made with it, so that ids can be decoded wherever they turn up.
"""

import base64
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from gptjax.errors import DataError, FormatError, naming

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE: any text encodes, and decoding gives its bytes back."""

    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        """Ids are below this number; the end-of-text id included."""
        return self.encoding.n_vocab

    @property
    def end_of_text(self) -> int:
        """The id that separates documents."""
        return self.encoding.encode_single_token(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. ``<|endoftext|>`` in it is ordinary text, never the separator."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; a cut character at either end becomes U+FFFD, an id outside the vocabulary likewise."""
        known = (self._bytes_of(i) for i in ids)
        return b"".join(known).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\N{REPLACEMENT CHARACTER}".encode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON: its name, or for one trained here also its tokens in rank order, in base64."""
        content: dict[str, object] = {"name": self.encoding.name}
        if self.encoding.name != "gpt2":
            ranks = [self.encoding.decode_single_token_bytes(i) for i in range(self.vocab_size - 1)]
            content["tokens"] = [base64.b64encode(token).decode("ascii") for token in ranks]
        with naming(path):
            Path(path).write_text(json.dumps(content))


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
        return _from_tokens(name, [base64.b64decode(token, validate=True) for token in tokens])
    except OSError as error:
        raise FormatError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a gptjax tokenizer file ({error}): remove it to have it made again") from error


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's own BPE, 50,257 ids. tiktoken downloads its two files once and keeps them (``TIKTOKEN_CACHE_DIR``).

    Raises:
        DataError: not cached, and no network to fetch it.

    """
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a cached file of the wrong hash a ValueError
        raise DataError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor to be downloaded: "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, or go online once"
        ) from error


def train_bpe(texts: Iterable[str], vocab_size: int, name: str) -> Tokenizer:
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


def _from_tokens(name: str, tokens: list[bytes]) -> Tokenizer:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("its tokens repeat or do not cover every byte")
    special = {END_OF_TEXT: len(tokens)}
    return Tokenizer(tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: printable Latin-1 is itself, the rest count up from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
