"""Corpora: a name or a folder -> token shards, split into train and val, and the tokenizer that made them.

`find_corpus` is the one entry; a named corpus is a function in `CORPORA` that writes its shards into a folder.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax import tokenizers
from gptjax.errors import DataError
from gptjax.formats.token_shards import Shard, open_shard, write_shard
from gptjax.tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
PYDOC_VOCAB_SIZE = 4096
PYDOC_VAL_EVERY = 10
HASHED_IDS = 1 << 23  # from each end of a shard


class Corpus(NamedTuple):
    """Opened shards and, where known, the tokenizer that made them."""

    folder: Path
    train: list[Shard]
    val: list[Shard]
    tokenizer: Tokenizer | None
    sha256: str


def find_corpus(dataset: str, root: str | os.PathLike[str]) -> Corpus:
    """Open a corpus, making it first where it is a named one that is not yet under ``root``.

    Args:
        dataset: a name in `CORPORA`, or a folder of ``train*.bin`` and ``val*.bin`` shards (also ``*_train*.bin``, as
            llm.c names them), with the ``tokenizer.json`` that made them if it is not GPT-2's.
        root: the folder that named corpora live in.

    Raises:
        DataError: no such corpus, or no shards in the folder.
        FormatError: a shard is damaged.

    """
    if dataset in CORPORA:
        return _open(CORPORA[dataset](Path(root)))
    if not Path(dataset).is_dir():
        raise DataError(f"data.dataset {dataset} is neither a folder of token shards nor one of: {', '.join(CORPORA)}")
    return _open(Path(dataset))


def _open(folder: Path) -> Corpus:
    splits = []
    for split in ("train", "val"):
        paths = sorted({*folder.glob(f"{split}*.bin"), *folder.glob(f"*_{split}*.bin")})
        if not paths:
            raise DataError(f"{folder} holds no {split}*.bin: data.dataset needs train*.bin and val*.bin token shards")
        splits.append([open_shard(path) for path in paths])
    train, val = splits
    try:
        made_with = folder / TOKENIZER_FILE
        tokenizer = tokenizers.load(made_with) if made_with.exists() else tokenizers.gpt2()
    except DataError:
        tokenizer = None
    return Corpus(folder, train, val, tokenizer, _fingerprint(train + val))


def _fingerprint(shards: list[Shard]) -> str:
    """SHA-256 over each shard's name, length and ids; of a very long one, the first and last `HASHED_IDS` alone."""
    digest = hashlib.sha256()
    for path, tokens in shards:
        digest.update(f"{path.name} {tokens.size} ".encode())
        digest.update(tokens[:HASHED_IDS].tobytes())
        digest.update(tokens[HASHED_IDS:][-HASHED_IDS:].tobytes())
    return digest.hexdigest()


def pydoc(root: Path) -> Path:
    """The embedded corpus: the Python language reference that CPython carries for ``help()``, about 0.5 MB of text.

    Every tenth topic is held out for validation. Topics quote each other, so a paragraph that occurs in a held-out
    topic is left out of the training text. A byte-level BPE is trained on the training text. Everything is kept in
    ``root/pydoc-SIZE-HASH``, where SIZE is the vocabulary's and HASH the text's: it differs between Python versions.

    Raises:
        DataError: this Python comes without the module ``pydoc_data.topics``.

    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks pydoc_data.topics, the text of the pydoc corpus: "
            "install Python's full standard library, or name your own shards with --data.dataset"
        ) from error
    documents = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    folder = root / f"pydoc-{PYDOC_VOCAB_SIZE}-{digest[:12]}"
    if folder.exists():
        return folder
    held_out = documents[::PYDOC_VAL_EVERY]
    quoted = {paragraph.strip() for document in held_out for paragraph in document.split("\n\n")}
    rest = (d for i, d in enumerate(documents) if i % PYDOC_VAL_EVERY)
    training = ["\n\n".join(p for p in document.split("\n\n") if p.strip() not in quoted) for document in rest]
    tokenizer = tokenizers.train_bpe(training, PYDOC_VOCAB_SIZE, folder.name)

    def write(into: Path) -> None:
        for split, texts in (("train", training), ("val", held_out)):
            write_shard(into / f"{split}.bin", encode_documents(tokenizer, texts))
        tokenizer.save(into / TOKENIZER_FILE)

    return _make(folder, write)


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The ids of all texts in a row, each after an end-of-text id: (n,) uint16."""
    return np.array([i for text in texts for i in (tokenizer.end_of_text, *tokenizer.encode(text))], np.uint16)


def _make(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary folder, then give it its name: a folder that exists is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made the same folder meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


CORPORA: dict[str, Callable[[Path], Path]] = {"pydoc": pydoc}
