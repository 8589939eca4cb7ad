"""Corpora: open a named corpus, a folder of token shards or your own text as training and
validation shards with their tokenizer.
"""

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax import tokenizers
from gptjax.datasets.conversations import (
    LABELS,
    TEMPLATE_FILE,
    hold_conversations,
    prepare_conversations,
)
from gptjax.datasets.named import CORPORA, PYDOC_VOCAB_SIZE, Request
from gptjax.datasets.prepare import TOKENIZER_FILE, TRAINED, prepare_text
from gptjax.datasets.text import find_files
from gptjax.errors import DataError
from gptjax.files import file_lock, read_text
from gptjax.formats.token_shards import Shard, open_shard
from gptjax.tokenizers import Tokenizer
from gptjax.tokenizers.chat_template import ChatTemplate
from gptjax.tokenizers.chat_template import find as find_template

HASHED_IDS = 1 << 23  # hashed at each end of a shard

__all__ = [
    "CORPORA",
    "TEMPLATE_FILE",
    "TOKENIZER_FILE",
    "Corpus",
    "find_corpus",
    "fitted",
    "holds_conversations",
    "holds_shards",
    "template_of",
    "vocabulary",
    "vocabulary_without_corpus",
]


class Corpus(NamedTuple):
    """Opened shards and the tokenizer that made them, if known."""

    folder: Path
    train: list[Shard]
    val: list[Shard]
    tokenizer: Tokenizer | None
    sha256: str

    @property
    def tokenizer_is_kept(self) -> bool:
        """Whether the folder holds its tokenizer; if not, GPT-2's is assumed."""
        return (self.folder / TOKENIZER_FILE).exists()


def find_corpus(
    dataset: str,
    root: str | os.PathLike[str],
    tokenizer: str | Tokenizer | None = None,
    column: str | None = None,
    tokens: int | None = None,
    template: ChatTemplate | None = None,
) -> Corpus:
    """Open a corpus; a named one or text is prepared first, unless it already is under ``root``.

    Args:
        dataset: a name in `CORPORA`; a folder of token shards, ``train*.bin`` and ``val*.bin``
            (or ``*_train*.bin``, as llm.c names them), with the ``tokenizer.json`` that made them
            if that is not GPT-2's; or text: a file, a folder or a glob pattern, see
            `gptjax.datasets.text`; or conversations in JSON lines, see
            `gptjax.datasets.conversations`.
        root: the folder of prepared corpora.
        tokenizer: tokenizer for text, see `gptjax.datasets.prepare.make_tokenizer`; None for gpt2,
            or a named corpus's own.
        column: the column of JSON lines and Parquet that holds the text.
        tokens: training tokens to prepare of a named corpus that comes in parts; None for all.
        template: renders conversations; by default ChatML.

    Raises:
        DataError: there is no such corpus, or it cannot be downloaded or prepared.
        FormatError: a shard or a text file is damaged.

    """
    if tokens is not None and tokens < 1:
        raise DataError(
            f"tokens must be at least 1, not {tokens}: leave it out for all of the corpus"
        )
    path, root = Path(dataset), Path(root)
    if dataset in CORPORA:
        with _locked(root, dataset, _name(tokenizer)):
            made = CORPORA[dataset](Request(root, tokenizer, tokens))
        return _open(made, tokens)
    if holds_shards(path):
        found = _open(path, tokens)
        return found._replace(tokenizer=_found(tokenizer)) if tokenizer else found
    if not path.exists() and not set(dataset) & set("*?["):
        near = [] if path.suffix else difflib.get_close_matches(dataset, CORPORA, 1)
        raise DataError(
            f"data.dataset {dataset} is neither a file or folder nor one of {', '.join(CORPORA)}"
            + (f": did you mean {near[0]}?" if near else "")
        )
    name = re.sub(r"\W+", "-", path.name.split(".")[0]).strip("-") or "text"
    files = find_files(dataset)
    with _locked(root, *map(str, files), _name(tokenizer), column):
        if hold_conversations(files):
            form = template or find_template("chatml")
            made = prepare_conversations(files, root, name, _found(tokenizer or "gpt2"), form)
        else:
            made = prepare_text(files, root, name, tokenizer or "gpt2", column)
    return _open(made, tokens)


def _found(tokenizer: str | Tokenizer) -> Tokenizer:
    return tokenizer if isinstance(tokenizer, Tokenizer) else tokenizers.find(tokenizer)


def _name(tokenizer: str | Tokenizer | None) -> str | None:
    return tokenizer.sha256 if isinstance(tokenizer, Tokenizer) else tokenizer


def holds_conversations(dataset: str) -> bool:
    """Whether `find_corpus` opens this as conversations, which are packed into sequences."""
    path = Path(dataset)
    if dataset in CORPORA or holds_shards(path):
        return any(path.glob(f"*{LABELS}"))
    try:
        return hold_conversations(find_files(dataset))
    except DataError:
        return False  # and `find_corpus` says why


