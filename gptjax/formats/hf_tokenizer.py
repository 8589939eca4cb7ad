"""Hugging Face's ``tokenizer.json``, for byte-level BPEs whose ids are the ranks of their merges, as GPT-2's are."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import FormatError
from gptjax.files import read_text
from gptjax.formats.json_files import LARGEST, read_object
from gptjax.tokenizers import END_OF_TEXT, BytePairEncoding
from gptjax.tokenizers.bpe import PRINTABLE, printable


def write(folder: Path, tokenizer: BytePairEncoding) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``transformers``' GPT-2 tokenizer.

    Raises:
        DataError: a token is not the merge of two earlier ones.

    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {printable(token): i for i, token in enumerate(tokenizer.tokens)}
    merges = [(printable(left), printable(right)) for left, right in tokenizer.merges()]
    theirs = Tokenizer(models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    theirs.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast", **ends}, indent=2))


def read(folder: Path) -> BytePairEncoding:
    """The tokenizer in a folder's ``tokenizer.json``, or in its ``vocab.json`` and ``merges.txt``.

    Raises:
        FormatError: there is none, it is damaged, or it would not encode as this one does: no byte-level BPE whose ids are
            the ranks of its merges, with end-of-text as the last.

    """
    path = folder / "tokenizer.json"
    if path.exists():
        content = read_object(path)
        try:
            vocabulary, pairs = _of_json(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} holds no byte-level BPE that is known here: {error}") from error
    else:
        path = folder / "vocab.json"
        vocabulary = read_object(path)
        try:
            lines = read_text(folder / "merges.txt", LARGEST).splitlines()
        except (OSError, ValueError) as error:
            raise FormatError(f"{folder / 'merges.txt'} cannot be read: {error}") from error
        pairs = [line for line in lines if line and not line.startswith("#version")]
    try:
        return _checked(folder.name, vocabulary, pairs)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{path} holds no byte-level BPE that is known here: {error}") from error


def _of_json(content: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    if content.get("normalizer"):
        raise ValueError("it changes the text before it is encoded (a normalizer)")
    before = content.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space") or not before.get("use_regex", True):
        raise ValueError("it cuts text otherwise than GPT-2 does (its pre_tokenizer)")
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**content["model"]["vocab"], **added}, content["model"]["merges"]


def _checked(name: str, vocabulary: dict[str, Any], pairs: list[Any]) -> BytePairEncoding:
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in by_id] != list(range(len(by_id))) or by_id[-1] != END_OF_TEXT:
        raise ValueError(f"its ids have gaps, or {END_OF_TEXT} is not the last")
    byte = {character: b for b, character in PRINTABLE.items()}
    joined = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    if joined != [token for token in by_id[:-1] if len(token) > 1]:
        raise ValueError("its merges do not come in the order of its ids")
    return BytePairEncoding(name, tuple(bytes(byte[c] for c in token) for token in by_id[:-1]))
