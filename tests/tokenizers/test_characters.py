import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError


@given(st.text(), st.text())
def test_characters_are_numbered_in_the_order_of_their_code_points(vocabulary, text):
    tokenizer = tokenizers.train_characters([vocabulary, text, "x"])
    rank = {c: i for i, c in enumerate(sorted(set(vocabulary + text + "x")))}
    assert tokenizer.encode(text) == [rank[c] for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(rank)
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("help", r"'p' \(U\+0070\) at position 3"),
        ("hexe", r"'x' \(U\+0078\) at position 2"),
        ("\x00", r"'\\x00' \(U\+0000\) at position 0"),
        ("he\U0001f600\U0001f600", r"'.' \(U\+1F600\) at position 2"),
        ("\udc80", r"'.udc80' \(U\+DC80\) at position 0"),
    ],
)
def test_a_character_that_the_vocabulary_lacks_is_named(text, found):
    tokenizer = tokenizers.train_characters(["hello"], "greeting")
    with pytest.raises(
        DataError, match=rf"the character {found} .* among the 4 of the vocabulary greeting"
    ):
        tokenizer.encode(text)


def test_a_vocabulary_of_nothing():
    with pytest.raises(DataError, match="the text is empty"):
        tokenizers.train_characters([])


@pytest.mark.parametrize("characters", ["", "ba", "aab", "a\ud800"])
def test_vocabularies_that_cannot_be(characters):
    with pytest.raises(ValueError, match="sorted, or repeat|surrogates not allowed"):
        tokenizers.Characters(characters)


def test_tinyshakespeare_has_nanogpts_65_characters(shared):
    text = (shared / "tinyshakespeare" / "input.txt").read_text()
    tokenizer = tokenizers.train_characters([text])
    assert tokenizer.vocab_size == 65
    assert (
        tokenizer.characters == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    )
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert tokenizer.decode(tokenizer.encode(text)) == text
