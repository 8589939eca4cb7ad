import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import FormatError
from gptjax.tokenizers import tokenizer_json
from tests.tokenizers.test_hugging_face import library

TEXT = ["the cat sat on the mat", "the dog sat on the log", "über die Straße, 12 345!"] * 20
PADDING = {
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "!",
}
ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
BPE = tokenizers.train_bpe(TEXT, 290, "cats")


def test_the_library_encodes_what_is_written_as_we_do(tmp_path):
    from tokenizers import Tokenizer

    tokenizer_json.write(tmp_path, BPE)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXT[:3], "  a\n\n b?! 'll", "\x00\ufeff\U0001f600"]:
        assert theirs.encode(text).ids == BPE.encode(text)
        assert theirs.decode(BPE.encode(text)) == text
    assert theirs.token_to_id("<|endoftext|>") == BPE.end_of_text == 289


def test_what_is_written_is_read_back(tmp_path):
    tokenizer_json.write(tmp_path, BPE)
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizer_json.read(where)
        assert again.tokens == BPE.tokens
        assert again.end_of_text == BPE.end_of_text


def test_the_library_encodes_what_ranks_cannot_express(tmp_path):
    """By their ranks alone ``th`` and ``e`` would make "the", for that is a token: the file lists
    ``t he``.
    """
    theirs = library(
        [*tokenizers.byte().tokens, b"th", b"he", b"the"], [("t", "h"), ("h", "e"), ("t", "he")]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_json.read(tmp_path)
    assert (found.kind, found.vocab_size, found.end_of_text) == ("hf", 260, 259)
    assert found.encode("the he") == theirs.encode("the he").ids == [256, 101, 32, 257]


def test_what_the_library_encodes_is_written_and_read_back(tmp_path):
    (tmp_path / "again").mkdir()
    tokenizer_json.write(tmp_path, BPE)
    change_file(tmp_path / "tokenizer.json", lambda c: c["model"]["merges"].reverse())
    found = tokenizer_json.read(tmp_path)
    tokenizer_json.write(tmp_path / "again", found)
    assert tokenizer_json.read(tmp_path / "again").same_as(found)
    assert (
        json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["eos_token"]
        == "<|endoftext|>"
    )


def test_characters_are_not_written(tmp_path):
    letters = tokenizers.train_characters(["the cat"])
    assert tokenizer_json.can_write(BPE)
    assert not tokenizer_json.can_write(letters)
    with pytest.raises(TypeError, match="a char tokenizer"):
        tokenizer_json.write(tmp_path, letters)


@pytest.mark.parametrize(
    ("named", "end"),
    [
        ("</s>", 291),
        ({"content": "</s>"}, 291),
        (None, 289),
        ("<|endoftext|>", 289),
        ("the", None),
        (3, None),
    ],
)
def test_end_of_text_is_what_the_config_names(tmp_path, named, end):
    """A word that text may hold cannot be it."""
    tokenizer_json.write(tmp_path, BPE)
    more = [{"id": 290, "content": "<pad>"}, {"id": 291, "content": "</s>"}]
    change_file(
        tmp_path / "tokenizer.json",
        lambda c: c["added_tokens"].extend(c["added_tokens"][0] | token for token in more),
    )
    change_file(tmp_path / "tokenizer_config.json", lambda c: c.update(eos_token=named))
    if end is None:
        with pytest.raises(
            FormatError,
            match="end-of-text 'the' is not a special token|eos_token of .* is not text",
        ):
            tokenizer_json.read(tmp_path)
        return
    found = tokenizer_json.read(tmp_path)
    assert (found.end_of_text, found.vocab_size) == (end, 292)
    assert not {289, 290, 291} & set(found.encode("a</s><pad><|endoftext|>"))
    assert found.decode([end, 290]) == {289: "<|endoftext|>", 291: "</s>"}[end] + "<pad>"


def test_end_of_text_is_made_special(tmp_path):
    """As ``transformers`` does."""
    tokenizer_json.write(tmp_path, BPE)
    change_file(tmp_path / "tokenizer.json", lambda c: c["added_tokens"][0].update(special=False))
    assert tokenizer_json.read(tmp_path).same_as(BPE)


def test_an_end_of_text_that_is_no_token(tmp_path):
    tokenizer_json.write(tmp_path, BPE)
    change_file(tmp_path / "tokenizer_config.json", lambda c: c.update(eos_token="</s>"))
    with pytest.raises(FormatError, match="end-of-text '</s>' is not in its vocabulary"):
        tokenizer_json.read(tmp_path)


def change_file(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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
        lambda c: c["added_tokens"][0].update(id=7),
        lambda c: c["added_tokens"].append(ADDED | {"id": 165, "content": "é"}),
        lambda c: c["added_tokens"].append(ADDED | {"id": 290, "content": "two words"}),
        lambda c: c["added_tokens"].append(ADDED | {"id": 290, "content": "<x>", "rstrip": True}),
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        lambda c: c["pre_tokenizer"].update(use_regex=False),
        lambda c: c.update(decoder=None),
        lambda c: c.update(
            truncation={
                "max_length": 5,
                "stride": 0,
                "strategy": "LongestFirst",
                "direction": "Right",
            }
        ),
        lambda c: c.update(padding={**PADDING, "strategy": {"Fixed": 4}}),
        lambda c: c.update(
            post_processor={"type": "BertProcessing", "sep": ["a", 64], "cls": ["b", 65]}
        ),
        lambda c: c["model"].update(dropout=0.5),
        lambda c: c["model"].update(continuing_subword_prefix="###"),
        lambda c: c["model"].update(end_of_word_suffix="x"),
        lambda c: c["model"].update(byte_fallback=True),
        lambda c: c.update(
            model={"type": "WordLevel", "vocab": c["model"]["vocab"], "unk_token": "a"}
        ),
        lambda c: c.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    ],
)
def test_other_files_are_refused(tmp_path, change):
    tokenizer_json.write(tmp_path, BPE)
    change_file(tmp_path / "tokenizer.json", change)
    with pytest.raises(FormatError, match="is not a supported BPE"):
        tokenizer_json.read(tmp_path)


