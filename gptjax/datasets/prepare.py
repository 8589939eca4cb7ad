"""Prepare text as token shards: split by document, tokenized in parallel, kept under a hash of the
content.
"""

import collections
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gptjax import tokenizers
from gptjax.cli.progress import progress
from gptjax.datasets.text import Piece, kind_of, pieces
from gptjax.errors import DataError
from gptjax.files import open_file, write_folder
from gptjax.formats.token_shards import write_shard
from gptjax.tokenizers import Tokenizer

Split = Literal["train", "val"]
TOKENIZER_FILE = "tokenizer.json"
SOURCE_FILE = "source.json"
SHARD_TOKENS = 100_000_000
VAL_EVERY = 10
VAL_CHARACTERS = 20_000_000
MIN_DOCUMENTS = 2 * VAL_EVERY
TRAINED: dict[str, Callable[[Iterable[str], int, str], Tokenizer]] = {
    "bpe": tokenizers.train_bpe,
    "sentencepiece": tokenizers.train_sentencepiece,
}
"""What trains a vocabulary, by the word before its size."""
AHEAD = 4  # pieces waiting to be tokenized, per worker


class Scan(NamedTuple):
    """The counts of one pass over the text."""

    documents: int
    characters: int


def prepare_text(
    files: list[Path],
    root: Path,
    name: str,
    tokenizer: str | Tokenizer,
    column: str | None = None,
) -> Path:
    """Tokenize ``files`` into shards unless that was done before; returns the folder
    ``root/NAME-TOKENIZER-HASH``, where HASH is that of the content.

    Of ``MIN_DOCUMENTS`` or more documents, every tenth is held out for validation, or fewer, for
    about ``VAL_CHARACTERS`` in all. Of fewer documents, it is the last tenth of the text, as in
    nanoGPT.

    Args:
        files: see `gptjax.datasets.text.find_files`.
        root: the folder of prepared corpora.
        name: first part of the folder's name.
        tokenizer: gpt2, byte, char, bpe:SIZE or sentencepiece:SIZE (trained on the training text),
            or a file; see `make_tokenizer`.
        column: see `gptjax.datasets.text.pieces`.

    Raises:
        DataError: the text is empty, or too short for its tokenizer.
        FormatError: a file cannot be read.

    """
    total = sum(path.stat().st_size for path in files)
    with progress("reading", total) as advance:
        digest = content_hash(files, column, advance)
    folder = root / f"{name}-{folder_name(tokenizer)}-{digest[:12]}"
    if folder.exists():
        return folder
    scan = count(pieces(files, column))
    if not scan.characters:
        raise DataError(f"there is no text in {', '.join(map(str, files[:3]))}")

    def read(split: Split) -> Iterator[Piece]:
        return of_split(pieces(files, column), scan, split)

    made = make_tokenizer(
        tokenizer, lambda: (piece.text for piece in read("train")), lambda: pieces(files, column)
    )
    source = {
        "files": [str(path) for path in files],
        "sha256": digest,
        "column": column,
        **scan._asdict(),
    }
    return write_corpus(
        folder, made, {"train": read("train"), "val": read("val")}, scan.characters, source
    )


