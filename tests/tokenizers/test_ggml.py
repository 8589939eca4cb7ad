"""Tokenizers in GGUF's metadata encode as the libraries that own them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.datasets import text as text_files
from gptjax.errors import DataError, FormatError
from gptjax.tokenizers import ggml, hugging_face, tokenizer_json
from gptjax.tokenizers.bpe import PRINTABLE

TEXTS = ["the cat sat on the mat 1999", "a catalogue of the 12 cats, and 3 mats"] * 9
PATH = Path("m.gguf")


def smollm():
    """Metadata as SmolLM2's: controls first, digits apart, not all bytes; and the library's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [PRINTABLE[byte] for byte in range(256) if byte not in (0, 1, 255)]
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=controls, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(TEXTS, trainer)
    content = json.loads(theirs.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    kinds = np.array([3 if token in controls else 1 for token in tokens], "<i4")
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(pair) for pair in content["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}, theirs


FIELDS, THEIRS = smollm()
OURS = ggml.from_fields(PATH, FIELDS)


@given(st.text() | st.text("the cats 0123456789é\n \t'll", max_size=60))
def test_it_encodes_as_the_library_does(text):
    if any(chr(byte) in text for byte in (0, 1)):
        with pytest.raises(DataError, match="which the vocabulary m lacks"):
            OURS.encode(text)
        return
    expected = THEIRS.encode(text, add_special_tokens=False).ids
    assert OURS.encode(text) == expected
    assert OURS.decode(expected) == text


@pytest.mark.parametrize("pre", hugging_face.PRE_TOKENIZERS)
def test_its_content_is_as_the_library_writes_it(pre):
    """So that it is equal to the same tokenizer read from a ``tokenizer.json``, and has its hash."""
    ours = ggml.from_fields(PATH, FIELDS | {"tokenizer.ggml.pre": pre})
    library = hugging_face.read_library(ours.source)
    (source, end), known = hugging_face.canonical(json.loads(library.to_str()), "<|im_end|>")
    assert ours == hugging_face.HuggingFace(ours.name, source, end, ours.begin_of_text, known=known)


def test_the_content_is_kept_as_text_alone():
    """Read, it would take more memory than all else together."""
    parsed = OURS.parsed
    assert parsed == json.loads(OURS.source)
    assert not any(value == parsed for value in vars(OURS).values())


def test_end_of_text_is_special_whatever_its_kind():
    kinds = FIELDS["tokenizer.ggml.token_type"].copy()
    kinds[2] = ggml.USER_DEFINED
    ours = ggml.from_fields(PATH, FIELDS | {"tokenizer.ggml.token_type": kinds})
    assert ours.same_as(OURS)


def test_controls_have_ids_that_text_never_gets():
    assert OURS.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (OURS.begin_of_text, OURS.end_of_text, OURS.vocab_size) == (None, 2, 270)
    assert not {0, 1, 2} & set(OURS.encode("<|im_start|> <|im_end|> <|endoftext|>"))
    begins = ggml.from_fields(PATH, FIELDS | {"tokenizer.ggml.add_bos_token": True})
    assert begins.begin_of_text == 1
    assert not begins.same_as(OURS)


@pytest.mark.parametrize("size", [270, 280])
def test_what_is_written_is_read_back(tmp_path, size):
    for begins in (False, True):
        own = ggml.from_fields(PATH, FIELDS | {"tokenizer.ggml.add_bos_token": begins})
        found = ggml.from_fields(PATH, ggml.fields_of(own, size, "a template"))
        assert found.vocab_size == size
        for text in TEXTS:
            assert found.encode(text) == own.encode(text)
        assert (found.begin_of_text, found.end_of_text) == (own.begin_of_text, own.end_of_text)
        own.save(tmp_path / "t.json")
        assert tokenizers.load(tmp_path / "t.json") == own
    assert found.same_as(own) == (size == 270)
    assert ggml.chat_template(ggml.fields_of(own, size, "a template")) == "a template"


@given(st.text())
def test_ranks_of_merges_become_the_same_ids(text):
    own = tokenizers.train_bpe(TEXTS, 270, "cats")
    found = ggml.from_fields(PATH, ggml.fields_of(own, 270))
    assert found.encode(text) == own.encode(text)
    assert found.end_of_text == own.end_of_text == 269


def by_scores():
    words = [" ", "t", "h", "e", "c", "a", "th", "the", " the", "ca", " ca", "\n"]
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words))]
    return tokenizers.Llama2c(tuple(t.encode() for t in tokens), tuple(scores), "m")


