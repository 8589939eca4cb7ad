"""Tokenizers that Hugging Face's ``tokenizers`` runs, because ranks of merges cannot express
them.
"""

import dataclasses
import functools
import json
import re
from typing import Any

from gptjax.errors import DataError
from gptjax.tokenizers.bpe import LARGEST, PRINTABLE
from gptjax.tokenizers.interface import Tokenizer

BYTES = {character: byte for byte, character in PRINTABLE.items()}
FILE_SETTINGS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
}
FILE_SETTINGS |= {"decoder", "model"}
MODEL_SETTINGS = {
    "type",
    "vocab",
    "merges",
    "unk_token",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "dropout",
}
MODEL_SETTINGS |= {"continuing_subword_prefix", "end_of_word_suffix"}


@dataclasses.dataclass(frozen=True)
class HuggingFace(Tokenizer):
    """A byte-level BPE in a ``tokenizer.json``: merges and ids in any order, added tokens,
    ``ignore_merges``.

    As in the library, text may contain added tokens, but never special ones. Settings under which
    encoding text in parts, or decoding ids one by one, would give another result are rejected.

    Raises:
        ValueError: the library cannot read it, or it has such a setting; the message names it.

    """

    name: str
    source: str
    """The content of ``tokenizer.json``, as `canonical` returns it."""
    end_of_text: int | None = None
    begin_of_text: int | None = None
    kind = "hf"

    def __post_init__(self) -> None:
        content = json.loads(self.source)
        check(content)
        for token in content["added_tokens"]:
            text = token["content"]
            if _bytes_of(text) != text.encode():
                raise ValueError(f"its added token {text!r} would be decoded as different text")
            if not token["special"] and (token["rstrip"] or re.search(r"\S\s", text)):
                raise ValueError(
                    f"its added token {text!r} spans blanks, where long texts may be cut"
                )
        if self.end_of_text is not None:
            if not 0 <= self.end_of_text < self.vocab_size:
                raise ValueError(
                    f"its end-of-text is {self.end_of_text}, but it has {self.vocab_size} ids"
                )
            end = self.library.id_to_token(self.end_of_text)
            if end in map("".join, content["model"]["merges"]) or self.end_of_text in self._ids(
                end
            ):
                raise ValueError(
                    f"its end-of-text {end!r} is not a special token, so text could contain it"
                )

    @functools.cached_property
    def library(self) -> Any:
        """The tokenizer object of ``tokenizers``."""
        found = read_library(self.source)
        found.encode_special_tokens = True  # as the text that they are
        return found

    def __reduce__(self) -> tuple[object, ...]:
        return HuggingFace, (self.name, self.source, self.end_of_text, self.begin_of_text)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """See `Tokenizer`."""
        added = json.loads(self.source)["added_tokens"]
        return {token["content"]: token["id"] for token in added if token["special"]}

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        vocabulary = self.library.get_vocab()
        return tuple(map(_bytes_of, sorted(vocabulary, key=vocabulary.__getitem__)))

    @functools.cached_property
    def _missing(self) -> frozenset[int]:
        """Bytes without a token of their own, which the library drops or replaces by its
        ``unk_token``.
        """
        known = set(self.library.get_vocab(with_added_tokens=False))
        return frozenset(byte for byte, character in PRINTABLE.items() if character not in known)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`. Half a surrogate pair is encoded as U+FFFD.

        Raises:
            DataError: the text has a byte that the vocabulary lacks.

        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        lost = self._missing and self._missing.intersection(text.encode())
        if lost:
            raise DataError(
                f"the text has the byte 0x{min(lost):02X}, which the vocabulary {self.name} "
                "lacks: leave the character out, or name another tokenizer"
            )
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        """The library's ids, through the call that releases the interpreter's lock."""
        ids: list[int] = self.library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def content(self) -> dict[str, object]:
        """See `Tokenizer`."""
        begin = {} if self.begin_of_text is None else {"begin_of_text": self.begin_of_text}
        return {"tokenizer": json.loads(self.source), "end_of_text": self.end_of_text} | begin


def read_library(source: str) -> Any:
    """The tokenizer object of ``tokenizers`` for the content of a ``tokenizer.json``.

    Raises:
        ValueError: the library cannot read it.

    """
    from tokenizers import Tokenizer as Library  # imported late: it takes half a second

    try:
        return Library.from_str(source)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(str(error)) from error


def canonical(content: dict[str, Any], end_of_text: str | None) -> tuple[str, int | None]:
    """The content of a ``tokenizer.json`` as the library writes it, with end-of-text as a special
    token, and end-of-text's id.

    Raises:
        ValueError: see `check`; or the library cannot read it, or its ids of added tokens differ
            from the file's.

    """
    from tokenizers import AddedToken

    check(content)
    library = read_library(json.dumps(content))
    for token in content.get("added_tokens") or []:
        if library.token_to_id(token["content"]) != token["id"]:
            raise ValueError(
                f"its added token {token['content']!r} has the id {token['id']}, but its library "
                "gives it another"
            )
    if end_of_text is None:
        return _content(library), None
    end = library.token_to_id(end_of_text)
    if end is None:
        raise ValueError(f"its end-of-text {end_of_text!r} is not in its vocabulary")
    library.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return _content(library), end


def _content(library: Any) -> str:
    return json.dumps(json.loads(library.to_str()))


def check(content: dict[str, Any]) -> None:
    """Raise ValueError for a setting of a ``tokenizer.json`` that is not supported or that would
    crash the library.
    """
    model, before, after = (
        content["model"],
        content.get("pre_tokenizer") or {},
        content.get("post_processor") or {},
    )
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise ValueError(
                f"its {setting} is {model[setting]!r}, which is not supported: it must be false or "
                "absent"
            )
    for setting in ("normalizer", "truncation", "padding"):
        if content.get(setting):
            raise ValueError(
                f"it changes the text or its ids (its {setting}), which is not supported"
            )
    if before.get("type") == "Sequence" and before["pretokenizers"][:-1] == [
        {"type": "Digits", "individual_digits": True}  # which cut nothing between blanks
    ]:
        before = before["pretokenizers"][-1]
    if (
        before.get("type") != "ByteLevel"
        or before["add_prefix_space"]
        or not before.get("use_regex", True)
    ):
        raise ValueError("it splits text differently from GPT-2 (its pre_tokenizer)")
    if after.get("type", "ByteLevel") != "ByteLevel":
        raise ValueError(
            "it may add tokens to every text (its post_processor), which is not supported"
        )
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError("it does not decode bytes (its decoder): it must be ByteLevel")
    unknown = sorted({*(content.keys() - FILE_SETTINGS), *(model.keys() - MODEL_SETTINGS)})
    if unknown:
        raise ValueError(f"it has the unknown setting {unknown[0]!r}")
    added = content.get("added_tokens") or []
    ids = {*model["vocab"].values(), *(token["id"] for token in added)}
    tokens = {*model["vocab"], *(token["content"] for token in added)}
    if ids != set(range(len(tokens))) or not tokens or "" in tokens or len(tokens) > LARGEST:
        raise ValueError(
            f"the ids of its {len(tokens)} tokens have gaps, repeat, or are more than {LARGEST}"
        )


def _bytes_of(token: str) -> bytes:
    """The bytes of a token as the library's byte-level decoder gives them: a token that is not all
    printable stand-ins is text.
    """
    return bytes(map(BYTES.__getitem__, token)) if BYTES.keys() >= set(token) else token.encode()