def test_the_older_two_files(tmp_path):
    """``vocab.json`` and ``merges.txt``, as OpenAI's GPT-2 came."""
    tokenizer_json.write(tmp_path, BPE)
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="vocab.json cannot be read"):
        tokenizer_json.read(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"] | {"<|endoftext|>": 289}))
    with pytest.raises(FormatError, match="merges.txt cannot be read"):
        tokenizer_json.read(tmp_path)
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    assert tokenizer_json.read(tmp_path).tokens == BPE.tokens


# Llama's


def by_scores(*words):
    """llama2.c's tokenizer of these words after the bytes, the first the best."""
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256))]
    tokens += map(str.encode, words)
    return tokenizers.Llama2c(tuple(tokens), tuple(-float(i) for i in range(len(tokens))), "words")


WORDS = by_scores("t", "h", "e", " ", "th", "the", " the", "he", "  ", "    ", "theth", "ee")


@given(
    st.text(st.sampled_from("the  ") | st.characters(codec="utf-8", exclude_characters="\u2581"))
)
def test_a_bpe_by_scores_is_a_list_of_merges(text):
    found = tokenizer_json.from_scores(WORDS)
    assert found.encode(text) == WORDS.encode(text)
    assert found.encode_more(text) == WORDS.encode_more(text)
    assert found.decode(found.encode(text)) == text


def test_a_bpe_by_scores_is_written_for_transformers(tmp_path):
    from tokenizers import Tokenizer

    tokenizer_json.write(tmp_path, WORDS)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("the  the☃").ids == [1, *WORDS.encode("the  the☃")]
    found = tokenizer_json.read(tmp_path)
    assert (found.begin_of_text, found.end_of_text, found.vocab_size) == (1, 2, WORDS.vocab_size)
    assert found.encode("the  the☃") == WORDS.encode("the  the☃")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize("words", [("t", "t"), ("\u2581", " "), ("a b", "x")])
def test_scores_that_no_list_of_merges_replaces(words):
    """Two tokens of one text; or one that reaches over blanks."""
    assert not tokenizer_json.can_write(by_scores(*words))


def test_sentencepiece_in_a_folder(tmp_path):
    pytest.importorskip("sentencepiece")
    cats = tokenizers.train_sentencepiece(TEXT, 300, "cats")
    tokenizer_json.write(tmp_path, cats)
    assert (tmp_path / "tokenizer.model").read_bytes() == cats.model
    found = tokenizer_json.read(tmp_path)
    assert found.kind == "hf"
    assert found.encode("the cat ☃") == cats.encode("the cat ☃")
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_json.read(tmp_path).same_as(cats)
    (tmp_path / "added_tokens.json").write_text(
        '{"<|im_end|>": 301, "<|im_start|>": 300, "</s>": 2}'
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    found = tokenizer_json.read(tmp_path)
    assert found.encode("the cat ☃") == cats.encode("the cat ☃")
    assert (found.begin_of_text, found.end_of_text, found.vocab_size) == (1, 301, 302)
    assert found.special_tokens["<|im_start|>"] == 300
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 301}')
    with pytest.raises(FormatError, match="has ids that do not follow the 300 of its model"):
        tokenizer_json.read(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FormatError, match="is not a supported SentencePiece model"):
        tokenizer_json.read(tmp_path)


def test_begin_of_text_is_what_the_file_or_the_config_puts_before(tmp_path):
    tokenizer_json.write(tmp_path, WORDS)

    def begin():
        return tokenizer_json.read(tmp_path).begin_of_text

    assert begin() == 1
    change_file(tmp_path / "tokenizer.json", lambda c: c.update(post_processor=None))
    assert begin() is None
    change_file(tmp_path / "tokenizer_config.json", lambda c: c.update(add_bos_token=True))
    assert begin() == 1
    change_file(tmp_path / "tokenizer_config.json", lambda c: c.update(bos_token="<begin>"))
    with pytest.raises(FormatError, match="begin-of-text '<begin>' is not in its vocabulary"):
        begin()


def test_the_chat_template_stands_where_old_and_new_versions_look(tmp_path):
    template = "{{ messages }}\r\nü"
    tokenizer_json.write(tmp_path, WORDS, template)
    assert tokenizer_json.read_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").unlink()
    assert tokenizer_json.read_template(tmp_path) == template
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    for value, found in ((several, "y"), (several[:1], None), (None, None)):
        change_file(
            tmp_path / "tokenizer_config.json", lambda c, v=value: c.update(chat_template=v)
        )
        assert tokenizer_json.read_template(tmp_path) == found
    change_file(tmp_path / "tokenizer_config.json", lambda c: c.update(chat_template=3))
    with pytest.raises(FormatError, match="has a chat_template that is not text"):
        tokenizer_json.read_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja cannot be read"):
        tokenizer_json.read_template(tmp_path)
    assert tokenizer_json.read_template(tmp_path / "none") is None
