"""Tokenizers in the metadata of GGUF files, under ``tokenizer.ggml.``.

``gpt2`` names a byte-level BPE: its tokens, merges, and kind of pre-tokenizer. It becomes a
``tokenizer.json`` of Hugging Face's, which the library ``tokenizers`` runs. ``llama`` names a BPE
by scores, as llama2.c's, with U+2581 for a space.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import ConfigError, FormatError
from gptjax.formats.llama2c_tokenizer import BEGIN, END, FIRST_BYTE, FIRST_TEXT, UNKNOWN
from gptjax.tokenizers.bpe import LARGEST, BytePairEncoding, printable
from gptjax.tokenizers.hugging_face import (
    BYTE_LEVEL,
    IGNORES_MERGES,
    PRE_TOKENIZERS,
    HuggingFace,
    pre_tokenizer_of,
)
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer
from gptjax.tokenizers.llama2c import CONTROL_TEXTS, CONTROLS, Llama2c, scored
from gptjax.tokenizers.sentencepiece import SentencePiece
from gptjax.tokenizers.space_first import SPACE
from gptjax.tokenizers.tokenizer_json import from_scores, to_scores

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NONE = {"none", "no_vocab"}
NORMAL, UNKNOWN_KIND, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens


def chat_template(fields: Mapping[str, Any]) -> str | None:
    """A file's template of a conversation."""
    found = fields.get(TEMPLATE)
    return found if isinstance(found, str) else None


def from_fields(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a file's metadata describe.

    Raises:
        FormatError: there is none, it is damaged, or of a kind that is not read here.

    """
    model = fields.get(f"{PREFIX}model", "none")
    if model in NONE:
        raise FormatError(f"{path} holds no tokenizer")
    if model == "llama":
        return _by_scores(path, fields)
    pre = fields.get(f"{PREFIX}pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise FormatError(
            f"{path} has a tokenizer of kind {model!r} with the pre-tokenizer {pre!r}, but "
            f"'llama', or 'gpt2' with {' or '.join(PRE_TOKENIZERS)}, is expected"
        )
    tokens, merges = (_texts(path, fields, name) for name in ("tokens", "merges"))
    kinds = _numbers(path, fields, "token_type", len(tokens))
    begin, end = (_id(path, fields, name, len(tokens)) for name in ("bos", "eos"))
    special = {*np.flatnonzero(kinds == CONTROL).tolist(), *([] if end is None else [end])}
    added = [
        {
            "id": i,
            "content": tokens[i],
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": i in special,
        }
        for i in sorted(special.union(np.flatnonzero(kinds == USER_DEFINED).tolist()))
    ]
    # All settings, in the order in which the library itself writes them
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in IGNORES_MERGES,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    # llama.cpp's default depends on the pre-tokenizer
    begins = begin if fields.get(f"{PREFIX}add_bos_token", pre == "llama-bpe") is True else None
    try:
        known = {"parsed": content}
        return HuggingFace(path.stem, json.dumps(content), end, begins, known=known)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{path} holds no byte-level BPE that is known here: {error}") from error


def _by_scores(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of kind ``llama``: llama2.c's, maybe with more special tokens after its own.

    Those are special even if the file calls them the user's: a template gives them, a text does
    not.
    """
    tokens = _texts(path, fields, "tokens")
    scores = _numbers(path, fields, "scores", len(tokens))
    kinds = _numbers(path, fields, "token_type", len(tokens))
    expected = {
        "bos_token_id": (BEGIN, None),
        "add_bos_token": (True, None),
        "add_eos_token": (False, None),
        "add_space_prefix": (True, None),
    }
    for name, values in expected.items():
        if fields.get(f"{PREFIX}{name}") not in values:
            raise FormatError(
                f"{path} has {PREFIX}{name} {fields[f'{PREFIX}{name}']!r}, but {values[0]!r} is "
                "expected"
            )
    number = int(np.flatnonzero(kinds != UNUSED).max(initial=-1)) + 1
    odd = np.flatnonzero(kinds[FIRST_TEXT:number] != NORMAL)
    own = FIRST_TEXT + int(odd[0]) if odd.size else number
    added = tokens[own:number]  # without padding
    if not np.isin(kinds[own:number], (CONTROL, USER_DEFINED)).all():
        raise FormatError(
            f"{path} has the special token {added[0]!r} among others, but a tokenizer of kind "
            "'llama' is read with special tokens at its begin and end alone"
        )
    texts = [token.replace(SPACE, " ").encode() for token in tokens[FIRST_BYTE:own]]
    end = _id(path, fields, "eos", number)
    try:
        found = Llama2c((*CONTROL_TEXTS, *texts), tuple(scores[:own].tolist()), path.stem)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path} holds no tokenizer that is known here: {error}") from error
    if not added and end in (END, None):
        return found
    more = from_scores(found, added, "</s>" if end in (END, None) else tokens[end])
    if not more:
        raise FormatError(
            f"{path} adds special tokens, as {added[0]!r}, to tokens that are no list of merges: "
            "name the tokenizer.json that belongs to it"
        )
    return more


def _numbers(path: Path, fields: Mapping[str, Any], name: str, number: int) -> np.ndarray:
    found = fields.get(f"{PREFIX}{name}")
    if not isinstance(found, np.ndarray) or found.size != number:
        raise FormatError(f"{path} has no {PREFIX}{name} of its {number} tokens")
    return found


