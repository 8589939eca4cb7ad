"""What holds for every tokenizer."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from tests.tokenizers.test_hugging_face import hugging_face

TEXT = ["the cat sat on the mat", "the dog sat on the log", "über die Straße"] * 20
BPE = tokenizers.train_bpe(TEXT, 280, "cats")
KINDS = {
    "bpe": BPE,
    "hf": hugging_face(
        BPE.tokens, [tuple(map(tokenizers.printable, pair)) for pair in reversed(BPE.merges())]
    ),
    "byte": tokenizers.byte(),
    "char": tokenizers.train_characters(TEXT, "letters"),
}
every = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
any_text = pytest.mark.parametrize(
    "tokenizer", [KINDS["bpe"], KINDS["hf"], KINDS["byte"]], ids=["bpe", "hf", "byte"]
)


@any_text
@given(text=st.text())
def test_any_text_round_trips_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.end_of_text for i in ids)


@every
@given(data=st.data())
def test_ids_stand_for_their_pieces(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.pieces[i] for i in ids)


@every
def test_no_two_ids_stand_for_the_same_bytes(tokenizer):
    assert len(set(tokenizer.pieces)) == len(tokenizer.pieces) == tokenizer.vocab_size


@every
@pytest.mark.parametrize("outside", [-1, -(2**70), 2**31, 2**70, "vocab_size"])
def test_ids_outside_the_vocabulary_become_the_replacement_character(tokenizer, outside):
    known = tokenizer.encode("a")
    outside = tokenizer.vocab_size if outside == "vocab_size" else outside
    assert tokenizer.decode([outside, *known, outside]) == "\ufffda\ufffd"
    assert tokenizer.decode_bytes([outside]) == b"\xef\xbf\xbd"


@any_text
def test_end_of_text_is_an_id_and_never_text(tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.end_of_text]) == tokenizers.END_OF_TEXT
    assert tokenizer.end_of_text not in tokenizer.encode(tokenizers.END_OF_TEXT)


@any_text
def test_half_a_surrogate_pair_is_replaced(tokenizer):
    """As in what Python makes of a command line that is not UTF-8."""
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


@every
def test_a_cut_character_becomes_the_replacement_character(tokenizer):
    if tokenizer.kind != "char":
        cut = [tokenizer.pieces.index(b"\xc3"), *tokenizer.encode("a")]
        assert tokenizer.decode(cut) == "\ufffda"
        assert tokenizer.decode_bytes(cut) == b"\xc3a"


@every
def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = tokenizers.load(tmp_path / "tokenizer.json")
    assert again == tokenizer
    assert (again.name, again.vocab_size, again.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert again.encode(TEXT[2]) == tokenizer.encode(TEXT[2])
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@every
def test_the_same_whatever_it_is_called(tokenizer):
    assert all(tokenizer.same_as(other) == (other is tokenizer) for other in KINDS.values())
    assert dataclasses.replace(tokenizer, name="another").same_as(tokenizer)


@every
def test_sent_to_another_process(tokenizer):
    tokenizer.encode(TEXT[2])  # so that there is something that could not be sent
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert again.encode(TEXT[2]) == tokenizer.encode(TEXT[2])


@every
def test_a_save_that_fails_leaves_what_was_there(tokenizer, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "tokenizer.json").write_text("before")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
