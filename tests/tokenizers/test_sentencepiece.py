"""SentencePiece vocabularies, compared with that library alone."""

import io
import json
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.tokenizers.sentencepiece import SPACE, SentencePiece, read_model

library = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # of SWIG's types

TEXT = ["the cat sat on the mat", "the dog    sat    on 123 logs\n\nand    über die Straße"] * 20
CATS = tokenizers.train_sentencepiece(TEXT, 310, "cats")
ANY = st.text(
    st.sampled_from("the cat  \n12") | st.characters(codec="utf-8", exclude_characters=SPACE)
)


def trained(**settings):
    """The content of a model with these settings."""
    default = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=310, minloglevel=2,
        **default | {"hard_vocab_limit": False} | settings,
    )  # fmt: skip
    return model.getvalue()


def theirs(model=CATS.model):
    return library.SentencePieceProcessor(model_proto=model)


@given(ANY)
def test_any_text_is_encoded_as_the_library_does_and_decoded(text):
    ids = CATS.encode(text)
    assert ids == theirs().encode(text)
    assert CATS.decode(ids) == CATS.decode([1, *ids]) == text
    assert CATS.decode_bytes([1, *ids]) == b"<s>" + text.encode()
    assert all(3 <= i < CATS.vocab_size for i in ids)


@given(ANY, ANY)
def test_what_goes_on_gives_the_ids_of_the_whole(first, rest):
    """Where `gptjax.datasets.text` cuts: before a blank that follows none."""
    first = first.rstrip() or "a"
    for blank in " \n":
        more = blank + rest
        assert CATS.encode(first) + CATS.encode_more(more) == CATS.encode(first + more)
        before = [1, *CATS.encode(first)]
        assert CATS.decode_more(before, CATS.encode_more(more)) == more.encode()


def test_controls_are_ids_and_never_text():
    assert (CATS.begin_of_text, CATS.end_of_text, CATS.document_start) == (1, 2, 1)
    assert CATS.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert not {0, 1, 2} & set(CATS.encode("<s> <unk></s>"))
    assert CATS.encode("") == []
    assert CATS.decode([310, -1]) == "\ufffd\ufffd"


def test_it_is_trained_as_llama2c_does():
    model = CATS.read
    assert (model.kind, model.space_first) == (2, True)
    assert CATS.pieces[3:259] == tuple(bytes([b]) for b in range(256))
    assert not [p for p in model.pieces[259:] if len(p.text) > 1 and any(map(str.isdigit, p.text))]
    assert "  " in [piece.decode() for piece in CATS.pieces[259:]]
    ids = [CATS.library.piece_to_id(piece.text) for piece in model.pieces]
    assert ids == list(range(310))
    assert [CATS.library.get_score(i) for i in ids] == [piece.score for piece in model.pieces]


