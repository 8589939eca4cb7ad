"""Named corpora: the source, split and default tokenizer of each."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax import tokenizers
from gptjax.datasets.download import fetch
from gptjax.datasets.prepare import (
    TOKENIZER_FILE,
    TRAINED,
    Split,
    encode,
    folder_name,
    id_dtype,
    make_tokenizer,
    prepare_text,
    write_corpus,
)
from gptjax.datasets.text import Piece, import_arrow, pieces
from gptjax.errors import DataError
from gptjax.files import read_small, read_text, write_folder
from gptjax.formats.json_files import LARGEST
from gptjax.formats.token_shards import open_shard, write_shard
from gptjax.tokenizers import Tokenizer

PYDOC_VOCAB_SIZE = 4096
PYDOC_VAL_EVERY = 10
TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSHAKESPEARE_VAL_TOKENS = 32_768
OPENWEBTEXT_VAL_EVERY = 2000


class Request(NamedTuple):
    """A request for a named corpus."""

    root: Path
    """The folder of prepared corpora."""
    tokenizer: str | Tokenizer | None = None
    """Replaces the corpus's own; see `gptjax.datasets.prepare.make_tokenizer`."""
    tokens: int | None = None
    """Training tokens to prepare if the corpus comes in parts; None for all."""


def hub(repo: str, file: str) -> str:
    """The address of a dataset's file on the Hugging Face hub or its mirror ``HF_ENDPOINT``."""
    return f"{_hub()}/datasets/{repo}/resolve/main/{file}"


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def pydoc(request: Request) -> Path:
    """Prepare the embedded corpus: the Python language reference that CPython ships for ``help()``,
    about 0.5 MB of text.

    Every tenth topic is held out for validation. Topics quote each other, so paragraphs of held-out
    topics are removed from the training text. A byte-level BPE is trained on the training text. The
    folder is ``root/pydoc-SIZE-HASH`` with the vocabulary's size and a hash of the text, which
    differs between Python versions.

    Raises:
        DataError: this Python lacks the module ``pydoc_data.topics``.

    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks pydoc_data.topics, the text of the pydoc corpus: "
            "install Python's full standard library, or name your own text with --data.dataset"
        ) from error
    documents = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    which = request.tokenizer or f"bpe:{PYDOC_VOCAB_SIZE}"
    label = str(PYDOC_VOCAB_SIZE) if request.tokenizer is None else folder_name(which)
    folder = request.root / f"pydoc-{label}-{digest[:12]}"
    if folder.exists():
        return folder
    held_out = documents[::PYDOC_VAL_EVERY]
    quoted = {paragraph.strip() for document in held_out for paragraph in document.split("\n\n")}
    rest = (d for i, d in enumerate(documents) if i % PYDOC_VAL_EVERY)
    training = [
        "\n\n".join(p for p in document.split("\n\n") if p.strip() not in quoted)
        for document in rest
    ]
    train, val = (
        [Piece(n, document) for n, document in enumerate(split)] for split in (training, held_out)
    )
    tokenizer = make_tokenizer(which, lambda: training, lambda: train + val)
    characters = sum(map(len, documents))
    return write_corpus(
        folder,
        tokenizer,
        {"train": train, "val": val},
        characters,
        {"text": "pydoc_data.topics", "sha256": digest},
    )


def _tinyshakespeare_text(root: Path) -> Path:
    return fetch(
        TINYSHAKESPEARE_URL, root / "downloads" / "tinyshakespeare.txt", TINYSHAKESPEARE_SHA256
    )


def tinyshakespeare(request: Request) -> Path:
    """Prepare TinyShakespeare (1.1 MB), byte for byte as llm.c's ``dev/data/tinyshakespeare.py``.

    End-of-text precedes the text and follows each blank line. The first 32,768 tokens are for
    validation.
    """
    which = request.tokenizer or "gpt2"
    folder = request.root / f"tinyshakespeare-{folder_name(which)}"
    if folder.exists():
        return folder
    *begun, last = read_text(_tinyshakespeare_text(request.root), LARGEST).split("\n\n")
    documents = [
        Piece(i, text) for i, text in enumerate([*(f"{part}\n\n" for part in begun), last])
    ]
    held_out = len(documents) // 10  # covers the first 32,768 tokens; no BPE is trained on them
    tokenizer = make_tokenizer(
        which, lambda: (piece.text for piece in documents[held_out:]), lambda: documents
    )

    def write(into: Path) -> None:
        ids = np.concatenate(list(encode(tokenizer, documents)))
        val, train = np.split(ids, [TINYSHAKESPEARE_VAL_TOKENS])
        for split, part in (("train", train), ("val", val)):
            write_shard(into / f"tiny_shakespeare_{split}.bin", [part], id_dtype(tokenizer))
        tokenizer.save(into / TOKENIZER_FILE)

    return write_folder(folder, write)


def shakespeare_char(request: Request) -> Path:
    """Prepare TinyShakespeare by characters like nanoGPT's ``data/shakespeare_char``: 65 ids, the
    last tenth held out.
    """
    which = request.tokenizer or "char"
    folder = (
        request.root / f"shakespeare-char-{folder_name(which)}"
        if which != "char"
        else request.root / "shakespeare-char"
    )
    if folder.exists():
        return folder
    made = prepare_text([_tinyshakespeare_text(request.root)], request.root, "shakespeare", which)
    return made.rename(folder)


def tinystories(request: Request) -> Path:
    """Prepare TinyStories, GPT-4's version (Eldan & Li 2023; 2.2 GB), with its own validation file.

    As llama2.c and llm.c do, blanks around a story are dropped.
    """
    which = request.tokenizer or "gpt2"
    folder = (
        request.root
        / f"tinystories-{folder_name(which)}{f'-{request.tokens}' if request.tokens else ''}"
    )
    if folder.exists():
        return folder
    names: dict[Split, str] = {
        "train": "TinyStoriesV2-GPT4-train.txt",
        "val": "TinyStoriesV2-GPT4-valid.txt",
    }
    files = {
        split: fetch(hub("roneneldan/TinyStories", name), request.root / "downloads" / name)
        for split, name in names.items()
    }

    def read(split: Split) -> Iterator[Piece]:
        for number, text in pieces([files[split]]):
            if story := text.strip():  # a story is short, and so a single piece
                yield Piece(number, story)

    tokenizer = make_tokenizer(
        which,
        lambda: (p.text for p in read("train")),
        lambda: itertools.chain(read("train"), read("val")),
    )
    total = sum(path.stat().st_size for path in files.values())
    source: dict[str, object] = {"files": list(names.values())}
    return write_corpus(
        folder, tokenizer, {s: read(s) for s in names}, total, source, request.tokens
    )


def openwebtext(request: Request) -> Path:
    """Prepare OpenWebText (Gokaslan & Cohen 2019; 9.0 billion GPT-2 tokens), one Parquet file of
    the hub after the other.

    Every 2,000th document of a part is for validation, the same share as in nanoGPT.
    """
    return _parquet_corpus(
        request, "openwebtext", "Skylion007/openwebtext/parquet/plain_text/train"
    )


def fineweb(request: Request) -> Path:
    """Download FineWeb's 10-billion-token sample (Penedo et al. 2024), from modded-nanogpt's llm.c
    shards of 0.1 billion.
    """
    return _shard_corpus(request, "fineweb", "kjj0/fineweb10B-gpt2", "fineweb_{}_{:06d}.bin", 103)


def fineweb_edu(request: Request) -> Path:
    """Download FineWeb-Edu's 10-billion-token sample; see `fineweb`."""
    return _shard_corpus(
        request, "fineweb-edu", "kjj0/finewebedu10B-gpt2", "finewebedu_{}_{:06d}.bin", 99
    )


