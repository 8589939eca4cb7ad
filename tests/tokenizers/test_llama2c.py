"""llama2.c's encoding, against its loop as run.c has it."""

import math
import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import FormatError
from gptjax.formats import llama2c_tokenizer
from gptjax.tokenizers import Llama2c
from gptjax.tokenizers.__main__ import main
from tests.formats.test_llama2c_tokenizer import CONTROLS, WHOLE

BYTES = [f"<0x{b:02X}>".encode() for b in range(256)]
# Merges that compete and chain, equal scores, a character that only a longer token has (z), one of
# several bytes, and texts of controls
TEXTS = [
    "",
    "a",
    "b",
    "c",
    "aa",
    "ab",
    "bc",
    "abc",
    "aab",
    "bz",
    "é",
    "éa",
    "<s>",
    "<",
    "<s",
    "s>",
    "<0x41>",
]
TEXTS = [" ", *filter(None, TEXTS), " a", " ab", "  ", "a b"]
RANKED = [-float(i % 7) for i in range(len(TEXTS))]
TOKENIZER = Llama2c(
    (*CONTROLS, *BYTES, *(text.encode() for text in TEXTS)), (*[0.0] * 259, *RANKED), "letters"
)
ALPHABET = st.text(st.sampled_from(" abczé<s>0x41\n日"), max_size=14)


def run_c(text: str) -> list[int]:
    """The ids of a text after BOS: see llama2.c's encode(), but that controls are never found."""
    known: dict[str, int] = {}
    for i, token in enumerate(TEXTS, 259):
        known.setdefault(token, i)
    ids: list[int] = []
    for character in (" " + text) if text else "":
        ids += [known[character]] if character in known else [3 + b for b in character.encode()]
    while True:
        best, place, found = -math.inf, None, None
        for i in range(len(ids) - 1):
            pair = [TEXTS[j - 259] if j >= 259 else None for j in ids[i : i + 2]]
            joined = known.get("".join(pair)) if None not in pair else None
            if joined is not None and TOKENIZER.scores[joined] > best:
                best, place, found = TOKENIZER.scores[joined], i, joined
        if place is None:
            return ids
        ids[place : place + 2] = [found]


@given(ALPHABET | st.text(max_size=20))
@settings(max_examples=300)
def test_the_ids_are_run_cs(text):
    ids = TOKENIZER.encode(text)
    assert ids == run_c(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode([1, *ids]) == text
    assert TOKENIZER.decode_bytes([1, *ids]) == b"<s>" + text.encode()
    assert min(ids, default=3) >= 3


@given(ALPHABET, ALPHABET)
def test_text_that_goes_on_gets_no_space(first, rest):
    ids = TOKENIZER.encode("x" + first) + TOKENIZER.encode_more(rest)
    assert TOKENIZER.decode(ids) == "x" + first + rest
    assert TOKENIZER.decode_more([1], TOKENIZER.encode(rest)) == rest.encode()


def test_a_long_word_takes_no_time_of_its_square():
    ids = TOKENIZER.encode("ab" * 100_000)
    assert TOKENIZER.decode(ids) == "ab" * 100_000


def test_controls_are_ids_and_never_text():
    assert (TOKENIZER.begin_of_text, TOKENIZER.end_of_text) == (1, 2)
    assert TOKENIZER.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert set(TOKENIZER.ends) == {1, 2}
    assert TOKENIZER.document_start == 1
    assert [TOKENIZER.decode([5, i]) for i in range(3)] == ["\x02<unk>", "\x02<s>", "\x02</s>"]
    assert TOKENIZER.decode([-1, 2**70]) == "\ufffd\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode("a\udc80b")) == "a\ufffdb"


def test_saved_loaded_and_sent_to_another_process(tmp_path):
    TOKENIZER.encode("ab")  # so that there is something that could not be sent
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for again in (tokenizers.find(tmp_path), pickle.loads(pickle.dumps(TOKENIZER))):
        assert again == TOKENIZER
        assert again.same_as(TOKENIZER)
        assert again.sha256 == TOKENIZER.sha256
        assert again.encode("abc aab") == TOKENIZER.encode("abc aab")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"tokens": t["tokens"][1:]},
        lambda t: {"scores": t["scores"][1:]},
        lambda t: {"scores": [math.nan, *t["scores"][1:]]},
        lambda t: {"scores": ["x", *t["scores"][1:]]},
        lambda t: {"tokens": ["", *t["tokens"][1:]]},
        lambda t: {"tokens": 3},
        lambda t: {"scores": None},
    ],
)
def test_a_damaged_file_of_ours_is_refused(change, tmp_path):
    class Damaged(Llama2c):
        def content(self):
            return super().content() | change(super().content())

    Damaged(TOKENIZER.tokens, TOKENIZER.scores).save(tmp_path / "t.json")
    with pytest.raises(FormatError, match="is not a gptjax tokenizer file"):
        tokenizers.load(tmp_path / "t.json")


def test_the_commands_take_its_file_and_export_it(tmp_path, capfdbinary):
    path = tmp_path / "tokenizer.bin"
    llama2c_tokenizer.write_tokenizer(path, TOKENIZER.tokens, TOKENIZER.scores)
    assert tokenizers.find(path).same_as(TOKENIZER)
    main(["encode", "--tokenizer", str(path), "ab", "c"])
    ids = capfdbinary.readouterr().out.split()
    assert list(map(int, ids)) == TOKENIZER.encode("ab c")
    main(["decode", "--tokenizer", str(path), *[i.decode() for i in ids]])
    assert capfdbinary.readouterr().out == b"ab c"
    TOKENIZER.save(tmp_path / "tokenizer.json")
    main(["export", "--tokenizer", str(tmp_path), "--output", str(tmp_path / "new.bin")])
    assert f"{259 + len(TEXTS)} tokens in".encode() in capfdbinary.readouterr().out
    assert (tmp_path / "new.bin").read_bytes() == path.read_bytes()


def test_ranks_are_no_scores_to_export(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                *("export", "--tokenizer", "byte", "--to", "llama2c"),
                *("--output", str(tmp_path / "new.bin")),
            ]
        )
    assert "llama2.c's file has a score for each token" in capsys.readouterr().err
    TOKENIZER.save(tmp_path / "t.json")
    with pytest.raises(SystemExit):
        main(
            [
                *("export", "--tokenizer", str(tmp_path / "t.json"), "--to", "llmc"),
                *("--output", str(tmp_path / "new.bin")),
            ]
        )
    assert "not the ranks of its merges" in capsys.readouterr().err
    assert not (tmp_path / "new.bin").exists()


def test_a_file_of_llama2_c_without_text_still_encodes_bytes(tmp_path):
    content = WHOLE[: -sum(8 + n for n in (1, 1, 2, 2))]
    (tmp_path / "t.bin").write_bytes(struct.pack("<I", 6) + content[4:])
    found = tokenizers.find(tmp_path / "t.bin")
    assert found.encode("a\n") == [3 + 32, 3 + 97, 3 + 10]
    assert found.decode(found.encode("a\n")) == "a\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("I believe the meaning of life is", [306, 4658, 278, 6593, 310, 2834, 338]),
        (
            "Simply put, the theory of relativity states that ",
            [3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871],
        ),
    ],
)
def test_llama_2s_own_vocabulary(text, expected, shared):
    """The ids are those that llama2.c's test.c expects after BOS."""
    found = tokenizers.find(shared / "llama2c" / "tokenizer.bin")
    assert found.encode(text) == expected
