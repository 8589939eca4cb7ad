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
    return HuggingFace("merges", *canonical(json.loads(made.to_str()), "<|endoftext|>")[0])


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


# As Llama 2's: words begin with U+2581, bytes are <0x41>

SPACE = "\u2581"
ANY = st.text(
    st.sampled_from("the cat  \n12") | st.characters(codec="utf-8", exclude_characters=SPACE)
)
WORDS = ["t", "h", "e", SPACE, "th", "he", "the", f"{SPACE}the", SPACE * 2]
PAIRS = [("t", "h"), ("th", "e"), (SPACE, "the"), ("h", "e"), (SPACE, SPACE)]


def spaces(scheme="prepend", **changes):
    """The library's tokenizer of `WORDS`, with begin-of-text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    controls = ["<unk>", "<s>", "</s>"]
    tokens = [*controls, *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    settings = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True} | changes
    made = Tokenizer(models.BPE(vocabulary, PAIRS, **settings))
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in controls])
    replace = normalizers.Replace(" ", SPACE)
    if scheme == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif scheme == "replace":
        made.normalizer = replace
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    strip = [] if scheme in ("replace", "never") else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    made.encode_special_tokens = True
    made.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return made


SCHEMES = {scheme: spaces(scheme) for scheme in ("prepend", "replace", "first", "always", "never")}
SPACED = {
    scheme: HuggingFace("spaces", *canonical(json.loads(made.to_str()), "</s>")[0], begin_of_text=1)
    for scheme, made in SCHEMES.items()
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@every_scheme
@given(text=ANY)
def test_words_after_spaces_are_encoded_as_the_library_does(scheme, text):
    ours, theirs = SPACED[scheme], SCHEMES[scheme]
    ids = ours.encode(text)
    assert [1, *ids] == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    if scheme in ("prepend", "replace", "never"):  # the others drop a space that is there
        assert ours.decode(ids) == text
        assert ours.decode_bytes([1, *ids]) == b"<s>" + text.encode()


@every_scheme
@given(first=ANY, rest=ANY)
def test_what_goes_on_gives_the_ids_of_the_whole(scheme, first, rest):
    first, ours = first.rstrip() or "a", SPACED[scheme]
    for blank in " \n":
        more = blank + rest
        assert ours.encode(first) + ours.encode_more(more) == ours.encode(first + more)
        assert ours.decode_more([1, *ours.encode(first)], ours.encode_more(more)) == more.encode()


def test_words_after_spaces_have_controls():
    ours = SPACED["prepend"]
    assert (ours.begin_of_text, ours.end_of_text) == (1, 2)
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert not {0, 1, 2} & set(ours.encode("<s> <unk></s>"))
    assert ours.encode("the<") == [266, 3 + ord("<")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update({"e\n": 268}), "reaches over blanks"),
        (lambda c: c["model"]["vocab"].update({f"e{SPACE}": 268}), "reaches over blanks"),
        (lambda c: c["model"].update(ignore_merges=True), "ignore_merges joins words"),
        (lambda c: c["model"]["vocab"].pop("<0x41>"), "lacks a byte"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "splits text differently from Llama 2"),
        (lambda c: c.update(normalizer=None), "splits text differently from Llama 2"),
        (lambda c: c["decoder"]["decoders"].pop(), "does not decode as Llama 2"),
        (lambda c: c.update(decoder=None), "does not decode as Llama 2"),
        (lambda c: c["post_processor"]["single"].reverse(), "more than one token to every text"),
        (
            lambda c: c["post_processor"]["single"].append(c["post_processor"]["single"][0]),
            "more than one token to every text",
        ),
        (
            lambda c: c["added_tokens"].append(
                c["added_tokens"][0] | {"content": "<tool>", "id": 268, "special": False}
            ),
            "'<tool>' would have a space put after it",
        ),
    ],
)
def test_what_cuts_words_otherwise_is_refused(change, message):
    content = json.loads(SCHEMES["prepend"].to_str())
    change(content)
    with pytest.raises(ValueError, match=message):
        HuggingFace("spaces", *canonical(content, "</s>")[0], begin_of_text=1)


@pytest.mark.parametrize(("begin", "message"), [(999, "begin-of-text is 999"), (266, "'.the' is not a special")])  # fmt: skip
def test_a_begin_of_text_that_cannot_be_one(begin, message):
    with pytest.raises(ValueError, match=message):
        HuggingFace("spaces", SPACED["prepend"].source, 2, begin)


# As SmolLM2's: byte-level, each digit a word, and not every byte is a token

DIGITS = [bytes([b]) for b in range(256) if b not in range(1, 9)]


def smol():
    from tokenizers import pre_tokenizers

    made = library([b"<|im_start|>", *DIGITS, b"12", b" 1"], [("1", "2"), ("\u0120", "1")])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return made


SMOL = HuggingFace("smol", *canonical(json.loads(smol().to_str()), "<|endoftext|>")[0])


@given(st.text(st.sampled_from("ab 12\n") | st.characters(exclude_categories=["Cc", "Cs"])))
def test_digits_apart(text):
    ids = SMOL.encode(text)
    assert ids == smol().encode(text).ids
    assert SMOL.decode(ids) == text
    assert SMOL.begin_of_text is None
    with pytest.raises(DataError, match="the byte 0x01"):
        SMOL.encode(text + "\x01")


@given(st.text(st.sampled_from("ab 12\n")), st.text(st.sampled_from("ab 12\n")))
def test_digits_apart_in_parts(first, rest):
    first = first.rstrip() or "1"
    assert SMOL.encode(f"{first} {rest}") == SMOL.encode(first) + SMOL.encode_more(f" {rest}")
