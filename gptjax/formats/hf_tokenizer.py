"""Hugging Face's ``tokenizer.json``, for byte-level BPEs whose ids are the ranks of their merges, as GPT-2's are."""

import json
from pathlib import Path

from gptjax.errors import FormatError
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


def read(path: Path) -> BytePairEncoding:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        FormatError: it is damaged, or no byte-level BPE with end-of-text as its last id.

    """
    try:
        content = json.loads(path.read_text("utf-8"))
        vocabulary = {**content["model"]["vocab"]}
        vocabulary.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in by_id] != list(range(len(by_id))) or by_id[-1] != END_OF_TEXT:
            raise ValueError(f"its ids have gaps, or {END_OF_TEXT} is not the last")
        byte = {character: b for b, character in PRINTABLE.items()}
        return BytePairEncoding(path.parent.name, tuple(bytes(byte[c] for c in token) for token in by_id[:-1]))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"{path} holds no byte-level BPE that is known here: {error}") from error
