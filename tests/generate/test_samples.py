import numpy as np

from gptjax import tokenizers
from gptjax.generate.samples import Sample

BYTES = tokenizers.byte()
END = BYTES.end_of_text


def take(sample, text: bytes, last=False):
    return sample.take(list(text), [-0.5] * len(text), [END], last)


def test_it_grows_until_its_length():
    sample = Sample(BYTES, [1])
    assert [take(sample, b"ab"), take(sample, b"c", last=True)] == ["ab", "c"]
    assert sample.record(logprobs=True) == {
        "text": "abc",
        "finish": "length",
        "ids": [97, 98, 99],
        "logprobs": [-0.5] * 3,
    }
    assert "logprobs" not in sample.record(logprobs=False)


def test_it_ends_with_end_of_text_which_is_no_text():
    sample = Sample(BYTES, [1])
    assert sample.take([97, END, END], [-1, -2, 0], [END], False) == "a"
    assert (sample.finish, sample.ids, sample.stream.text) == ("end", [97, END], "a")
    assert take(sample, b"more", last=True) == ""
    assert sample.finish == "end"


def test_what_is_seen_is_without_what_ended_it():
    ended, stopped, whole = Sample(BYTES, [1]), Sample(BYTES, [1], ["b."]), Sample(BYTES, [1])
    ended.take([97, END], [0, 0], [END], False)
    take(stopped, b"ab.c", last=True)
    take(whole, b"ab", last=True)
    assert [ended.visible_ids(), stopped.visible_ids(), whole.visible_ids()] == [
        [97],
        [97],
        [97, 98],
    ]


def test_it_goes_on_past_an_end_that_is_ignored():
    sample = Sample(BYTES, [1])
    assert sample.take([97, END, 98], [0, 0, 0], (), True) == "a<|endoftext|>b"


def test_it_ends_with_a_stop_string():
    sample = Sample(BYTES, [1], ["b."])
    assert take(sample, b"ab.c", last=True) == "a"
    assert (sample.finish, bytes(sample.ids)) == ("stop", b"ab.")


def test_the_listing_shows_what_cannot_be_printed():
    sample = Sample(BYTES, [1])
    sample.take([97, 10, 195], np.array([-1.25, -2, -3.5]), [END], True)
    assert sample.listing(False).split("\n") == ["    97, a", "    10, \\n", "   195, \\xc3"]
    assert sample.listing(True).split("\n")[0] == "    97,   -1.2500, a"
