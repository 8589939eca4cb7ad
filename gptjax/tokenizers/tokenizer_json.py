"""Read and write the tokenizer of a Hugging Face folder: ``tokenizer.json``, or the older
``vocab.json`` and ``merges.txt`` of a byte-level BPE, or SentencePiece's ``tokenizer.model``.

If the ids are the ranks of the merges and each token is the merge of two earlier ones, merging by
lowest rank gives the same ids, and the result is a `BytePairEncoding`. Any other tokenizer is run
by the library itself; see `HuggingFace`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.files import read_small, read_text
from gptjax.formats.json_files import LARGEST, read_object
from gptjax.formats.llama2c_tokenizer import BEGIN, FIRST_BYTE, FIRST_TEXT
from gptjax.tokenizers.bpe import BytePairEncoding, printable
from gptjax.tokenizers.hugging_face import (
    DECODER_STRIP,
    DECODERS,
    PREPEND,
    REPLACE,
    HuggingFace,
    begin_of,
    canonical,
    read_library,
    space_of,
    with_begin,
)
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer
from gptjax.tokenizers.llama2c import CONTROL_TEXTS, CONTROLS, SCORED, Llama2c, scored
from gptjax.tokenizers.sentencepiece import SentencePiece
from gptjax.tokenizers.space_first import SPACE

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MODEL_FILE, TEMPLATE_FILE = "tokenizer.model", "chat_template.jinja"
ADDED_FILE = "added_tokens.json"
SPACED = ("prepend", BEGIN)  # of Llama 2: how a space is put before a text, and begin-of-text
LARGEST_TEMPLATE = 1 << 20  # bytes
BAD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def can_write(tokenizer: Tokenizer | None) -> bool:
    """Whether `write` supports this tokenizer."""
    if isinstance(tokenizer, SCORED):
        return from_scores(tokenizer) is not None
    return isinstance(tokenizer, BytePairEncoding | HuggingFace)


def write(folder: Path, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``transformers``, and the chat
    template where newer and older versions of it look.

    Raises:
        DataError: a token is not the merge of two earlier ones.
        TypeError: see `can_write`.

    """
    if isinstance(tokenizer, SentencePiece):
        (folder / MODEL_FILE).write_bytes(tokenizer.model)
    if isinstance(tokenizer, SCORED):
        tokenizer = from_scores(tokenizer) or tokenizer
    if isinstance(tokenizer, HuggingFace):
        named = {"bos_token": tokenizer.begin_of_text, "eos_token": tokenizer.end_of_text}
        ends = {
            name: tokenizer.library.id_to_token(i) for name, i in named.items() if i is not None
        }
        content = tokenizer.parsed
        if tokenizer.begin_of_text is not None:
            content = with_begin(content, tokenizer.begin_of_text, ends["bos_token"])
        (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    elif isinstance(tokenizer, BytePairEncoding):
        _library_of(tokenizer).save(str(folder / FILE))
        ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2TokenizerFast", **ends}
    else:
        raise TypeError(f"a {tokenizer.kind} tokenizer cannot be written as Hugging Face's {FILE}")
    if chat_template is not None:
        config["chat_template"] = chat_template
        (folder / TEMPLATE_FILE).write_text(chat_template, "utf-8", newline="")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def read_template(folder: Path) -> str | None:
    """The folder's template of a conversation, in Jinja; of several, the one named ``default``.

    Raises:
        FormatError: it cannot be read, or is no text.

    """
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            return read_small(path, LARGEST_TEMPLATE).decode()
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be read: {error}") from error
    path = folder / CONFIG_FILE
    found = read_object(path).get("chat_template") if path.exists() else None
    if isinstance(found, list):
        named = (entry for entry in found if isinstance(entry, dict))
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise FormatError(f"{path} has a chat_template that is not text")
    return found


def from_scores(
    tokenizer: SentencePiece | Llama2c, added: Sequence[str] = (), end: str = "</s>"
) -> HuggingFace | None:
    """A BPE by scores as a list of merges, which the library ``tokenizers`` runs.

    Each way to join two tokens to a third is a merge, the best score first; of equals the shorter
    left part, as ``transformers`` has it. None where the tokens do not allow it: no BPE, or two of
    one text.

    Args:
        tokenizer: the BPE.
        added: special tokens after its own, as those of a chat template.
        end: the text of end-of-text.

    """
    try:
        scored_one = scored(tokenizer)
        texts = [token.decode().replace(" ", SPACE) for token in scored_one.tokens]
    except (ConfigError, UnicodeDecodeError):
        return None
    texts[:FIRST_BYTE] = CONTROLS
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) < len(texts) or vocabulary.keys() & set(added):
        return None
    special = CONTROLS | {text: i for i, text in enumerate(added, len(texts))}
    merges = [
        (-scored_one.scores[i], cut, text[:cut], text[cut:])
        for text, i in vocabulary.items()
        for cut in range(1, len(text))
        if i >= FIRST_TEXT and text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, **flags} for text, i in special.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "decoder": {"type": "Sequence", "decoders": [*DECODERS, DECODER_STRIP]},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[left, right] for *_, left, right in sorted(merges, key=lambda m: m[:2])],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    begin = scored_one.begin_of_text
    try:
        fields, known = canonical(with_begin(content, begin, "<s>"), end)
        return HuggingFace(scored_one.name, *fields, begin, known=known)
    except ValueError:
        return None