def _shard_corpus(request: Request, name: str, repo: str, pattern: str, shards: int) -> Path:
    """Download shards from the hub until they hold the requested tokens; existing ones are kept."""
    if request.tokenizer not in (None, "gpt2"):
        raise DataError(f"{name} is already tokenized with gpt2: leave data.tokenizer out")
    folder = request.root / name

    def get(split: str, number: int) -> int:
        file = pattern.format(split, number)
        return open_shard(fetch(hub(repo, file), folder / file)).tokens.size

    get("val", 0)
    _until_enough(request.tokens, (get("train", number) for number in range(1, shards + 1)))
    return folder


def _parquet_corpus(request: Request, name: str, listing: str) -> Path:
    """Tokenize each Parquet file into one shard per split, then delete the file."""
    which = request.tokenizer or "gpt2"
    if isinstance(which, str) and (which == "char" or which.partition(":")[0] in TRAINED):
        raise DataError(
            f"{name} comes in parts, so its tokenizer must already exist: train one, then name its "
            "file"
        )
    import_arrow(Path(f"{name}'s Parquet"))  # before anything is downloaded
    tokenizer = which if isinstance(which, Tokenizer) else tokenizers.find(which)
    folder = request.root / f"{name}-{folder_name(which)}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER_FILE)

    def part(number: int, url: str) -> int:
        done = folder / f"train_{number:06d}.bin"
        if not done.exists():
            _tokenize_part(url, folder, number, tokenizer)
        return open_shard(done).tokens.size

    parts = _listed(listing, folder / "parts.json")
    _until_enough(request.tokens, (part(number, url) for number, url in enumerate(parts)))
    return folder


def _until_enough(tokens: int | None, parts: Iterator[int]) -> None:
    """Make parts, each of which yields its number of tokens, until ``tokens`` are reached."""
    held = 0
    for count in parts:
        held += count
        if tokens is not None and held >= tokens:
            return


def _tokenize_part(url: str, folder: Path, number: int, tokenizer: Tokenizer) -> None:
    source = fetch(url, folder / f"part_{number:06d}.parquet")
    for split in ("val", "train"):  # train last: it marks the part as done
        kept = (
            p
            for p in pieces([source])
            if (p.document % OPENWEBTEXT_VAL_EVERY == 0) == (split == "val")
        )
        write_shard(
            folder / f"{split}_{number:06d}.bin", encode(tokenizer, kept), id_dtype(tokenizer)
        )
    source.unlink()


def _listed(listing: str, kept: Path) -> list[str]:
    """The addresses of a dataset's Parquet files, from the hub's API; cached in ``kept``."""
    fetch(f"{_hub()}/api/datasets/{listing}", kept)
    try:
        addresses = json.loads(read_small(kept, LARGEST))
        if (
            not addresses
            or not isinstance(addresses, list)
            or not all(isinstance(x, str) for x in addresses)
        ):
            raise ValueError("it is empty or holds something else")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{kept} should list the addresses of Parquet files, but {error}: remove it and try "
            "again"
        ) from error
    return addresses


CORPORA: dict[str, Callable[[Request], Path]] = {
    "pydoc": pydoc,
    "tinyshakespeare": tinyshakespeare,
    "shakespeare-char": shakespeare_char,
    "tinystories": tinystories,
    "openwebtext": openwebtext,
    "fineweb": fineweb,
    "fineweb-edu": fineweb_edu,
}
