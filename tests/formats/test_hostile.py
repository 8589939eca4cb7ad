"""Every file that the project reads, damaged at random: it loads, or is refused in one sentence, in
bounded memory.

``GPTJAX_FUZZ=20000 pytest tests/formats/test_hostile.py`` tries that many cases of each format; by
default it is a few.
"""

import dataclasses
import gzip
import json
import os
import re
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from gptjax import tokenizers
from gptjax.convert.__main__ import inspect
from gptjax.convert.weights import open_weights
from gptjax.datasets.text import pieces
from gptjax.errors import GptjaxError
from gptjax.formats import gguf, hf, llama2c, llmc, llmc_eval, llmc_tokenizer, safetensors
from gptjax.formats.llama2c_tokenizer import BYTES
from gptjax.formats.token_shards import open_shard, write_shard
from gptjax.tokenizers import ggml, tokenizer_json
from tests.formats.test_llmc_eval import EXAMPLE, evaluation_file
from tests.formats.test_recognise import llama2c_tokenizer
from tests.models import tiny
from tests.models.fused import fuse

CASES = int(os.environ.get("GPTJAX_FUZZ", "40"))
MOST_BYTES = 32 << 20  # the files have a few thousand
MOST_SECONDS = 20  # they take milliseconds
CFG = tiny.config(
    num_layers=1, channels=4, num_heads=2, vocab_size=5, max_seq_len=4, dtype="float32"
)
PARAMS = tiny.params(CFG, jnp.float32)
BPE = tokenizers.train_bpe(["the cat sat on the mat"] * 9, 262, "cats")
FLOAT32 = np.dtype("<f4")
LLAMA = dataclasses.replace(CFG, family="llama", num_kv_heads=1, hidden=8)
LLAMA_PARAMS = tiny.params(LLAMA, jnp.float32)
CONTROLS = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
WORDS = tokenizers.Llama2c((*CONTROLS, *BYTES, b"th", b" t", b"t", b"h", b" "), (0.0,) * 264)
MORE_WORDS = tokenizer_json.from_scores(WORDS, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")


def shard(path):
    return open_shard(path).tokens.sum()


def weights(path):
    jax.tree.map(np.asarray, open_weights(str(path)).params)


IDS = np.arange(4, dtype=np.int32).reshape(1, 4)
STATE = llmc.DebugState(IDS, IDS, np.zeros((1, 4, 5), np.float32), 1.0, PARAMS)


def write_version_1(path):
    """Version 3 without the vocabulary's pad rows."""
    llmc.write_model(path, PARAMS, CFG)
    content = path.read_bytes()
    rows = 1024 + 4 * CFG.channels * CFG.vocab_size, 1024 + 4 * CFG.channels * CFG.padded_vocab_size
    path.write_bytes(
        content[:4] + (1).to_bytes(4, "little") + content[8 : rows[0]] + content[rows[1] :]
    )


def write_version_4(path):
    """Version 5 with the LayerNorms in float32."""
    llmc.write_model(path, PARAMS, CFG, 5)
    content, wide, offset = path.read_bytes(), [], 1024
    for name, tensor in fuse(PARAMS).items():
        count = tensor.size
        part = content[offset : offset + 2 * count]
        wide.append(
            np.frombuffer(part, jnp.bfloat16).astype("<f4").tobytes()
            if name.startswith("ln")
            else part
        )
        offset += 2 * count
    path.write_bytes(content[:4] + (4).to_bytes(4, "little") + content[8:1024] + b"".join(wide))


def write_index(path):
    """A Hugging Face model in two files, and the index that says which tensor is where."""
    hf.write_model(path.parent, PARAMS, CFG, FLOAT32, None, lambda into: None)
    tensors = load_file(path.parent / "model.safetensors")
    (path.parent / "model.safetensors").unlink()
    places = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_file(
            {name: tensors[name] for name in tensors if places[name] == place}, path.parent / place
        )
    path.write_text(json.dumps({"weight_map": places}))


def write_table(path):
    parquet.write_table(pyarrow.table({"text": ["some text", "and more"], "n": [1, 2]}), path)


def write_gguf(path, kind="F32", fields=None):
    """A Llama with a tokenizer."""
    pytest.importorskip("gguf")
    sizes = {"family": "llama", "channels": 32, "num_kv_heads": 1, "vocab_size": 266}
    cfg = tiny.config(dtype="float32", **sizes)
    fields = fields or ggml.fields_of(BPE, 266, "a template")
    gguf.write_model(path, tiny.params(cfg, jnp.float32), cfg, kind, fields)


ZSTD = pyarrow.Codec("zstd")

# Of each format: the file's name, what writes it, what reads all of it.
FORMATS = {
    "llm.c model": ("m.bin", lambda p: llmc.write_model(p, PARAMS, CFG), weights),
    "llm.c bfloat16 model": ("m.bin", lambda p: llmc.write_model(p, PARAMS, CFG, 5), weights),
    "llm.c model, version 1": ("m.bin", write_version_1, weights),
    "llm.c model, version 4": ("m.bin", write_version_4, weights),
    "llm.c debug state, version 1": (
        "s.bin",
        lambda p: llmc.write_debug_state(p, STATE, CFG, 1),
        lambda p: llmc.read_debug_state(p, CFG),
    ),
    "llm.c debug state": (
        "s.bin",
        lambda p: llmc.write_debug_state(p, STATE, CFG),
        lambda p: llmc.read_debug_state(p, CFG),
    ),
    "llm.c tokenizer": (
        "t.bin",
        lambda p: llmc_tokenizer.write_tokenizer(p, BPE.pieces, 261),
        lambda p: tokenizers.find(str(p)).encode("the mat"),
    ),
    **{
        f"llama2.c model, version {version}": (
            "m.bin",
            lambda p, version=version: llama2c.write_model(p, LLAMA_PARAMS, LLAMA, version),
            weights,
        )
        for version in llama2c.VERSIONS
    },
    "llama2.c tokenizer": (
        "t.bin",
        lambda p: p.write_bytes(llama2c_tokenizer([*CONTROLS, *BYTES, b"a", b" a"])),
        lambda p: tokenizers.find(str(p)).encode("a cat"),
    ),
    "uint16 shard": ("train.bin", lambda p: write_shard(p, np.arange(99)), shard),
    "uint32 shard": ("train.bin", lambda p: write_shard(p, np.arange(99), np.uint32), shard),
    "uint16 without a header": (
        "train.bin",
        lambda p: np.arange(300, 399, dtype="<u2").tofile(p),
        shard,
    ),
    "int32 without a header": ("train.bin", lambda p: np.arange(99, dtype="<i4").tofile(p), shard),
    "our safetensors": (
        "m.safetensors",
        lambda p: safetensors.write_model(p, PARAMS, CFG, FLOAT32),
        weights,
    ),
    "Hugging Face safetensors": (
        "hf/model.safetensors",
        lambda p: hf.write_model(p.parent, PARAMS, CFG, FLOAT32, None, lambda into: None),
        lambda p: weights(p.parent),
    ),
    "Hugging Face index": (
        "hf/model.safetensors.index.json",
        write_index,
        lambda p: weights(p.parent),
    ),
    "Hugging Face config": (
        "hf/config.json",
        lambda p: hf.write_model(p.parent, PARAMS, CFG, FLOAT32, None, lambda into: None),
        lambda p: weights(p.parent),
    ),
    "Hugging Face config of a Llama": (
        "hf/config.json",
        lambda p: hf.write_model(p.parent, LLAMA_PARAMS, LLAMA, FLOAT32, None, lambda into: None),
        lambda p: weights(p.parent),
    ),
    "Hugging Face tokenizer of a Llama": (
        "tokenizer.json",
        lambda p: tokenizer_json.write(p.parent, WORDS),
        lambda p: tokenizer_json.read(p.parent).encode("the mat"),
    ),
    "Hugging Face tokenizer": (
        "tokenizer.json",
        lambda p: tokenizer_json.write(p.parent, BPE),
        lambda p: tokenizer_json.read(p.parent),
    ),
    "our tokenizer": ("t.json", BPE.save, lambda p: tokenizers.find(str(p)).encode("the mat")),
    "characters": (
        "t.json",
        tokenizers.train_characters(["the cat"]).save,
        lambda p: tokenizers.find(str(p)).decode([0, 1, 2]),
    ),
    "llm.c evaluation file": (
        "e.bin",
        lambda p: p.write_bytes(evaluation_file([EXAMPLE, EXAMPLE])),
        lambda p: [question.endings[question.label] for question in llmc_eval.read_questions(p)],
    ),
    "GGUF": ("m.gguf", write_gguf, weights),
    "GGUF in 8 bits": ("m.gguf", lambda p: write_gguf(p, "Q8_0"), weights),
    "GGUF tokenizer": (
        "m.gguf",
        write_gguf,
        lambda p: tokenizers.find(str(p)).encode("the mat"),
    ),
    "GGUF tokenizer by scores": (
        "m.gguf",
        lambda p: write_gguf(p, fields=ggml.fields_of(MORE_WORDS, 266)),
        lambda p: tokenizers.find(str(p)).encode("the mat"),
    ),
    "Parquet": ("a.parquet", write_table, lambda p: list(pieces([p]))),
    "gzip": (
        "a.txt.gz",
        lambda p: p.write_bytes(gzip.compress(b"some text " * 9, mtime=0)),
        lambda p: list(pieces([p])),
    ),
    "Zstandard": (
        "a.txt.zst",
        lambda p: p.write_bytes(ZSTD.compress(b"some text " * 9, asbytes=True)),
        lambda p: list(pieces([p])),
    ),
    "JSON lines": (
        "a.jsonl",
        lambda p: p.write_text(json.dumps({"text": "a"}) + "\n"),
        lambda p: list(pieces([p])),
    ),
    "anything": ("m.bin", lambda p: llmc.write_model(p, PARAMS, CFG), lambda p: inspect(str(p))),
}
MAGIC = [20240326, 20240327, 20240520, 20240801, 20240328, 20240522]
EXTREME = [0, 1, -1, 2, 7, 255, 2**15, 2**16, 2**24, 2**31 - 1, -(2**31), *MAGIC]


NUMBERS = [
    b"0",
    b"-1",
    b"3",
    b"200000",
    b"16777217",
    b"1" * 30,
    b"1e400",
    b"0.5",
    b"null",
    b"true",
    b'""',
    b"[" * 3000,
]


@st.composite
def damage(draw, content: bytes) -> bytes:
    """The content after one to three blows."""
    for _ in range(draw(st.integers(1, 3))):
        position = draw(
            st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(len(content), 80))
        )
        how = draw(
            st.sampled_from(
                ["byte", "byte", "number", "number", "digits", "cut", "grow", "swap", "repeat"]
            )
        )
        rest = content[position:]
        if how == "byte":
            found = draw(st.binary(min_size=1, max_size=8))
            content = content[:position] + found + rest[len(found) :]
        elif how == "number":
            position -= position % 4
            content = (
                content[:position]
                + draw(st.sampled_from(EXTREME)).to_bytes(4, "little", signed=True)
                + rest[4:]
            )
        elif how == "digits":
            found = re.search(rb"\d+", rest)
            if found:
                content = (
                    content[:position]
                    + rest[: found.start()]
                    + draw(st.sampled_from(NUMBERS))
                    + rest[found.end() :]
                )
        elif how == "cut":
            content = content[:position]
        elif how == "grow":
            content = content + draw(st.binary(max_size=64))
        elif how == "swap":
            content = rest + content[:position]
        else:
            content = content[:position] + rest[:32] + rest
    return content


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_load_or_are_refused(kind, tmp_path):
    name, write, read = FORMATS[kind]
    path = tmp_path / name
    write(path)
    read(path)
    whole = path.read_bytes()
    counts = {"loaded": 0, "refused": 0}
    sentences = set()

    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
    @given(damage(whole))
    def one(content):
        path.write_bytes(content)
        tracemalloc.start()
        pyarrow.default_memory_pool().release_unused()
        arrow, began = pyarrow.default_memory_pool().max_memory(), time.perf_counter()
        try:
            read(path)
            counts["loaded"] += 1
        except GptjaxError as error:
            counts["refused"] += 1
            sentences.add(str(error))
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < MOST_BYTES
        assert pyarrow.default_memory_pool().max_memory() <= max(arrow, MOST_BYTES)
        assert time.perf_counter() - began < MOST_SECONDS

    one()
    print(f"{kind}: {counts}")
    assert sentences
    assert not [sentence for sentence in sentences if "\n" in sentence or not sentence]
