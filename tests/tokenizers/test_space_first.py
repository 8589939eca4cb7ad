import pytest

from gptjax.tokenizers.space_first import OVER_BLANKS, SPACE, SpaceFirst

PIECES = (b"<s>", b" ", b"a", b" a", b"\n")


class Words(SpaceFirst):
    """Each character is an id; begin-of-text is 0."""

    kind, name, pieces, end_of_text, begin_of_text = "words", "words", PIECES, None, 0

    def encode_more(self, text):
        """Each character's id."""
        return [PIECES.index(character.encode()) for character in text]

    def content(self):
        """Nothing more."""
        return {}


class Plain(Words):
    space_first = False


def test_a_space_is_added_before_a_text_and_dropped_again():
    assert Words().encode("a a") == [1, 2, 1, 2]
    assert Words().encode("") == []
    assert Words().encode_more("a") == [2]
    for text in ("a a", "a", ""):
        assert Words().decode(Words().encode(text)) == text
        assert Words().decode([0, *Words().encode(text)]) == text


def test_a_space_that_follows_begin_of_text_is_dropped_wherever_it_is():
    assert Words().decode_bytes([0, 3, 3, 0, 3]) == b"<s>a a<s>a"
    assert Words().decode_bytes([3]) == b" a"  # goes on after other ids


def test_a_tokenizer_without_the_rule_is_an_ordinary_one():
    assert Plain().encode("a a") == [2, 1, 2]
    assert Plain().decode([0, 3]) == "<s> a"


@pytest.mark.parametrize(("token", "spans"), [("a b", True), (f"a{SPACE}", True), (" ab", False)])
def test_tokens_that_span_blanks_are_told(token, spans):
    assert bool(OVER_BLANKS.search(token)) == spans
