"""Tokenizers that Hugging Face's ``tokenizers`` runs, because ranks of merges cannot express
them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from gptjax.errors import DataError
from gptjax.tokenizers.bpe import LARGEST, PRINTABLE
from gptjax.tokenizers.space_first import OVER_BLANKS, SPACE, SpaceFirst

BYTE_OF = {ord(character): byte for byte, character in PRINTABLE.items()}
STAND_INS = re.compile(f"[{re.escape(''.join(PRINTABLE.values()))}]*")
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
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]},
}
"""How a byte-level BPE may cut text into words, by llama.cpp's name.

Each begins a word where `gptjax.datasets.text` cuts long texts.
"""
IGNORES_MERGES = {"llama-bpe"}
"""Those with which llama.cpp takes a word that is a token whole, as ``ignore_merges`` says."""
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
DECODER_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = ("first", "always")
MODEL_SETTINGS |= {"continuing_subword_prefix", "end_of_word_suffix"}


@dataclasses.dataclass(frozen=True)
class HuggingFace(SpaceFirst):
    """A BPE in a ``tokenizer.json``: merges and ids in any order, added tokens, ``ignore_merges``.

    It is byte-level, as GPT-2's, or as Llama 2's: words begin with U+2581, and characters that the
    vocabulary lacks become bytes (``byte_fallback``).

    As in the library, text may contain added tokens, but never special ones. Settings under which
    encoding text in parts, or decoding ids one by one, would give another result are rejected.

    Raises:
        ValueError: the library cannot read it, or it has such a setting; the message names it.

    """

    name: str
    source: str
    """The content of ``tokenizer.json``, as the library writes it."""
    end_of_text: int | None = None
    begin_of_text: int | None = None
    known: dataclasses.InitVar[dict[str, Any] | None] = dataclasses.field(
        default=None, kw_only=True
    )
    """`parsed` and maybe `library`, if they are there already."""
    kind = "hf"

    def __post_init__(self, known: dict[str, Any] | None) -> None:
        known = known or {"parsed": json.loads(self.source)}
        content = self.__dict__["_content"] = known["parsed"]
        if "library" in known:
            self.__dict__["library"] = known["library"]
        check(content)
        check_added(self.library, content)
        bytes_of = _bytes_of(content["model"])
        for token in content["added_tokens"]:
            text = token["content"]
            if bytes_of(text) != text.encode():
                raise ValueError(f"its added token {text!r} would be decoded as different text")
            if not token["special"] and self.space_first:
                raise ValueError(f"its added token {text!r} would have a space put after it")
            if not token["special"] and (token["rstrip"] or re.search(r"\S\s", text)):
                raise ValueError(
                    f"its added token {text!r} spans blanks, where long texts may be cut"
                )
        merged = set(map("".join, content["model"]["merges"]))
        for what, number in (
            ("end-of-text", self.end_of_text),
            ("begin-of-text", self.begin_of_text),
        ):
            if number is None:
                continue
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"its {what} is {number}, but it has {self.vocab_size} ids")
            text = self.library.id_to_token(number)
            if text in merged or number in self._ids(text):
                raise ValueError(
                    f"its {what} {text!r} is not a special token, so text could contain it"
                )
        _ = self._space, self.special_tokens, self.pieces, self._missing
        del self.__dict__["_content"]  # which takes more memory than all else together

    @property
    def parsed(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``, read anew each time."""
        content: dict[str, Any] = self.__dict__.get("_content") or json.loads(self.source)
        return content

    @functools.cached_property
    def library(self) -> Any:
        """The tokenizer object of ``tokenizers``; it puts no space before a text."""
        parsed = self.parsed
        content = without_space(parsed)
        found = read_library(self.source if content is parsed else json.dumps(content))
        return taking_special_tokens_as_text(found)

    @functools.cached_property
    def _space(self) -> str:
        spaced = self.parsed["model"].get("byte_fallback")
        return space_of(self.parsed) if spaced else "never"

    @property
    def space_first(self) -> bool:
        """See `SpaceFirst`."""
        return self._space != "never"

    def __reduce__(self) -> tuple[object, ...]:
        return HuggingFace, (self.name, self.source, self.end_of_text, self.begin_of_text)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """See `Tokenizer`."""
        added = self.parsed["added_tokens"]
        return {token["content"]: token["id"] for token in added if token["special"]}

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        model, added = self.parsed["model"], self.parsed["added_tokens"]
        vocabulary = model["vocab"] | {token["content"]: token["id"] for token in added}
        return tuple(map(_bytes_of(model), sorted(vocabulary, key=vocabulary.__getitem__)))

    @functools.cached_property
    def _missing(self) -> frozenset[int]:
        """Bytes without a token of their own, which the library drops or replaces by its
        ``unk_token``; none with ``byte_fallback``, see `check`.
        """
        if self.parsed["model"].get("byte_fallback"):
            return frozenset()
        known = self.parsed["model"]["vocab"]
        return frozenset(byte for byte, character in PRINTABLE.items() if character not in known)

    def encode(self, text: str) -> list[int]:
        """See `SpaceFirst`; some put no space before a text that begins with one."""
        if self._space in METASPACE and text.startswith((" ", SPACE)):
            return self.encode_more(text)
        return super().encode(text)

    def encode_more(self, text: str) -> list[int]:
        """See `SpaceFirst`. Half a surrogate pair is encoded as U+FFFD.

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
        return {"tokenizer": self.parsed, "end_of_text": self.end_of_text, **begin}


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


def taking_special_tokens_as_text(library: Any) -> Any:
    """The library's tokenizer, changed so that a text cannot contain special tokens."""
    library.encode_special_tokens = True
    return library