@pytest.mark.parametrize(
    ("texts", "size", "reason"),
    [
        (TEXT, 5000, "the text is too short: it gives at most"),
        (TEXT, 260, "the bytes and the text's characters are 28[0-9] ids already"),
        ([], 300, "there is no text"),
        (TEXT, 0, "up to 1048576 ids, not 0"),
    ],
)
def test_a_size_that_cannot_be_trained(texts, size, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizers.train_sentencepiece(texts, size, "cats")


def test_it_is_trained_for_a_corpus(tmp_path):
    from gptjax import datasets

    (tmp_path / "a.txt").write_text("\n".join(TEXT))
    corpus = datasets.find_corpus(str(tmp_path / "a.txt"), tmp_path / "data", "sentencepiece:310")
    assert corpus.tokenizer.vocab_size == 310
    assert corpus.tokenizer.kind == "sentencepiece"
    assert "the cat sat" in corpus.tokenizer.decode(corpus.train[0].tokens.tolist())
    assert datasets.vocabulary_without_corpus("my.txt", "sentencepiece:310")[0] == 310
    with pytest.raises(DataError, match=r"lacks the vocabulary size, as in sentencepiece:2048"):
        datasets.find_corpus(str(tmp_path / "a.txt"), tmp_path / "data", "sentencepiece:x")


def test_a_model_file_is_found_and_kept(tmp_path):
    (tmp_path / "cats.model").write_bytes(CATS.model)
    found = tokenizers.find(tmp_path / "cats.model")
    assert found == CATS
    found.save(tmp_path / "tokenizer.json")
    assert tokenizers.find(tmp_path) == CATS
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["kind"] == "sentencepiece"


def test_a_unigram_model():
    found = SentencePiece(trained(model_type="unigram"))
    assert found.encode("the cat sat") == found.library.encode(" the cat sat")
    assert found.decode(found.encode("the cat ☃")) == "the cat ☃"


def test_no_space_is_put_where_the_model_says_so():
    plain = SentencePiece(trained(add_dummy_prefix=False))
    assert plain.encode("the cat") == theirs(plain.model).encode("the cat")
    assert plain.decode_bytes(plain.encode(" the cat")) == b" the cat"
    assert plain.decode([1, *plain.encode(" the cat")]) == "<s> the cat"


def test_runs_of_spaces_are_kept():
    short = SentencePiece(trained(remove_extra_whitespaces=True))
    assert short.decode(short.encode("the  cat ")) == "the  cat "
    assert short.encode("the cat") == theirs(short.model).encode("the cat")


def test_a_character_that_the_vocabulary_lacks():
    few = SentencePiece(trained(byte_fallback=False))
    assert few.decode(few.encode("the cat")) == "the cat"
    with pytest.raises(DataError, match="the character '☃', which the vocabulary sentencepiece"):
        few.encode("the ☃")


def test_user_defined_pieces_are_found_in_text():
    more = SentencePiece(trained(user_defined_symbols=["<tool>"], control_symbols=["<end>"]))
    tool = more.pieces.index(b"<tool>")
    assert tool in more.encode("a<tool>b")
    assert more.special_tokens["<end>"] not in more.encode("a<end>b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer b'nmt_nfkc' changes the text"),
        ({"model_type": "char"}, "model_type is 4: it must be bpe"),
        ({"treat_whitespace_as_suffix": True}, "spaces end words"),
        ({"split_by_whitespace": False}, "spans blanks"),
    ],
)
def test_settings_that_are_not_kept_to_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SentencePiece(trained(**settings))


@given(st.data())
def test_damaged_models_are_refused(data):
    content = bytearray(CATS.model)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place : place + data.draw(st.integers(1, 99))]
    try:
        found = SentencePiece(bytes(content))
        assert all(0 <= i < found.vocab_size for i in found.encode("the cat\n☃ 12"))
        found.decode([1, *range(found.vocab_size)])
    except (ValueError, DataError):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\n\x03\n\x01a" * 2, b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x08\x01"]
)  # fmt: skip
def test_what_is_no_model_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match="it is not|its"):
        read_model(content)
    (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(FormatError, match=r"m\.model is not a supported SentencePiece model"):
        tokenizers.from_sentencepiece(tmp_path / "m.model")


def test_fields_of_every_wire_type_are_passed_over():
    extra = b"\x49" + bytes(8) + b"\x95\x06" + struct.pack("<f", 1.0) + b"\x98\x06\x7f"
    assert read_model(CATS.model + extra) == CATS.read


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install 'gptjax\[llama\]'"):
        SentencePiece(CATS.model)
    with pytest.raises(DataError, match=r"pip install 'gptjax\[llama\]'"):
        tokenizers.train_sentencepiece(TEXT, 310, "cats")


def test_half_a_surrogate_pair_is_replaced():
    assert CATS.decode(CATS.encode("a\udc80b")) == "a\ufffdb"


def test_it_is_exported_as_llama2c_does(tmp_path, capsys):
    """The same ids, from llama2.c's file and from GGUF's fields."""
    from gptjax.tokenizers import ggml
    from gptjax.tokenizers.__main__ import main

    (tmp_path / "cats.model").write_bytes(CATS.model)
    main(
        ["export", "--tokenizer", str(tmp_path / "cats.model"), "--output", str(tmp_path / "t.bin")]
    )
    assert "310 tokens in" in capsys.readouterr().out
    found = tokenizers.find(tmp_path / "t.bin")
    assert found.kind == "llama2c"
    assert found.tokens[:3] == (b"<unk>", b"\n<s>\n", b"\n</s>\n")
    again = ggml.from_fields(tmp_path, ggml.fields_of(CATS, 320))
    for text in [*TEXT[:2], "", "  a ", "\n\u2603 12"]:
        assert found.encode(text) == again.encode(text) == CATS.encode(text)


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"user_defined_symbols": ["<x>"]}])
def test_what_llama2c_cannot_hold_is_not_exported(settings):
    from gptjax.tokenizers import ggml, tokenizer_json
    from gptjax.tokenizers.llama2c import scored

    other = SentencePiece(trained(**settings))
    with pytest.raises(ConfigError, match="its file cannot hold it"):
        scored(other)
    assert not ggml.can_write(other)
    assert not tokenizer_json.can_write(other)
