"""Tokenizers: text <-> token ids, behind one small interface.

`gpt2`, `byte`, `train_bpe` and llm.c's files give a `BytePairEncoding`, which tiktoken runs;
`train_characters` gives `Characters`, llama2.c's ``tokenizer.bin`` a `Llama2c`; a
``tokenizer.json`` of Hugging Face's that is no such encoding a `HuggingFace`, which its own library
runs. Each is saved as one JSON file beside what was made with it, so that ids can be decoded
wherever they turn up.
"""

import base64
import json
import os
from pathlib import Path

from gptjax.errors import DataError, FormatError
from gptjax.files import read_small
from gptjax.formats import llama2c_tokenizer, llmc_tokenizer
from gptjax.formats.recognise import LLAMA2C_TOKENIZER, recognise
from gptjax.tokenizers import tokenizer_json
from gptjax.tokenizers.bpe import (
    GPT2_IDS,
    GPT2_PATTERN,
    BytePairEncoding,
    byte,
    gpt2,
    printable,
    train_bpe,
)
from gptjax.tokenizers.characters import Characters, train_characters
from gptjax.tokenizers.hugging_face import HuggingFace
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer
from gptjax.tokenizers.llama2c import Llama2c

FILE = "tokenizer.json"  # a tokenizer's name in the folder of a run or a corpus
LARGEST_FILE = 1 << 28  # bytes

__all__ = [
    "END_OF_TEXT",
    "FILE",
    "GPT2_IDS",
    "GPT2_PATTERN",
    "BytePairEncoding",
    "Characters",
    "HuggingFace",
    "Llama2c",
    "Tokenizer",
    "byte",
    "find",
    "from_llama2c",
    "from_llmc",
    "gpt2",
    "is_gpt2",
    "load",
    "printable",
    "train_bpe",
    "train_characters",
]


def find(which: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that a word or a path stands for.

    Args:
        which: ``gpt2``; ``byte``; a file that `Tokenizer.save` wrote; a ``tokenizer.json`` of
            Hugging Face's; llm.c's ``gpt2_tokenizer.bin``; llama2.c's ``tokenizer.bin``; or a
            folder that holds a ``tokenizer.json``, of a run, a corpus or a model.

    Raises:
        DataError: there is no such tokenizer, or GPT-2's cannot be had (see `gpt2`).
        FormatError: the file is damaged, or of another kind.

    """
    if which in ("gpt2", "byte"):
        return gpt2() if which == "gpt2" else byte()
    path = Path(which) / FILE if Path(which).is_dir() else Path(which)
    if not path.exists():
        raise DataError(
            f"there is no tokenizer {path}: gpt2, byte, or a file or a folder with {FILE} is "
            "expected"
        )
    if llmc_tokenizer.is_tokenizer(path):
        return from_llmc(path)
    return from_llama2c(path) if recognise(path) == LLAMA2C_TOKENIZER else load(path)


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether its ids are GPT-2's; judged by their number alone where GPT-2's vocabulary cannot be
    had (see `gpt2`).
    """
    try:
        return tokenizer.vocab_size == GPT2_IDS and tokenizer.same_as(gpt2())
    except DataError:
        return True


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read what `Tokenizer.save` wrote, also before it wrote the kind; or a ``tokenizer.json`` of
    Hugging Face's.

    Raises:
        FormatError: missing, or not such a file.
        DataError: it only names GPT-2's vocabulary, which is neither cached nor to be had (see
            `gpt2`).

    """
    try:
        content = json.loads(read_small(path, LARGEST_FILE))
        if "model" in content and "kind" not in content:
            return tokenizer_json.read(Path(path))
        kind = content.get("kind") or ("char" if "characters" in content else "bpe")
        name = content["name"]
        if not isinstance(name, str) or kind not in ("bpe", "char", "hf", "llama2c"):
            raise ValueError(f"its kind is {str(kind)[:20]!r}, its name {str(name)[:20]!r}")
        if kind == "char":
            return Characters(content["characters"], name)
        if kind == "hf":
            return HuggingFace(
                name,
                json.dumps(content["tokenizer"]),
                content["end_of_text"],
                content.get("begin_of_text"),
            )
        if name == "gpt2" and "tokens" not in content:
            return gpt2()
        tokens = tuple(base64.b64decode(token, validate=True) for token in content["tokens"])
        if kind == "llama2c":
            return Llama2c(tokens, tuple(map(float, content["scores"])), name)
        return BytePairEncoding(name, tokens)
    except OSError as error:
        raise FormatError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if found := recognise(Path(path)):
            raise FormatError(f"{path} is {found}, not a tokenizer that is read here") from error
        raise FormatError(
            f"{path} is not a gptjax tokenizer file ({str(error)[:200]}): "
            "make one with python -m gptjax.tokenizers train, or remove this one to have it made "
            "again"
        ) from error


def from_llmc(path: str | os.PathLike[str]) -> BytePairEncoding:
    """The tokenizer in llm.c's ``gpt2_tokenizer.bin``, whose ids are the ranks of the merges.

    Raises:
        FormatError: see `gptjax.formats.llmc_tokenizer.read_tokenizer`; or it is no byte-level BPE
            with end-of-text last.

    """
    tokens, end_of_text = llmc_tokenizer.read_tokenizer(path)
    if end_of_text != len(tokens) - 1 or tokens[-1] != END_OF_TEXT.encode():
        raise FormatError(
            f"{path} has end-of-text at {end_of_text} of {len(tokens)} tokens, and last "
            f"{tokens[-1]!r}: "
            f"{END_OF_TEXT} is expected to be the last"
        )
    try:
        found = BytePairEncoding(Path(path).stem, tuple(tokens[:-1]))
        # Ids of another order than the merges' would be encoded otherwise than by what made them
        found.merges()
        return found
    except (ValueError, DataError) as error:
        raise FormatError(f"{path} holds no byte-level BPE: {error}") from error


def from_llama2c(path: str | os.PathLike[str]) -> Llama2c:
    """The tokenizer in llama2.c's ``tokenizer.bin``.

    Raises:
        FormatError: see `gptjax.formats.llama2c_tokenizer.read_tokenizer`.

    """
    tokens, scores = llama2c_tokenizer.read_tokenizer(path)
    try:
        return Llama2c(tuple(tokens), tuple(scores), Path(path).stem)
    except ValueError as error:
        raise FormatError(f"{path} holds no vocabulary of llama2.c: {error}") from error
