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
    again = hf_tokenizer.read(tmp_path / "tokenizer.json")
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
    ],
)
def test_other_files_are_refused(tmp_path, change):
    hf_tokenizer.write(tmp_path, BPE)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="no byte-level BPE that is known here"):
        hf_tokenizer.read(path)
