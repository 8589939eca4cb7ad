"""Corpora: a name, a folder of token shards, or your own text -> shards of train and val, and the
tokenizer that made them.
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
from gptjax.datasets.named import CORPORA, Wanted
from gptjax.datasets.prepare import TOKENIZER_FILE, TRAINED, prepare_text
from gptjax.datasets.text import find_files
from gptjax.errors import DataError
from gptjax.files import alone
from gptjax.formats.token_shards import Shard, open_shard
from gptjax.tokenizers import Tokenizer

HASHED_IDS = 1 << 23  # from each end of a shard

__all__ = [
    "CORPORA",
    "TOKENIZER_FILE",
    "Corpus",
    "find_corpus",
    "fitted",
    "holds_shards",
    "vocabulary",
    "vocabulary_without_corpus",
]


class Corpus(NamedTuple):
    """Opened shards and, where known, the tokenizer that made them."""

    folder: Path
    train: list[Shard]
    val: list[Shard]
    tokenizer: Tokenizer | None
    sha256: str

    @property
    def tokenizer_is_kept(self) -> bool:
        """Whether the folder says what made its ids; otherwise GPT-2's vocabulary is assumed."""
        return (self.folder / TOKENIZER_FILE).exists()


def find_corpus(
    dataset: str,
    root: str | os.PathLike[str],
    tokenizer: str | None = None,
    column: str | None = None,
    tokens: int | None = None,
) -> Corpus:
    """Open a corpus, making it first where it is a named one, or text, that is not yet under
    ``root``.

    Args:
        dataset: a name in `CORPORA`; a folder of token shards, ``train*.bin`` and ``val*.bin``
            (also ``*_train*.bin``, as llm.c names them), with the ``tokenizer.json`` that made them
            if it is not GPT-2's; or text: a file, a folder or a glob pattern, see
            `gptjax.datasets.text`.
        root: the folder that prepared corpora live in.
        tokenizer: what text is tokenized with, see `gptjax.datasets.prepare.make_tokenizer`; None
            for gpt2, or a named corpus's own.
        column: of JSON lines and Parquet, the one that holds the text.
        tokens: how many training tokens of a named corpus that comes in parts are enough; None for
            all.

    Raises:
        DataError: no such corpus, or it cannot be had or made.
        FormatError: a shard or a text file is damaged.

    """
    if tokens is not None and tokens < 1:
        raise DataError(
            f"{tokens} training tokens are asked for: give at least 1, or nothing for all"
        )
    path, root = Path(dataset), Path(root)
    if dataset in CORPORA:
        with _alone(root, dataset, tokenizer):
            made = CORPORA[dataset](Wanted(root, tokenizer, tokens))
        return _open(made, tokens)
    if holds_shards(path):
        found = _open(path, tokens)
        return found._replace(tokenizer=tokenizers.find(tokenizer)) if tokenizer else found
    if not path.exists() and not set(dataset) & set("*?["):
        near = difflib.get_close_matches(dataset, CORPORA, 1)
        raise DataError(
            f"data.dataset {dataset} is no file or folder, nor one of {', '.join(CORPORA)}"
            + (f": did you mean {near[0]}?" if near else "")
        )
    name = re.sub(r"\W+", "-", path.name.split(".")[0]).strip("-") or "text"
    files = find_files(dataset)
    with _alone(root, *map(str, files), tokenizer, column):
        made = prepare_text(files, root, name, tokenizer or "gpt2", column)
    return _open(made, tokens)


@contextlib.contextmanager
def _alone(root: Path, *what: str | None) -> Iterator[None]:
    """Let one process at a time prepare a corpus. Where nothing can be written, all there is to do
    is to look.
    """
    if root.is_dir() and not os.access(root, os.W_OK):
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    with alone(root / f".{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}.lock"):
        yield


def holds_shards(path: Path) -> bool:
    """Whether `find_corpus` takes this for a folder of token shards."""
    return path.is_dir() and any(path.glob("*.bin"))


def vocabulary(corpus: Corpus) -> int:
    """How many ids the tokenizer has that made a corpus: GPT-2's number where the corpus does not
    say.

    Raises:
        DataError: another tokenizer made it, which nothing here can read.

    """
    if corpus.tokenizer:
        return corpus.tokenizer.vocab_size
    if (corpus.folder / "meta.pkl").exists():
        raise DataError(
            f"{corpus.folder} does not say how many ids its tokenizer has: give model.vocab_size"
        )
    return tokenizers.GPT2_IDS


def vocabulary_without_corpus(tokenizer: str | None) -> tuple[int, str]:
    """How many ids ``data.tokenizer`` has, as far as that is known before there is a corpus, and
    whose they are, in words.

    Raises:
        GptjaxError: it names no tokenizer, or a damaged one.

    """
    kind, _, size = (tokenizer or "").partition(":")
    if kind in TRAINED and size.isdecimal():
        return int(size), f"data.tokenizer {tokenizer}"
    if tokenizer in (None, "char") or kind in TRAINED:
        return tokenizers.GPT2_IDS, "GPT-2 (no corpus is read; model.vocab_size sets another)"
    if tokenizer == "gpt2":
        return tokenizers.GPT2_IDS, "data.tokenizer gpt2"
    return tokenizers.find(tokenizer).vocab_size, f"data.tokenizer {tokenizer}"


def fitted(corpus: Corpus, vocab_size: int) -> Corpus:
    """The corpus for a model of ``vocab_size`` ids: without a tokenizer where GPT-2's was assumed,
    and made no such ids.

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
                f"{folder} holds no {split}*.bin: data.dataset needs train*.bin and val*.bin "
                "token shards"
            )
        splits.append([open_shard(path) for path in paths])
    train, val = splits
    while tokens and len(train) > 1 and sum(shard.tokens.size for shard in train[:-1]) >= tokens:
        train = train[:-1]
    return Corpus(folder, train, val, _tokenizer_of(folder), _fingerprint(train + val))


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    """The one that is saved with the shards, or else GPT-2's, if it can be had.

    None with nanoGPT's ``meta.pkl``: then another vocabulary made them, but that file is a pickle
    and is not opened.
    """
    made_with = folder / TOKENIZER_FILE
    if not made_with.exists() and (folder / "meta.pkl").exists():
        return None
    try:
        return tokenizers.load(made_with) if made_with.exists() else tokenizers.gpt2()
    except DataError:
        return None


def _fingerprint(shards: list[Shard]) -> str:
    """SHA-256 over each shard's name, length and ids; of a very long one, the first and last
    `HASHED_IDS` alone.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.tokens.size} ".encode())
        digest.update(shard.tokens[:HASHED_IDS].tobytes())
        digest.update(shard.tokens[HASHED_IDS:][-HASHED_IDS:].tobytes())
    return digest.hexdigest()
