"""Hugging Face's ``tokenizer.json``, for byte-level BPEs whose ids are the ranks of their merges, as GPT-2's are."""

import json
from pathlib import Path

from gptjax.errors import FormatError
from gptjax.tokenizers import END_OF_TEXT, BytePairEncoding, byte_of_character, from_tokens


def write(folder: Path, tokenizer: BytePairEncoding) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``transformers``' GPT-2 tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    character = {b: c for c, b in byte_of_character().items()}

    def shown(token: bytes) -> str:
        return "".join(character[b] for b in token)

    tokens = tokenizer.tokens()
    vocabulary = {shown(token): i for i, token in enumerate(tokens)}
    theirs = Tokenizer(models.BPE(vocabulary, [(shown(a), shown(b)) for a, b in merges(tokens)]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    theirs.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast", **ends}, indent=2))


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The two parts that each token longer than a byte was merged from: those that are left when only lower ranks merge."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            best = min(pairs)
            if best >= rank:
                raise ValueError(f"the token {token!r} is no merge of two others")
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found.append((parts[0], parts[1]))
    return found


def read(path: Path) -> BytePairEncoding:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        FormatError: it is damaged, or no byte-level BPE with end-of-text as its last id.

    """
    try:
        content = json.loads(path.read_text("utf-8"))
        vocabulary = {**content["model"]["vocab"]}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        vocabulary.update(added)
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in by_id] != list(range(len(by_id))) or by_id[-1] != END_OF_TEXT:
            raise ValueError(f"its ids have gaps, or {END_OF_TEXT} is not the last")
        byte = byte_of_character()
        return from_tokens(path.parent.name, [bytes(byte[c] for c in token) for token in by_id[:-1]])
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"{path} holds no byte-level BPE that is known here: {error}") from error
