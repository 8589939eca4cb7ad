"""Tokenizer files of other programs: each encodes as its own program does, or is refused."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import GptjaxError
from gptjax.tokenizers import tokenizer_json
from tests.conftest import ROOT
from tests.faults.tally import trials

FILES = trials(40)
LETTERS = "ab"
BYTES = [tokenizers.printable(bytes([b])) for b in range(256)]
SPACE = tokenizers.printable(b" ")
WORDS = st.text(st.sampled_from(LETTERS), max_size=20)
TEXTS = WORDS | st.text(
    st.sampled_from(LETTERS * 3 + "é\n<|>_ ") | st.characters(exclude_categories=["Cs"]),
    max_size=40,
)


@st.composite
def merge_lists(draw):
    """Pairs of the letters and of what pairs before made of them, each pair once."""
    known = [*LETTERS, SPACE]
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if pair not in merges:
            merges.append(pair)
            known.append("".join(pair))
    return merges


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
SETTINGS = [
    ("model", "dropout", 0.5),
    ("model", "unk_token", "a"),
    ("model", "continuing_subword_prefix", ""),
    ("model", "continuing_subword_prefix", "#"),
    ("model", "end_of_word_suffix", ""),
    ("model", "end_of_word_suffix", "_"),
    ("model", "byte_fallback", True),
    ("model", "ignore_merges", True),
    ("model", "fuse_unk", True),
    (
        "file",
        "truncation",
        {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
    ),
    ("file", "normalizer", {"type": "Lowercase"}),
    ("file", "normalizer", {"type": "NFC"}),
    ("file", "pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}),
    ("file", "pre_tokenizer", BYTE_LEVEL | {"use_regex": False}),
    ("file", "pre_tokenizer", {"type": "Whitespace"}),
    (
        "file",
        "pre_tokenizer",
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
        },
    ),
    ("file", "post_processor", BYTE_LEVEL),
    ("file", "post_processor", {"type": "BertProcessing", "sep": ["a", 64], "cls": ["b", 65]}),
    ("file", "decoder", None),
]


@st.composite
def files(draw):
    """The content of a ``tokenizer.json``, with merges in order or not, and settings that change
    what is encoded.
    """
    merges = draw(merge_lists())
    tokens = [*BYTES, *dict.fromkeys(map("".join, merges))]
    tokens = draw(st.just(tokens) | st.permutations(tokens))
    merges = draw(st.just(merges) | st.permutations(merges))
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = [{"content": "<|endoftext|>"} | dict.fromkeys(flags, True)] * draw(st.integers(0, 1))
    for content in draw(
        st.just([])
        | st.lists(st.sampled_from(["<ab>", "ab", "a b", "é", "_"]), unique=True, max_size=2)
    ):
        added.append({"content": content} | {flag: draw(st.booleans()) for flag in flags})
    new = itertools.count(len(tokens))
    for token in added:
        token["id"] = model["vocab"].get(token["content"]) or next(new)
    parts = {
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "model": model,
    }
    where, name, value = draw(st.just(("file", "version", "1.0")) | st.sampled_from(SETTINGS))
    (model if where == "model" else content)[name] = value
    return content


def test_a_tokenizer_json_encodes_as_its_library_or_is_refused(tally, tmp_path):
    from tokenizers import Tokenizer

    counts = {"refused": 0, "ranks": 0, "library": 0}
    wrong = []
    path = tmp_path / "tokenizer.json"

    @settings(max_examples=FILES, suppress_health_check=list(HealthCheck))
    @given(files(), st.lists(TEXTS, min_size=8, max_size=8))
    def one(content, texts):
        path.write_text(json.dumps(content))
        try:
            ours = tokenizer_json.read(tmp_path)
        except GptjaxError as error:
            wrong.extend(["more than a sentence"] * ("\n" in str(error)))
            counts["refused"] += 1
            return
        counts["ranks" if ours.kind == "bpe" else "library"] += 1
        theirs = Tokenizer.from_file(str(path))
        theirs.encode_special_tokens = True
        for text in ["the he", *texts]:
            expected = theirs.encode(text).ids
            wrong.extend([(content["model"]["merges"], text)] * (ours.encode(text) != expected))
            wrong.extend(
                [(ours.name, text)]
                * (ours.decode(expected) != theirs.decode(expected, skip_special_tokens=False))
            )

    one()
    assert all(counts.values()), counts
    assert not wrong, wrong[:3]
    tally(
        "tokenizer files against their own program",
        sum(counts.values()),
        sum(counts.values()) - len(wrong),
    )


def test_merge_lists_encode_as_their_library(tally, tmp_path):
    """None is refused: merges alone are all that differs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tried = wrong = 0

    @settings(max_examples=FILES, suppress_health_check=list(HealthCheck))
    @given(merge_lists(), st.lists(TEXTS, min_size=8, max_size=8))
    def one(merges, texts):
        nonlocal tried, wrong
        vocabulary = {
            token: i
            for i, token in enumerate(
                [*BYTES, *dict.fromkeys(map("".join, merges)), "<|endoftext|>"]
            )
        }
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
        )
        theirs = Tokenizer(
            models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        )
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        ours = tokenizer_json.read(tmp_path)
        tried += 1
        wrong += any(ours.encode(text) != theirs.encode(text).ids for text in texts)

    one()
    tally("lists of merges against their own program", tried, tried - wrong)


TRAINING = """
import sys, random
from gptjax import cli, tokenizers
letters = random.Random(0)
text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6_000_000))
words = " ".join(text[i : i + 9] for i in range(0, len(text), 9))
def texts():
    yield words
    print("counting", flush=True)
with cli.reported_errors("training"):
    tokenizers.train_bpe(texts(), 500_000, "x")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_a_tokenizer_obeys_signals(tally, number):
    """Also while native code counts pairs, which here takes minutes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    tried = held = 0
    for _ in range(trials(1)):
        command = [sys.executable, "-c", TRAINING]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout.readline() == "counting\n"
            time.sleep(random.Random(tried).random())
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        tried += 1
        held += (process.returncode, errors) == (130, "training: error: interrupted\n")
    tally("signals while a tokenizer is trained", tried, held)
