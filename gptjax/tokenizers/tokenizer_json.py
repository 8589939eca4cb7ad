"""Read and write Hugging Face's ``tokenizer.json``, and read the older ``vocab.json`` and
``merges.txt``: byte-level BPEs like GPT-2's.

If the ids are the ranks of the merges and each token is the merge of two earlier ones, merging by
lowest rank gives the same ids, and the result is a `BytePairEncoding`. Any other tokenizer is run
by the library itself; see `HuggingFace`.
"""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import DataError, FormatError
from gptjax.files import read_text
from gptjax.formats.json_files import LARGEST, read_object
from gptjax.tokenizers.bpe import BytePairEncoding, printable
from gptjax.tokenizers.hugging_face import HuggingFace, canonical
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
BAD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def can_write(tokenizer: Tokenizer | None) -> bool:
    """Whether `write` supports this tokenizer."""
    return isinstance(tokenizer, BytePairEncoding | HuggingFace)


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``transformers``.

    Raises:
        DataError: a token is not the merge of two earlier ones.
        TypeError: see `can_write`.

    """
    if isinstance(tokenizer, HuggingFace):
        (folder / FILE).write_text(
            json.dumps(json.loads(tokenizer.source), indent=2, ensure_ascii=False), "utf-8"
        )
        end = tokenizer.end_of_text
        ends = {} if end is None else {"eos_token": tokenizer.library.id_to_token(end)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    elif isinstance(tokenizer, BytePairEncoding):
        _library_of(tokenizer).save(str(folder / FILE))
        ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2TokenizerFast", **ends}
    else:
        raise TypeError(f"a {tokenizer.kind} tokenizer cannot be written as Hugging Face's {FILE}")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _library_of(tokenizer: BytePairEncoding) -> Any:
    from tokenizers import AddedToken, Tokenizer, models

    vocabulary = {printable(token): i for i, token in enumerate(tokenizer.tokens)}
    merges = [(printable(left), printable(right)) for left, right in tokenizer.merges()]
    theirs = _byte_level(Tokenizer(models.BPE(vocabulary, merges)))
    theirs.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return theirs


def _byte_level(theirs: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    return theirs


def read(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in a folder, or the folder's ``vocab.json`` and
    ``merges.txt``.

    End-of-text is the ``eos_token`` of ``tokenizer_config.json`` in the same folder, or else
    ``<|endoftext|>`` if the vocabulary has it.

    Raises:
        FormatError: there is none, it is damaged, or it cannot be run as the library does.

    """
    folder, path = (path, path / FILE) if path.is_dir() else (path.parent, path)
    if path.exists():
        content = read_object(path)
    else:
        content, path = _of_two_files(folder), folder / "vocab.json"
    try:
        return _checked(folder.name, content, _named_end(folder))
    except BAD as error:
        raise FormatError(f"{path} is not a supported byte-level BPE: {error}") from error


def _of_two_files(folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models

    vocabulary = read_object(folder / "vocab.json")
    try:
        lines = read_text(folder / "merges.txt", LARGEST).split("\n")
        pairs: Any = [
            tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
        ]
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / 'merges.txt'} cannot be read: {error}") from error
    try:
        content: dict[str, Any] = json.loads(
            _byte_level(Tokenizer(models.BPE(vocabulary, pairs))).to_str()
        )
    except Exception as error:  # the library raises no narrower one
        raise FormatError(
            f"{folder / 'vocab.json'} is not a supported byte-level BPE: {error}"
        ) from error
    return content


def _named_end(folder: Path) -> str | None:
    """The folder's end-of-text, or None."""
    config = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    named = config.get("eos_token")
    end = named.get("content") if isinstance(named, dict) else named
    if end is not None and not isinstance(end, str):
        raise ValueError(f"the eos_token of {CONFIG_FILE} is not text")
    return end


def _checked(name: str, content: dict[str, Any], end: str | None) -> Tokenizer:
    added = {token["content"] for token in content.get("added_tokens") or []}
    if end is None and END_OF_TEXT in added | set(content["model"]["vocab"]):
        end = END_OF_TEXT
    found = HuggingFace(name, *canonical(content, end))
    return _as_ranks(found) or found


def _as_ranks(found: HuggingFace) -> BytePairEncoding | None:
    """The same tokenizer as ranks of merges; None if it cannot be expressed so.

    If merging a token's bytes by all lower ranks leaves exactly its listed pair, no other pair can
    ever merge to it.
    """
    content = json.loads(found.source)
    added = [token["content"] for token in content["added_tokens"]]
    if added != [END_OF_TEXT] or found.end_of_text != found.vocab_size - 1:
        return None
    try:
        ranks = BytePairEncoding(found.name, found.pieces[:-1])
        same = [(printable(a), printable(b)) for a, b in ranks.merges()] == [
            tuple(p) for p in content["model"]["merges"]
        ]
    except (ValueError, DataError):
        return None
    return ranks if same else None