def canonical(
    content: dict[str, Any], end_of_text: str | None
) -> tuple[tuple[str, int | None], dict[str, Any]]:
    """((the content of a ``tokenizer.json`` as the library writes it, with end-of-text as a special
    token; end-of-text's id), what `HuggingFace` need not read again).

    Raises:
        ValueError: see `check`; or the library cannot read it, or its ids of added tokens differ
            from the file's.

    """
    from tokenizers import AddedToken

    check(content)
    library = read_library(json.dumps(content))
    check_added(library, content)
    end = None
    if end_of_text is not None:
        end = library.token_to_id(end_of_text)
        if end is None:
            raise ValueError(f"its end-of-text {end_of_text!r} is not in its vocabulary")
        library.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    parsed = json.loads(library.to_str())
    known = {"parsed": parsed}
    if without_space(parsed) is parsed:
        known["library"] = taking_special_tokens_as_text(library)
    return (json.dumps(parsed), end), known


def check(content: dict[str, Any]) -> None:
    """Raise ValueError for a setting of a ``tokenizer.json`` that is not supported or that would
    crash the library.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(
                f"its {setting} is {model[setting]!r}, which is not supported: it must be false or "
                "absent"
            )
    for setting in ("truncation", "padding"):
        if content.get(setting):
            raise ValueError(
                f"it changes the text or its ids (its {setting}), which is not supported"
            )
    (_check_spaces if model.get("byte_fallback") else _check_byte_level)(content)
    begin_of(content)
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


def check_added(library: Any, content: dict[str, Any]) -> None:
    """Raise ValueError if the library gives an added token another id than ``content`` says."""
    for token in content.get("added_tokens") or []:
        if library.token_to_id(token["content"]) != token["id"]:
            raise ValueError(
                f"its added token {token['content']!r} has the id {token['id']}, but its library "
                "gives it another"
            )


def _check_byte_level(content: dict[str, Any]) -> None:
    if content.get("normalizer"):
        raise ValueError("it changes the text or its ids (its normalizer), which is not supported")
    if pre_tokenizer_of(content) is None:
        raise ValueError(
            "it splits text differently from GPT-2, SmolLM and Llama 3 (its pre_tokenizer)"
        )
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError("it does not decode bytes (its decoder): it must be ByteLevel")


def pre_tokenizer_of(content: dict[str, Any]) -> str | None:
    """The name in `PRE_TOKENIZERS` of how a ``tokenizer.json`` cuts text into words; None for
    another way.
    """

    def essence(cutter: dict[str, Any]) -> Any:
        return [
            {"use_regex": True} | part | {"trim_offsets": True}
            if part.get("type") == "ByteLevel"
            else part
            for part in cutter.get("pretokenizers", [cutter])
        ]

    found = essence(content.get("pre_tokenizer") or {})
    return next((name for name, own in PRE_TOKENIZERS.items() if essence(own) == found), None)


def _check_spaces(content: dict[str, Any]) -> None:
    """`check` where bytes are ``<0x41>`` and words begin with U+2581."""
    model = content["model"]
    if model.get("ignore_merges"):
        raise ValueError("its ignore_merges joins words, where a long text may be cut")
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        raise ValueError("its vocabulary lacks a byte, though byte_fallback is on")
    strip = [DECODER_STRIP] if space_of(content) != "never" else []
    if content.get("decoder") != {"type": "Sequence", "decoders": [*DECODERS, *strip]}:
        raise ValueError("it does not decode as Llama 2's does (its decoder)")
    for token in model["vocab"]:
        if OVER_BLANKS.search(token):
            raise ValueError(f"its token {token!r} reaches over blanks, where text may be cut")


def space_of(content: dict[str, Any]) -> str:
    """How a tokenizer with ``byte_fallback`` puts a space before a text.

    Returns:
        ``prepend``: always; ``first`` or ``always``: unless there is one; ``never``.

    Raises:
        ValueError: it cuts or changes the text otherwise.

    """
    normalizer, before = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    if not before and parts in ([PREPEND, REPLACE], [REPLACE]):
        return "prepend" if parts[0] == PREPEND else "never"
    if not normalizer and before.get("type") == "Metaspace" and before["replacement"] == SPACE:
        always = "always" if before.get("add_prefix_space", True) else "never"
        return str(before.get("prepend_scheme", always))
    raise ValueError("it splits text differently from Llama 2 (its normalizer or pre_tokenizer)")


def without_space(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that puts no space before a text."""
    if not content["model"].get("byte_fallback"):
        return content
    if before := content["pre_tokenizer"]:
        return content | {"pre_tokenizer": before | {"prepend_scheme": "never"}}
    return content | {"normalizer": REPLACE}


