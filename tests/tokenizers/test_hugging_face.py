"""Byte-level BPEs that Hugging Face's library encodes, compared with that library alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import DataError
from gptjax.tokenizers.hugging_face import HuggingFace, canonical

BYTES = [bytes([b]) for b in range(256)]


def library(tokens, merges, **options):
    """Hugging Face's tokenizer with these tokens (bytes) and merges (printable pairs)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(
        models.BPE(
            {tokenizers.printable(token): i for i, token in enumerate(tokens)}, merges, **options
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made


def hugging_face(tokens, merges, added=(), **options):
    """The same as a tokenizer of ours."""
    made = library(tokens, merges, **options)
    made.add_tokens(list(added))
    return HuggingFace("merges", *canonical(json.loads(made.to_str()), "<|endoftext|>"))


THE = hugging_face([*BYTES, b"th", b"he", b"the"], [("t", "h"), ("h", "e"), ("t", "he")])


def test_only_listed_pairs_are_joined():
    """``t he`` makes "the", but ``t h`` comes first, and ``th e`` is not listed."""
    assert THE.encode("the he") == [256, 101, 32, 257]
    assert THE.decode(THE.encode("the he")) == "the he"


def test_a_known_word_is_one_token_if_merges_are_ignored():
    whole = hugging_face(
        [*BYTES, b"th", b"he", b"the"], [("t", "h"), ("h", "e"), ("t", "he")], ignore_merges=True
    )
    assert whole.encode("the xthe") == [258, 32, 120, 256, 101]


def test_added_tokens_are_found_and_special_ones_are_not():
    more = hugging_face(BYTES, [], ["<tool>"])
    assert more.vocab_size == 258
    assert more.encode("a<tool>b") == [97, 257, 98]
    assert more.decode([97, 257, 98, 256]) == "a<tool>b<|endoftext|>"
    assert 256 not in more.encode("<|endoftext|>")
    assert more.end_of_text == 256


@pytest.mark.parametrize("unknown", [None, "a"])
def test_a_text_with_a_byte_that_no_token_stands_for_is_refused(unknown):
    """The library leaves it out, or puts another token in its place."""
    few = [b"a", b"b", b" "]
    assert (
        library(few, [], unk_token=unknown).encode("a?b").ids != library(few, []).encode("a b").ids
    )
    tokenizer = hugging_face(few, [], unk_token=unknown)
    assert tokenizer.encode("b a") == [1, 2, 0]
    with pytest.raises(
        DataError, match="the text has the byte 0x3F, which the vocabulary merges lacks"
    ):
        tokenizer.encode("a?b")


@given(st.lists(st.integers(0, 258)))
def test_ids_are_decoded_as_the_library_does(ids):
    assert THE.decode(ids) == THE.library.decode(ids, skip_special_tokens=False)


def test_other_threads_run_while_it_encodes():
    """A corpus is tokenized in threads."""
    import threading

    done, turns = threading.Event(), 0
    thread = threading.Thread(
        target=lambda: (THE.encode("the cat sat on the mat. " * 40_000), done.set())
    )
    thread.start()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10