@given(st.text() | st.text("the cat", max_size=40), st.sampled_from([0, 3]))
def test_scores_survive(text, padding):
    own = by_scores()
    fields = ggml.fields_of(own, own.vocab_size + padding)
    assert fields["tokenizer.ggml.tokens"][259] == "\N{LOWER ONE EIGHTH BLOCK}"
    assert len(fields["tokenizer.ggml.tokens"]) == own.vocab_size + padding
    found = ggml.from_fields(PATH, fields)
    assert found.same_as(own)
    assert found.encode(text) == own.encode(text)


def with_two_more(own):
    """Metadata as of a model that was taught ChatML, its new tokens after the vocabulary's."""
    fields = ggml.fields_of(own, own.vocab_size)
    tokens = [*fields["tokenizer.ggml.tokens"], "<|im_start|>", "<|im_end|>"]
    more = {
        "tokens": tokens,
        "scores": np.append(fields["tokenizer.ggml.scores"], np.float32([0, 0])),
        "token_type": np.append(fields["tokenizer.ggml.token_type"], [3, 4]).astype("<i4"),
        "eos_token_id": own.vocab_size + 1,
    }
    return fields | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


@given(st.text() | st.text("the cat", max_size=40))
def test_special_tokens_may_follow_the_scores(text):
    own = by_scores()
    found = ggml.from_fields(PATH, with_two_more(own))
    assert found.encode(text) == own.encode(text)
    n = own.vocab_size
    assert found.special_tokens == own.special_tokens | {"<|im_start|>": n, "<|im_end|>": n + 1}
    assert (found.begin_of_text, found.end_of_text, found.vocab_size) == (1, n + 1, n + 2)
    assert ggml.from_fields(PATH, ggml.fields_of(found, n + 5)).same_as(found)


def test_the_real_vocabulary_survives(shared):
    own = tokenizers.find(shared / "llama2c" / "tok512.bin")
    assert ggml.from_fields(PATH, ggml.fields_of(own, 512)).same_as(own)


def test_sentencepiece_is_written_by_its_scores():
    pytest.importorskip("sentencepiece")
    own = tokenizers.train_sentencepiece(TEXTS * 9, 290, "cats")
    assert ggml.can_write(own)
    found = ggml.from_fields(PATH, ggml.fields_of(own, own.vocab_size))
    for text in [*TEXTS[:2], "a café", "\n  mats"]:
        assert found.encode(text) == own.encode(text)