def begin_of(content: dict[str, Any]) -> int | None:
    """The id that a ``tokenizer.json`` puts before each text, begin-of-text; None for none.

    Raises:
        ValueError: it puts other ids around a text.

    """
    after = content.get("post_processor") or {"type": "ByteLevel"}
    parts = after["processors"] if after["type"] == "Sequence" else [after]
    templates = [part for part in parts if part["type"] != "ByteLevel"]
    if not templates:
        return None
    template = templates[0]
    if len(templates) == 1 and template["type"] == "TemplateProcessing":
        *first, last = template["single"]
        if last.get("Sequence", {}).get("id") == "A" and not first:
            return None
        if "Sequence" in last and len(first) == 1 and "SpecialToken" in first[0]:
            ids = template["special_tokens"][first[0]["SpecialToken"]["id"]]["ids"]
            if len(ids) == 1 and isinstance(ids[0], int):
                return ids[0]
    raise ValueError(
        "it may add more than one token to every text (its post_processor), which is not supported"
    )


def with_begin(content: dict[str, Any], begin: int | None, text: str) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that puts ``begin``, whose text it is, before each
    text.
    """
    if begin is None or begin_of(content) == begin:
        return content
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [special, a],
        "pair": [special, a, {"SpecialToken": {"id": text, "type_id": 1}}, b],
        "special_tokens": {text: {"id": text, "ids": [begin], "tokens": [text]}},
    }
    return content | {"post_processor": template}


def _bytes_of(model: dict[str, Any]) -> Callable[[str], bytes]:
    """What gives the bytes of a token as the library's decoder has it."""

    def of_stand_ins(token: str) -> bytes:
        """What is not all stand-ins of bytes is text."""
        known = STAND_INS.fullmatch(token)
        return token.translate(BYTE_OF).encode("latin-1") if known else token.encode()

    def of_spaces(token: str) -> bytes:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()

    return of_spaces if model.get("byte_fallback") else of_stand_ins