@contextlib.contextmanager
def _locked(root: Path, *what: str | None) -> Iterator[None]:
    """Let one process at a time prepare a corpus. A read-only ``root`` needs no lock: its corpora
    can only be opened.
    """
    if root.is_dir() and not os.access(root, os.W_OK):
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(root / f".{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}.lock"):
        yield


def holds_shards(path: Path) -> bool:
    """Whether `find_corpus` opens this as a folder of token shards."""
    return path.is_dir() and any(path.glob("*.bin"))


def template_of(corpus: Corpus) -> str | None:
    """The chat template that rendered a corpus of conversations, in Jinja; None for text."""
    file = corpus.folder / TEMPLATE_FILE
    return read_text(file, 1 << 20) if file.exists() else None


def vocabulary(corpus: Corpus) -> int:
    """The vocabulary size of a corpus's tokenizer; GPT-2's if the corpus does not name one.

    Raises:
        DataError: another tokenizer made the corpus, which cannot be read.

    """
    if corpus.tokenizer:
        return corpus.tokenizer.vocab_size
    if (corpus.folder / "meta.pkl").exists():
        raise DataError(
            f"the tokenizer of {corpus.folder} cannot be read: give its size as model.vocab_size"
        )
    return tokenizers.GPT2_IDS


def vocabulary_without_corpus(dataset: str, tokenizer: str | None) -> tuple[int, str]:
    """The vocabulary size of a corpus, as far as it is known without reading it, and its origin as
    text.

    Args:
        dataset: the option ``data.dataset``.
        tokenizer: the option ``data.tokenizer``.

    Raises:
        GptjaxError: the tokenizer does not exist or is damaged.

    """
    if (dataset, tokenizer) == ("pydoc", None):
        return PYDOC_VOCAB_SIZE, "data.dataset pydoc"
    kind, _, size = (tokenizer or "").partition(":")
    if kind in TRAINED and size.isdecimal():
        return int(size), f"data.tokenizer {tokenizer}"
    if tokenizer in (None, "char") or kind in TRAINED:
        return (
            tokenizers.GPT2_IDS,
            "GPT-2, since no corpus is read: give a corpus's own as --model.vocab_size",
        )
    if tokenizer == "gpt2":
        return tokenizers.GPT2_IDS, "data.tokenizer gpt2"
    return tokenizers.find(tokenizer).vocab_size, f"data.tokenizer {tokenizer}"


def fitted(corpus: Corpus, vocab_size: int) -> Corpus:
    """The corpus for a model of ``vocab_size`` ids, without a tokenizer if GPT-2's was only assumed
    and is too large.

    Raises:
        DataError: the tokenizer that made the corpus has more ids than the model.

    """
    if not corpus.tokenizer or corpus.tokenizer.vocab_size <= vocab_size:
        return corpus
    if not corpus.tokenizer_is_kept:
        return corpus._replace(tokenizer=None)
    raise DataError(
        f"the tokenizer of {corpus.folder} has {corpus.tokenizer.vocab_size} ids, "
        f"but model.vocab_size is {vocab_size}: raise it to at least that, or use the corpus that "
        "belongs to this model"
    )


def _open(folder: Path, tokens: int | None) -> Corpus:
    splits = []
    for split in ("train", "val"):
        paths = sorted({*folder.glob(f"{split}*.bin"), *folder.glob(f"*_{split}*.bin")})
        if not paths:
            raise DataError(
                f"{folder} has no {split}*.bin: data.dataset needs the token shards train*.bin and "
                "val*.bin"
            )
        splits.append([open_shard(path) for path in paths])
    train, val = splits
    while tokens and len(train) > 1 and sum(shard.tokens.size for shard in train[:-1]) >= tokens:
        train = train[:-1]
    return Corpus(folder, train, val, _tokenizer_of(folder), _fingerprint(train + val))


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer saved with the shards, or else GPT-2's, if it is available.

    None if there is a ``meta.pkl`` of nanoGPT: that means another vocabulary, but the file is a
    pickle and is not opened.
    """
    made_with = folder / TOKENIZER_FILE
    if not made_with.exists() and (folder / "meta.pkl").exists():
        return None
    try:
        return tokenizers.load(made_with) if made_with.exists() else tokenizers.gpt2()
    except DataError:
        return None


def _fingerprint(shards: list[Shard]) -> str:
    """SHA-256 of each shard's name, length and ids; of a long shard, only the first and last
    `HASHED_IDS`.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.tokens.size} ".encode())
        digest.update(shard.tokens[:HASHED_IDS].tobytes())
        digest.update(shard.tokens[HASHED_IDS:][-HASHED_IDS:].tobytes())
    return digest.hexdigest()