def test_other_kinds_are_left_out():
    own = tokenizers.train_characters(["the cat"])
    assert not ggml.can_write(own)
    assert not ggml.can_write(None)
    assert ggml.fields_of(own, 9) == {"tokenizer.ggml.model": "none"}
    with pytest.raises(FormatError, match="m.gguf holds no tokenizer"):
        ggml.from_fields(PATH, ggml.fields_of(own, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "has a tokenizer of kind 't5'"),
        ({"pre": "falcon"}, "with the pre-tokenizer 'falcon', but"),
        ({"pre": 3}, "with the pre-tokenizer 3, but"),
        ({"tokens": None}, "has no usable tokenizer.ggml.tokens"),
        ({"tokens": []}, "has no usable tokenizer.ggml.tokens"),
        ({"tokens": ["a"] * 270}, "holds no byte-level BPE"),
        ({"merges": ["a"]}, "holds no byte-level BPE"),
        ({"merges": ["zz q"]}, "holds no byte-level BPE"),
        ({"token_type": np.ones(3, "<i4")}, "has no tokenizer.ggml.token_type of its 270 tokens"),
        ({"eos_token_id": 270}, "has tokenizer.ggml.eos_token_id 270 of 270 tokens"),
        ({"eos_token_id": "x"}, "has tokenizer.ggml.eos_token_id 'x' of 270 tokens"),
        ({"bos_token_id": -1}, "has tokenizer.ggml.bos_token_id -1"),
    ],
)
def test_damaged_metadata_are_refused(changes, message):
    fields = FIELDS | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(FormatError, match=message):
        ggml.from_fields(PATH, fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": 5}, "bos_token_id 5, but 1 is expected"),
        ({"add_space_prefix": False}, "add_space_prefix False, but True"),
        ({"scores": None}, "has no tokenizer.ggml.scores"),
        ({"scores": np.full(271, np.nan, "<f4")}, "holds no tokenizer that is known here"),
        ({"tokens": ["a"] * 271}, "holds no tokenizer that is known here"),
        ({"token_type": np.array([1] * 265 + [3] + [1] * 5)}, "special token 'th' among others"),
    ],
)
def test_damaged_scores_are_refused(changes, message):
    fields = ggml.fields_of(by_scores(), 271)
    fields |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(FormatError, match=message):
        ggml.from_fields(PATH, {k: v for k, v in fields.items() if v is not None})


def llama_bpe():
    """Metadata as of Llama 3, and the library's own tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE(ignore_merges=True))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(hugging_face.LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*TEXTS, "in 1999.\n\nThe 'CAT'S' mats...\n"] * 3
    theirs.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    theirs.add_special_tokens([AddedToken("<|begin|>"), AddedToken("<|end|>")])
    vocabulary = theirs.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    fields = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": np.array([1] * (len(tokens) - 2) + [3, 3], "<i4"),
        "merges": [" ".join(m) for m in json.loads(theirs.to_str())["model"]["merges"]],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}, theirs


LLAMA3, THEIRS3 = llama_bpe()
OURS3 = ggml.from_fields(PATH, LLAMA3)


@given(st.text() | st.text("the CATS 0123456789é\n \t'll.,", max_size=60))
def test_llama_3s_words_are_the_librarys(text):
    expected = THEIRS3.encode(text, add_special_tokens=False).ids
    assert OURS3.encode(text) == expected
    assert OURS3.decode(expected) == text


def test_llama_3_begins_with_its_begin_and_survives_other_formats(tmp_path):
    n = OURS3.vocab_size
    assert (OURS3.begin_of_text, OURS3.end_of_text) == (n - 2, n - 1)
    assert ggml.from_fields(PATH, ggml.fields_of(OURS3, n)).same_as(OURS3)
    tokenizer_json.write(tmp_path, OURS3)
    found = tokenizer_json.read(tmp_path)
    assert (found.begin_of_text, found.end_of_text) == (n - 2, n - 1)
    assert found.encode(TEXTS[1]) == OURS3.encode(TEXTS[1])


@pytest.mark.parametrize("own", [OURS3, OURS])
def test_cuts_of_a_long_text_change_no_ids(own, tmp_path, monkeypatch):
    """Of Llama 3, a word may be a full stop and the line ends after it."""
    monkeypatch.setattr(text_files, "PIECE", 24)
    text = "The cat...\n\nsat, 12345 mats.\n \n It's  a\ncatalogue;\n\tand 3 " * 9
    (tmp_path / "long.txt").write_text(text)
    parts = [piece.text for piece in text_files.pieces([tmp_path / "long.txt"])]
    assert len(parts) > 9
    assert [i for part in parts for i in own.encode(part)] == own.encode(text)


def test_a_long_text_is_cut_where_digits_change_nothing():
    """Documents are encoded in parts, cut before blanks."""
    texts = ["a cat 12", "  34  the\n\n mat", " 5"]
    for parts in itertools.permutations(texts):
        whole = "x" + "".join(f" {part.strip()}" for part in parts)
        apart = ["x", *(f" {part.strip()}" for part in parts)]
        assert OURS.encode(whole) == [i for part in apart for i in OURS.encode(part)]
