"""Tokenizers: text <-> token ids, behind one small interface.

`gpt2`, `byte`, `train_bpe` and llm.c's files give a `BytePairEncoding`, run by tiktoken.
`train_characters` gives `Characters`, llama2.c's ``tokenizer.bin`` a `Llama2c`, a ``.model``
or `train_sentencepiece` a `SentencePiece`. Any other ``tokenizer.json`` of Hugging Face gives a
`HuggingFace`, run by Hugging Face's own library. Each is saved as a JSON file next to the data made
with it, so that ids can always be decoded.
"""

import base64
import json
import os
from pathlib import Path

from gptjax.errors import DataError, FormatError
from gptjax.files import read_small
from gptjax.formats import gguf, llama2c_tokenizer, llmc_tokenizer
from gptjax.formats.recognise import LLAMA2C_TOKENIZER, SENTENCEPIECE, recognise
from gptjax.tokenizers import ggml, tokenizer_json
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
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer, as_text
from gptjax.tokenizers.llama2c import Llama2c
from gptjax.tokenizers.sentencepiece import SentencePiece, train_sentencepiece
from gptjax.tokenizers.tokenizer_json import from_sentencepiece

FILE = "tokenizer.json"  # a tokenizer's name in the folder of a run or a corpus
LARGEST_FILE = 1 << 28  # bytes
KINDS = ("bpe", "char", "hf", "llama2c", "sentencepiece")

__all__ = [
    "END_OF_TEXT",
    "FILE",
    "GPT2_IDS",
    "GPT2_PATTERN",
    "BytePairEncoding",
    "Characters",
    "HuggingFace",
    "Llama2c",
    "SentencePiece",
    "Tokenizer",
    "as_text",
    "byte",
    "find",
    "from_llama2c",
    "from_llmc",
    "from_sentencepiece",
    "gpt2",
    "is_gpt2",
    "load",
    "printable",
    "train_bpe",
    "train_characters",
    "train_sentencepiece",
]


def find(which: str | os.PathLike[str]) -> Tokenizer:
    """Find a tokenizer by name or path.

    Args:
        which: ``gpt2``; ``byte``; a file that `Tokenizer.save` wrote; a ``tokenizer.json`` of
            Hugging Face; a SentencePiece ``.model``; llm.c's ``gpt2_tokenizer.bin``; llama2.c's
            ``tokenizer.bin``; a GGUF file; or the folder of a run, a corpus or a model with a
            ``tokenizer.json``.

    Raises:
        DataError: there is no such tokenizer, or GPT-2's is not available (see `gpt2`), or a
            package is missing.
        FormatError: the file is damaged, or in another format.

    """
    if which in ("gpt2", "byte"):
        return gpt2() if which == "gpt2" else byte()
    path = Path(which) / FILE if Path(which).is_dir() else Path(which)
    if not path.exists():
        raise DataError(
            f"there is no tokenizer {path}: name gpt2, byte, or a file or folder with {FILE}"
        )
    if llmc_tokenizer.is_tokenizer(path):
        return from_llmc(path)
    if gguf.is_file(path):
        return ggml.from_fields(path, gguf.read_file(path).fields)
    readers = {LLAMA2C_TOKENIZER: from_llama2c, SENTENCEPIECE: from_sentencepiece}
    return readers.get(recognise(path) or "", load)(path)


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether its ids are GPT-2's; only their number is compared if GPT-2's vocabulary is not
    available (see `gpt2`).
    """
    try:
        return tokenizer.vocab_size == GPT2_IDS and tokenizer.same_as(gpt2())
    except DataError:
        return True


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a file that `Tokenizer.save` wrote, also one without a kind, or a ``tokenizer.json`` of
    Hugging Face.

    Raises:
        FormatError: the file is missing, or not such a file.
        DataError: it only names GPT-2's vocabulary, which is not available (see `gpt2`).

    """
    try:
        content = json.loads(read_small(path, LARGEST_FILE))
        if "model" in content and "kind" not in content:
            return tokenizer_json.read(Path(path))
        kind = content.get("kind") or ("char" if "characters" in content else "bpe")
        name = content["name"]
        if not isinstance(name, str) or kind not in KINDS:
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
        if kind == "sentencepiece":
            return SentencePiece(base64.b64decode(content["model"], validate=True), name)
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
            raise FormatError(f"{path} is {found}, not a tokenizer") from error
        raise FormatError(
            f"{path} is not a gptjax tokenizer file ({str(error)[:200]}): "
            "make one with python -m gptjax.tokenizers train, or remove this one so that it is "
            "made again"
        ) from error


def from_llmc(path: str | os.PathLike[str]) -> BytePairEncoding:
    """Read llm.c's ``gpt2_tokenizer.bin``, whose ids are the ranks of the merges.

    Raises:
        FormatError: see `gptjax.formats.llmc_tokenizer.read_tokenizer`; or it is not a byte-level
            BPE with end-of-text as its last token.

    """
    tokens, end_of_text = llmc_tokenizer.read_tokenizer(path)
    if end_of_text != len(tokens) - 1 or tokens[-1] != END_OF_TEXT.encode():
        raise FormatError(
            f"{path} has end-of-text at {end_of_text} of {len(tokens)} tokens, and the last token "
            f"is {tokens[-1]!r}, not {END_OF_TEXT}"
        )
    try:
        found = BytePairEncoding(Path(path).stem, tuple(tokens[:-1]))
        # Ids must be in the order of the merges, or text would be encoded differently
        found.merges()
        return found
    except (ValueError, DataError) as error:
        raise FormatError(f"{path} is not a byte-level BPE: {error}") from error


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