def to_scores(tokenizer: HuggingFace) -> tuple[Llama2c, list[str]] | None:
    """Undo `from_scores`: a BPE by scores, and the special tokens after its own.

    A token's score is the rank of the first merge to it. None where that gives other merges.
    """
    content = tokenizer.parsed
    model = content["model"]
    if not model.get("byte_fallback") or (space_of(content), tokenizer.begin_of_text) != SPACED:
        return None
    ids: dict[str, int] = model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    special = tokenizer.special_tokens
    added = sorted(special.keys() - ids.keys(), key=special.__getitem__)
    if texts[:FIRST_BYTE] != [*CONTROLS] or len(texts) + len(added) != tokenizer.vocab_size:
        return None
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge), rank)
    try:
        found = Llama2c(
            (*CONTROL_TEXTS, *(text.replace(SPACE, " ").encode() for text in texts[FIRST_BYTE:])),
            tuple(float(-ranks.get(text, 0)) for text in texts),
            tokenizer.name,
        )
    except ValueError:
        return None
    again = from_scores(found)
    same = again and again.parsed["model"]["merges"] == model["merges"]
    return (found, added) if same else None


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
    """Read a ``tokenizer.json``, or the one in a folder, or the folder's ``tokenizer.model``, or
    its ``vocab.json`` and ``merges.txt``.

    End-of-text is the ``eos_token`` of ``tokenizer_config.json`` in the same folder, or else
    ``<|endoftext|>`` if the vocabulary has it. Begin-of-text is what the file puts before each
    text, or the config's ``bos_token`` if that has ``add_bos_token``.

    Raises:
        FormatError: there is none, it is damaged, or it cannot be run as the library does.
        DataError: a package is missing.

    """
    folder, path = (path, path / FILE) if path.is_dir() else (path.parent, path)
    if path.exists():
        content = read_object(path)
    elif (folder / MODEL_FILE).exists():
        return _with_added(folder, from_sentencepiece(folder / MODEL_FILE))
    else:
        content, path = _of_two_files(folder), folder / "vocab.json"
    try:
        config = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
        begin = _named(config, "bos_token") if config.get("add_bos_token") is True else None
        return _checked(folder.name, content, _named(config, "eos_token"), begin)
    except BAD as error:
        raise FormatError(f"{path} is not a supported BPE: {error}") from error


def _with_added(folder: Path, found: SentencePiece) -> Tokenizer:
    """The tokenizer with the special tokens that ``added_tokens.json`` puts after its own.

    Raises:
        FormatError: their ids do not follow, or the tokenizer is no BPE of llama2.c's kind.

    """
    path = folder / ADDED_FILE
    texts = read_object(path) if path.exists() else {}
    new = {text: i for text, i in texts.items() if i not in range(found.vocab_size)}
    added = sorted(new, key=str)
    if all(isinstance(i, int) for i in new.values()):
        added.sort(key=new.__getitem__)
    if [new[text] for text in added] != [found.vocab_size + i for i in range(len(added))]:
        raise FormatError(f"{path} has ids that do not follow the {found.vocab_size} of its model")
    if not added:
        return found
    config = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    try:
        made = from_scores(found, added, _named(config, "eos_token") or "</s>")
    except BAD as error:
        raise FormatError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    if not made:
        raise FormatError(
            f"{path} adds {added[0]!r} to a {MODEL_FILE} that is no BPE of Llama 2's kind: save "
            f"{FILE} with transformers"
        )
    return made


def from_sentencepiece(path: Path) -> SentencePiece:
    """Read the tokenizer in a SentencePiece ``.model``.

    Raises:
        FormatError: it is damaged, or has a setting that is not supported.
        DataError: the package ``sentencepiece`` is missing.

    """
    try:
        return SentencePiece(read_small(path, LARGEST), path.stem)
    except OSError as error:
        raise FormatError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not a supported SentencePiece model: {error}") from error


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


def _named(config: dict[str, Any], what: str) -> str | None:
    """The token that a config names, or None."""
    named = config.get(what)
    text = named.get("content") if isinstance(named, dict) else named
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the {what} of {CONFIG_FILE} is not text")
    return text


def _checked(
    name: str, content: dict[str, Any], end: str | None, begin: str | None = None
) -> Tokenizer:
    added = {token["content"] for token in content.get("added_tokens") or []}
    if end is None and END_OF_TEXT in added | set(content["model"]["vocab"]):
        end = END_OF_TEXT
    (source, end_id), known = canonical(content, end)
    begin_id = begin_of(content)
    if begin_id is None and begin is not None:
        begin_id = read_library(source).token_to_id(begin)
        if begin_id is None:
            raise ValueError(f"its begin-of-text {begin!r} is not in its vocabulary")
    found = HuggingFace(name, source, end_id, begin_id, known=known)
    return _as_ranks(found, known["parsed"]) or found


def _as_ranks(found: HuggingFace, content: dict[str, Any]) -> BytePairEncoding | None:
    """The same tokenizer, whose `parsed` content this is, as ranks of merges; None if it cannot be
    expressed so.

    If merging a token's bytes by all lower ranks leaves exactly its listed pair, no other pair can
    ever merge to it.
    """
    added = [token["content"] for token in content["added_tokens"]]
    last = found.vocab_size - 1
    if added != [END_OF_TEXT] or (found.end_of_text, found.begin_of_text) != (last, None):
        return None
    try:
        ranks = BytePairEncoding(found.name, found.pieces[:-1])
        same = [(printable(a), printable(b)) for a, b in ranks.merges()] == [
            tuple(p) for p in content["model"]["merges"]
        ]
    except (ValueError, DataError):
        return None
    return ranks if same else None
