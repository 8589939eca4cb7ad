import json

import pytest

from gptjax import tokenizers
from gptjax.errors import FormatError
from gptjax.formats import hf_tokenizer

TEXT = ["the cat sat on the mat", "the dog sat on the log", "über die Straße, 12 345!"] * 20
BPE = tokenizers.train_bpe(TEXT, 290, "cats")


def test_the_library_encodes_what_is_written_as_we_do(tmp_path):
    from tokenizers import Tokenizer

    hf_tokenizer.write(tmp_path, BPE)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXT[:3], "  a\n\n b?! 'll", "\x00\ufeff\U0001f600"]:
        assert theirs.encode(text).ids == BPE.encode(text)
        assert theirs.decode(BPE.encode(text)) == text
    assert theirs.token_to_id("<|endoftext|>") == BPE.end_of_text == 289


def test_what_is_written_is_read_back(tmp_path):
    hf_tokenizer.write(tmp_path, BPE)
    again = hf_tokenizer.read(tmp_path)
    assert again.tokens == BPE.tokens
    assert again.end_of_text == BPE.end_of_text


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].pop("vocab"),
        lambda c: c["model"]["vocab"].update(cat=999),
        lambda c: c["model"]["vocab"].update({"\u4e2d": 289}),
        lambda c: c.update(added_tokens=[]),
        lambda c: c.update(model=[]),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
        lambda c: c["model"]["merges"].reverse(),
    ],
)
def test_other_files_are_refused(tmp_path, change):
    hf_tokenizer.write(tmp_path, BPE)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="no byte-level BPE that is known here"):
        hf_tokenizer.read(tmp_path)


def test_the_older_two_files(tmp_path):
    """``vocab.json`` and ``merges.txt``, as OpenAI's GPT-2 came."""
    hf_tokenizer.write(tmp_path, BPE)
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="vocab.json cannot be read"):
        hf_tokenizer.read(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"] | {"<|endoftext|>": 289}))
    with pytest.raises(FormatError, match="merges.txt cannot be read"):
        hf_tokenizer.read(tmp_path)
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    assert hf_tokenizer.read(tmp_path).tokens == BPE.tokens
