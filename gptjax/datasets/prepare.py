"""Text -> token shards: split by document, tokenized in parallel, kept under the hash of what went
in.
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
AHEAD = 4  # pieces waiting to be tokenized, per worker


class Scan(NamedTuple):
    """What a pass over the text counted."""

    documents: int
    characters: int


def prepare_text(
    files: list[Path], root: Path, name: str, tokenizer: str, column: str | None = None
) -> Path:
    """The folder of token shards made from ``files``: ``root/NAME-TOKENIZER-HASH``, made unless it
    is there.

    HASH is that of the files' content. Of ``MIN_DOCUMENTS`` or more documents every tenth is held
    out for validation, or so many fewer that they are about ``VAL_CHARACTERS``; of fewer, the last
    tenth of the text, as nanoGPT does.

    Args:
        files: as `gptjax.datasets.text.find_files` gives them.
        root: the folder that corpora are kept in.
        name: for the folder.
        tokenizer: gpt2, byte, char, bpe:SIZE (trained on the training text), or a file; see
            `make_tokenizer`.
        column: see `gptjax.datasets.text.pieces`.

    Raises:
        DataError: the text is empty, or too short for its tokenizer.
        FormatError: a file cannot be read.

    """
    total = sum(path.stat().st_size for path in files)
    with progress("reading", total) as advance:
        digest = _content_hash(files, column, advance)
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


def folder_name(tokenizer: str) -> str:
    """The tokenizer's part of a corpus folder's name; of a file, with a hash of what it holds.

    Raises:
        DataError: there is no such file.

    """
    if tokenizer in ("gpt2", "byte", "char") or tokenizer.startswith("bpe:"):
        return tokenizer.replace(":", "-")
    found = tokenizers.find(tokenizer)
    digest = hashlib.sha256(json.dumps(found.content(), sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', found.name)}-{digest[:8]}"


def make_tokenizer(
    which: str, training: Callable[[], Iterable[str]], everything: Callable[[], Iterable[Piece]]
) -> Tokenizer:
    """The tokenizer that a word or a path stands for; trained, where it has to be, on the text.

    Args:
        which: ``char`` (every character of the whole text, as nanoGPT), ``bpe:SIZE`` (a byte-level
            BPE trained on the training text), or what `gptjax.tokenizers.find` knows.
        training: gives the training text.
        everything: gives all of it.

    Raises:
        DataError: no such tokenizer, or the text is too short to train it.

    """
    kind, _, size = which.partition(":")
    if which == "char":
        return tokenizers.train_characters(piece.text for piece in everything())
    if kind != "bpe":
        return tokenizers.find(which)
    if not size.isdecimal():
        raise DataError(f"data.tokenizer {which} lacks the vocabulary's size: bpe:2048, say")
    try:
        return tokenizers.train_bpe(training(), int(size), f"bpe-{size}")
    except ValueError as error:
        raise DataError(f"data.tokenizer {which}: {error}") from error


def count(text: Iterable[Piece]) -> Scan:
    """Documents and characters."""
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
    # Characters of the training text still to come
    left = scan.characters * (VAL_EVERY - 1) // VAL_EVERY
    for document, part in text:
        kept = part[:left] if split == "train" else part[left:]
        left = max(0, left - len(part))
        if kept:
            yield Piece(document, kept)


def encode(
    tokenizer: Tokenizer, text: Iterable[Piece], workers: int | None = None
) -> Iterator[np.ndarray]:
    """The ids of the pieces in order, each document after begin-of-text, or end-of-text, where the
    tokenizer has one.

    Threads do it, since tiktoken lets go of the interpreter's lock; no more pieces are read ahead
    than they can use.

    Returns:
        arrays (n,), of `id_dtype`.

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
    """uint16 where it holds every id, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_corpus(
    folder: Path,
    tokenizer: Tokenizer,
    text: dict[Split, Iterable[Piece]],
    characters: int,
    source: dict[str, object],
    tokens: int | None = None,
) -> Path:
    """Tokenize each split into shards of ``SHARD_TOKENS`` ids in ``folder``, which appears once
    everything is in it.

    Of the training split the first ``tokens`` are enough, if that is given.
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


def write_shards(into: Path, split: str, ids: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Write ids as ``SPLIT_000000.bin``, ``SPLIT_000001.bin``... of ``SHARD_TOKENS`` ids each but
    the last.

    Raises:
        DataError: there is not a single id.

    """
    numbered = itertools.groupby(_numbered(ids), key=lambda number_array: number_array[0])
    for number, group in numbered:
        write_shard(into / f"{split}_{number:06d}.bin", (array for _, array in group), dtype)
    if not list(into.glob(f"{split}_*.bin")):
        raise DataError(f"the text is too short: nothing is left for the {split} split")


def _numbered(ids: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """The ids with the number of the shard that they go to, cut where one ends."""
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


def _content_hash(files: list[Path], column: str | None, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256(f"{column}\0".encode())
    for path in files:
        with open_file(path) as file:
            digest.update(f"{kind_of(path)} {path.suffix} {path.stat().st_size}\0".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                advance(len(chunk))
    return digest.hexdigest()