def _texts(path: Path, fields: Mapping[str, Any], name: str) -> list[str]:
    found = fields.get(f"{PREFIX}{name}")
    if not isinstance(found, list) or not 1 <= len(found) <= LARGEST:
        raise FormatError(f"{path} has no usable {PREFIX}{name}")
    return found


def _id(path: Path, fields: Mapping[str, Any], name: str, number: int) -> int | None:
    found = fields.get(f"{PREFIX}{name}_token_id")
    if found is None:
        return None
    if not isinstance(found, int) or not 0 <= found < number:
        raise FormatError(f"{path} has {PREFIX}{name}_token_id {found!r} of {number} tokens")
    return found


def can_write(tokenizer: Tokenizer | None) -> bool:
    """Whether `fields_of` describes this tokenizer."""
    return _describable(tokenizer) is not None


def _describable(tokenizer: Tokenizer | None) -> BytePairEncoding | HuggingFace | Llama2c | None:
    """The tokenizer as one of a kind that GGUF has, or None."""
    if isinstance(tokenizer, SentencePiece):
        try:
            return _describable(scored(tokenizer))
        except ConfigError:
            return None
    if isinstance(tokenizer, HuggingFace):
        return tokenizer if _pre_tokenizer(tokenizer) or to_scores(tokenizer) else None
    if isinstance(tokenizer, Llama2c):
        joined = b"".join(tokenizer.tokens)
        return tokenizer if joined.decode(errors="ignore").encode() == joined else None
    return tokenizer if isinstance(tokenizer, BytePairEncoding) else None


def _pre_tokenizer(tokenizer: HuggingFace) -> str | None:
    """llama.cpp's name of how it cuts text into words; None if it merges otherwise than that."""
    content = tokenizer.parsed
    name = pre_tokenizer_of(content)
    whole_words = bool(content["model"].get("ignore_merges"))
    return name if whole_words == (name in IGNORES_MERGES) else None


def fields_of(
    tokenizer: Tokenizer | None, vocab_size: int, template: str | None = None
) -> dict[str, Any]:
    """Metadata for `gptjax.formats.gguf.write_model`.

    Args:
        tokenizer: the model's; one that `can_write` does not know is left out.
        vocab_size: the model's; unused tokens are added up to that.
        template: the model's template of a conversation.

    """
    templates = {TEMPLATE: template} if template else {}
    tokenizer = _describable(tokenizer)
    if not tokenizer:
        return {f"{PREFIX}model": "none", **templates}
    if isinstance(tokenizer, Llama2c):
        return _fields_by_scores(tokenizer, vocab_size) | templates
    if isinstance(tokenizer, HuggingFace) and (by_scores := to_scores(tokenizer)):
        ends = {"eos_token_id": tokenizer.end_of_text}
        return (
            _fields_by_scores(by_scores[0], vocab_size, by_scores[1]) | _prefixed(ends) | templates
        )
    if isinstance(tokenizer, BytePairEncoding):
        pre, special = "gpt-2", {END_OF_TEXT: tokenizer.end_of_text}
        tokens = [*map(printable, tokenizer.tokens), END_OF_TEXT]
        pairs = [(printable(left), printable(right)) for left, right in tokenizer.merges()]
        users: dict[str, int] = {}
    else:
        pre = _pre_tokenizer(tokenizer) or ""
        content = tokenizer.parsed
        added = {token["content"]: token for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"] | {t: token["id"] for t, token in added.items()}
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        special = {text: token["id"] for text, token in added.items() if token["special"]}
        users = {text: token["id"] for text, token in added.items() if not token["special"]}
        pairs = content["model"]["merges"]
    tokens, kinds = _padded(tokens, vocab_size)
    kinds[list(special.values())] = CONTROL
    kinds[list(users.values())] = USER_DEFINED
    begin, end = tokenizer.begin_of_text, tokenizer.end_of_text
    ids = {"bos_token_id": end if begin is None else begin, "eos_token_id": end}
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [f"{left} {right}" for left, right in pairs],
        "add_bos_token": begin is not None,
        "add_space_prefix": False,
        **ids,
    }
    return _prefixed(fields) | templates


def _prefixed(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in fields.items() if value is not None}


def _padded(tokens: list[str], vocab_size: int) -> tuple[list[str], np.ndarray]:
    """The tokens up to the model's number, and the kind of each."""
    kinds = np.full(vocab_size, NORMAL, "<i4")
    kinds[len(tokens) :] = UNUSED
    return tokens + [f"[PAD{i}]" for i in range(len(tokens), vocab_size)], kinds


def _fields_by_scores(
    tokenizer: Llama2c, vocab_size: int, added: Sequence[str] = ()
) -> dict[str, Any]:
    texts = [token.decode().replace(" ", SPACE) for token in tokenizer.tokens[FIRST_BYTE:]]
    tokens, kinds = _padded([*CONTROLS, *texts, *added], vocab_size)
    kinds[UNKNOWN] = UNKNOWN_KIND
    kinds[[BEGIN, END, *range(tokenizer.vocab_size, tokenizer.vocab_size + len(added))]] = CONTROL
    kinds[FIRST_BYTE:FIRST_TEXT] = BYTE
    scores = np.zeros(vocab_size, "<f4")
    scores[: len(tokenizer.scores)] = tokenizer.scores
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "unknown_token_id": UNKNOWN,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }
    return _prefixed(fields)
