"""Tokenizer files of other programs: each encodes as its own program does, or is refused."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import GptjaxError
from gptjax.formats import hf_tokenizer
from tests.faults.tally import trials

FILES = trials(40)
ALPHABET = "the a"
BYTES = [tokenizers.printable(bytes([b])) for b in range(256)]
SPACE = tokenizers.printable(b" ")
TEXTS = st.text(st.sampled_from(ALPHABET * 3 + "é\n<|>_") | st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def merge_lists(draw):
    """Pairs of the letters and of what pairs before made of them, each pair once."""
    known = [c for c in ALPHABET if c != " "] + [SPACE]
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if pair not in merges:
            merges.append(pair)
            known.append("".join(pair))
    return merges


@st.composite
def files(draw):
    """The content of a ``tokenizer.json``, with merges in order or not, and settings that change what is encoded."""
    merges = draw(merge_lists())
    tokens = [*draw(st.permutations(BYTES) | st.just(BYTES)), *dict.fromkeys(map("".join, merges))]
    if draw(st.booleans()):
        tokens = draw(st.permutations(tokens))
    if draw(st.integers(0, 3)) == 0:
        merges = draw(st.permutations(merges))
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    settings = {
        "dropout": [None, 0.5],
        "unk_token": [None, "a"],
        "continuing_subword_prefix": [None, "", "#"],
        "end_of_word_suffix": [None, "", "_"],
        "byte_fallback": [False, True],
        "ignore_merges": [False, True],
        "fuse_unk": [False, True],
    }
    model |= {name: draw(st.sampled_from([values[0]] * 8 + values)) for name, values in settings.items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = [
        {"content": content, "special": draw(st.booleans())} | {flag: draw(st.booleans()) for flag in flags}
        for content in draw(
            st.lists(st.sampled_from(["<|endoftext|>", "<the>", "th", "t h", "é", "_"]), unique=True, max_size=3)
        )
    ]
    new = iter(range(len(tokens), len(tokens) + len(added)))
    for token in added:
        token["id"] = model["vocab"].get(token["content"]) or next(new)
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    rare = {
        "normalizer": [None, {"type": "Lowercase"}, {"type": "NFC"}],
        "pre_tokenizer": [before, before | {"add_prefix_space": True}, {"type": "Whitespace"}],
        "post_processor": [None, before, {"type": "BertProcessing", "sep": ["a", 64], "cls": ["b", 65]}],
        "decoder": [before, None],
    }
    parts = {name: draw(st.sampled_from([values[0]] * 8 + values)) for name, values in rare.items()}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "model": model}


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
            ours = hf_tokenizer.read(tmp_path)
        except GptjaxError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
            return
        counts["ranks" if ours.kind == "bpe" else "library"] += 1
        theirs = Tokenizer.from_file(str(path))
        theirs.encode_special_tokens = True
        for text in ["the he", *texts]:
            expected = theirs.encode(text).ids
            wrong.extend([(content["model"]["merges"], text)] * (ours.encode(text) != expected))
            wrong.extend([(ours.name, text)] * (ours.decode(expected) != theirs.decode(expected, skip_special_tokens=False)))

    one()
    assert all(counts.values()), counts
    tally("tokenizer files against their own program", sum(counts.values()), sum(counts.values()) - len(wrong))


def test_merge_lists_encode_as_their_library(tally, tmp_path):
    """None is refused: merges alone are all that differs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tried = wrong = 0

    @settings(max_examples=FILES, suppress_health_check=list(HealthCheck))
    @given(merge_lists(), st.lists(TEXTS, min_size=8, max_size=8))
    def one(merges, texts):
        nonlocal tried, wrong
        vocabulary = {token: i for i, token in enumerate([*BYTES, *dict.fromkeys(map("".join, merges)), "<|endoftext|>"])}
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        theirs = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        ours = hf_tokenizer.read(tmp_path)
        tried += 1
        wrong += any(ours.encode(text) != theirs.encode(text).ids for text in ["the he", *texts])

    one()
    tally("lists of merges against their own program", tried, tried - wrong)
