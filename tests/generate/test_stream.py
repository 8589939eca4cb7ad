import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError
from gptjax.generate.stream import TextStream, prompt_ids

BYTES = tokenizers.byte()


def fed(text: str, stops: list[str]) -> tuple[TextStream, list[str]]:
    """The stream after all bytes of a text, one at a time, and what each brought."""
    stream = TextStream(BYTES, stops)
    return stream, [stream.feed([b]) for b in text.encode()] + [stream.feed([], last=True)]


@given(st.text(max_size=20))
def test_whole_characters_arrive_and_nothing_is_lost(text):
    stream, parts = fed(text, [])
    assert "".join(parts) == stream.text == text
    assert all(len(part) <= 1 for part in parts)


def test_a_character_cut_at_the_end_becomes_a_placeholder():
    stream = TextStream(BYTES)
    assert stream.feed(list("é".encode())[:1]) == ""
    assert stream.feed([], last=True) == "\N{REPLACEMENT CHARACTER}"


@given(
    st.text(alphabet="abé", max_size=15),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text, stops):
    stream, parts = fed(text, stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert "".join(parts) == text[: min(places, default=len(text))]
    assert stream.stopped == bool(places)


def test_only_a_possible_stop_string_is_held_back():
    stream = TextStream(BYTES, ["\n\n"])
    assert [stream.feed([b]) for b in b"a\nb\n\nc"] == ["a", "", "\nb", "", "", ""]
    assert stream.stopped


def test_an_empty_stop_string_is_ignored():
    assert fed("ab", [""])[0].text == "ab"


def test_a_sample_always_has_an_id_to_start_from():
    byte, lines, words = (
        tokenizers.byte(),
        tokenizers.Characters("\n!ab"),
        tokenizers.Characters("!ab"),
    )
    assert prompt_ids(None, "ab") == [0]
    assert [prompt_ids(t, "ab") for t in (byte, lines, words)] == [[97, 98], [2, 3], [1, 2]]
    assert [prompt_ids(t, "\n") for t in (byte, lines, words)] == [[10], [0], [0]]
    assert [prompt_ids(t, "") for t in (byte, lines, words)] == [[256], [0], [0]]


def test_a_prompt_outside_the_vocabulary_fails_before_training():
    with pytest.raises(DataError, match="'c' .* at position 2"):
        prompt_ids(tokenizers.Characters("!ab"), "abc")