def folder_name(tokenizer: str | Tokenizer) -> str:
    """The tokenizer's part of a corpus folder's name; a file's includes a hash of its content.

    Raises:
        DataError: there is no such file.

    """
    if isinstance(tokenizer, Tokenizer):
        found = tokenizer
    elif tokenizer in ("gpt2", "byte", "char") or tokenizer.partition(":")[0] in TRAINED:
        return tokenizer.replace(":", "-")
    else:
        found = tokenizers.find(tokenizer)
    digest = hashlib.sha256(json.dumps(found.content(), sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', found.name)}-{digest[:8]}"


def make_tokenizer(
    which: str | Tokenizer,
    training: Callable[[], Iterable[str]],
    everything: Callable[[], Iterable[Piece]],
) -> Tokenizer:
    """Find a tokenizer by name or path, or train it on the text.

    Args:
        which: ``char`` (every character of the whole text, as in nanoGPT), ``bpe:SIZE`` (a
            byte-level BPE trained on the training text), ``sentencepiece:SIZE`` (SentencePiece's,
            likewise), or see `gptjax.tokenizers.find`.
        training: returns the training text.
        everything: returns the whole text.

    Raises:
        DataError: there is no such tokenizer, or the text is too short to train it.

    """
    if isinstance(which, Tokenizer):
        return which
    kind, _, size = which.partition(":")
    if which == "char":
        return tokenizers.train_characters(piece.text for piece in everything())
    if kind not in TRAINED:
        return tokenizers.find(which)
    if not size.isdecimal():
        raise DataError(f"data.tokenizer {which} lacks the vocabulary size, as in {kind}:2048")
    try:
        return TRAINED[kind](training(), int(size), f"{kind}-{size}")
    except ValueError as error:
        raise DataError(f"data.tokenizer {which}: {error}") from error


def count(text: Iterable[Piece]) -> Scan:
    """Count documents and characters."""
    documents = characters = 0
    for document, part in text:
        documents = document + 1
        characters += len(part)
    return Scan(documents, characters)


def of_split(text: Iterable[Piece], scan: Scan, split: Split) -> Iterator[Piece]:
    """The pieces that belong to a split; see `prepare_text`."""
    if scan.documents >= MIN_DOCUMENTS:
        every = max(VAL_EVERY, scan.characters // VAL_CHARACTERS)
        yield from (piece for piece in text if (piece.document % every == 0) == (split == "val"))
        return
    # Characters left of the training text
    left = scan.characters * (VAL_EVERY - 1) // VAL_EVERY
    for document, part in text:
        kept = part[:left] if split == "train" else part[left:]
        left = max(0, left - len(part))
        if kept:
            yield Piece(document, kept)


def encode(
    tokenizer: Tokenizer, text: Iterable[Piece], workers: int | None = None
) -> Iterator[np.ndarray]:
    """The ids of the pieces in order; each document begins with begin-of-text, or end-of-text, if
    the tokenizer has one.

    Threads encode in parallel, since tiktoken releases the interpreter's lock. A bounded number of
    pieces is read ahead.

    Returns:
        Arrays (n,) of `id_dtype`.

    """
    dtype = id_dtype(tokenizer)
    workers = workers or os.cpu_count() or 1

    def ids(begins: bool, part: str) -> np.ndarray:
        if not begins:
            return np.array(tokenizer.encode_more(part), dtype)
        start = [] if tokenizer.document_start is None else [tokenizer.document_start]
        return np.array(start + tokenizer.encode(part), dtype)

    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    before = -1
    try:
        for document, part in text:
            waiting.append(pool.submit(ids, document != before, part))
            before = document
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 if it can hold every id, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_corpus(
    folder: Path,
    tokenizer: Tokenizer,
    text: dict[Split, Iterable[Piece]],
    characters: int,
    source: dict[str, object],
    tokens: int | None = None,
) -> Path:
    """Tokenize each split into shards of ``SHARD_TOKENS`` ids in ``folder``, which appears once it
    is complete; of the training split only the first ``tokens``, if given.
    """

    def write(into: Path) -> None:
        with progress("tokenizing", characters) as advance:
            for split, parts in text.items():
                ids = encode(tokenizer, _counted(parts, advance))
                write_shards(
                    into,
                    split,
                    _first(ids, tokens) if split == "train" else ids,
                    id_dtype(tokenizer),
                )
        tokenizer.save(into / TOKENIZER_FILE)
        (into / SOURCE_FILE).write_text(json.dumps(source, indent=1))

    return write_folder(folder, write)


def _first(ids: Iterator[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    left = tokens
    for array in ids:
        yield array[:left]
        if left is not None:
            left -= array.size
            if left <= 0:
                return


def write_shards(
    into: Path, split: str, ids: Iterable[np.ndarray], dtype: np.dtype, suffix: str = ".bin"
) -> None:
    """Write ids as ``SPLIT_000000.bin``, ``SPLIT_000001.bin``... of ``SHARD_TOKENS`` ids each.

    Raises:
        DataError: there are no ids.

    """
    numbered = itertools.groupby(_numbered(ids), key=lambda number_array: number_array[0])
    for number, group in numbered:
        write_shard(into / f"{split}_{number:06d}{suffix}", (array for _, array in group), dtype)
    if not list(into.glob(f"{split}_*{suffix}")):
        raise DataError(f"the text is too short: the {split} split is empty; use more text")


def _numbered(ids: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(shard number, ids), cut at the ends of shards."""
    position = 0
    for array in ids:
        while array.size:
            room = SHARD_TOKENS - position % SHARD_TOKENS
            yield position // SHARD_TOKENS, array[:room]
            position += min(room, array.size)
            array = array[room:]


def _counted(text: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[Piece]:
    for piece in text:
        yield piece
        advance(len(piece.text))


def content_hash(files: list[Path], column: str | None, advance: Callable[[int], None]) -> str:
    """SHA-256 of the files' kinds, sizes and content, and of how they are read."""
    digest = hashlib.sha256(f"{column}\0".encode())
    for path in files:
        with open_file(path) as file:
            digest.update(f"{kind_of(path)} {path.suffix} {path.stat().st_size}\0".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                advance(len(chunk))
    return digest.hexdigest()
