"""The smallest file of each kind, and what only begins like one."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.formats import llmc, llmc_eval, llmc_tokenizer, token_shards
from gptjax.formats.recognise import LLMC, recognise


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return file.getvalue()


def numpy_file(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


def llama2c(vocabulary):
    """Version 0 of 2 layers, 8 wide, 4 heads, 2 key-value heads, hidden 12, 16 positions."""
    dim, hidden, layers, heads, kv, positions = 8, 12, 2, 4, 2, 16
    attention = [dim * dim, dim * kv * dim // heads, dim * kv * dim // heads, dim * dim]
    block = 2 * dim + sum(attention) + 3 * dim * hidden
    rope = 2 * positions * (dim // heads // 2)
    numbers = abs(vocabulary) * dim * (1 + (vocabulary < 0)) + layers * block + dim + rope
    return struct.pack("<7i", dim, hidden, layers, heads, kv, vocabulary, positions) + bytes(
        4 * numbers
    )


def llama2c_tokenizer(tokens):
    entries = [struct.pack("<fI", -n, len(token)) + token for n, token in enumerate(tokens)]
    return struct.pack("<I", max(map(len, tokens))) + b"".join(entries)


def sentencepiece(tokens):
    pieces = [
        b"\n" + bytes([len(t)]) + t + b"\x15" + struct.pack("<f", -n) for n, t in enumerate(tokens)
    ]
    return b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces)


SAFETENSORS = json.dumps({"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()
FILES = {
    "a llama2.c model (version 0)": [llama2c(32), llama2c(-32)],
    "a llama2.c model (version 1)": [
        struct.pack("<I8i", 0x616B3432, 1, 8, 12, 2, 4, 2, 32, 16) + bytes(220)
    ],
    "a llama2.c model (version 2)": [
        struct.pack("<I8i", 0x616B3432, 2, 8, 12, 2, 4, 2, 32, 16) + bytes(220)
    ],
    "a llama2.c tokenizer": [llama2c_tokenizer([b"<unk>", b"\n<s>\n", b"a"])],
    "a SentencePiece model": [sentencepiece([b"<unk>", b"<s>", b"</s>"])],
    "a GGUF model": [b"GGUF" + struct.pack("<IQQ", 3, 0, 0)],
    "a PyTorch checkpoint (a zip of pickles)": [zipped("archive/data.pkl", "archive/data/0")],
    "a PyTorch checkpoint (a pickle)": [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    ],
    "a Python pickle": [pickle.dumps({"stoi": {"a": 0}}, protocol) for protocol in (2, 3, 4, 5)],
    "a NumPy array (.npy)": [numpy_file(np.save, np.arange(9))],
    "a NumPy archive (.npz)": [numpy_file(np.savez, np.arange(9))],
    "an ONNX model": [b"\x08\x08\x12\x07pytorch\x1a\x052.3.0:\x00"],
    "a TensorFlow checkpoint": [bytes(40) + bytes.fromhex("57fb808b247547db")],
    "an HDF5 file, as Keras writes": [b"\x89HDF\r\n\x1a\n" + bytes(88)],
    "a zip archive": [zipped("a.txt")],
    "a gzip file": [gzip.compress(b"some text")],
    "a Zstandard file": [bytes.fromhex("28b52ffd") + b"\x20\x00\x01\x00\x00"],
    "an xz file": [lzma.compress(b"some text")],
    "a bzip2 file": [bz2.compress(b"some text")],
    "a Parquet file": [b"PAR1" + bytes(20) + b"PAR1"],
    "a safetensors file": [len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(4)],
    **{name: [np.array([magic, *[0] * 255], "<i4").tobytes()] for magic, name in LLMC.items()},
}


@pytest.mark.parametrize("kind", FILES)
def test_each_kind_is_recognised(kind, tmp_path):
    for content in FILES[kind]:
        (tmp_path / "x.bin").write_bytes(content)
        assert recognise(tmp_path / "x.bin") == kind


def test_a_part_of_a_tensorflow_checkpoint_has_only_its_name(tmp_path):
    path = tmp_path / "model.ckpt.data-00000-of-00001"
    path.write_bytes(bytes(64))
    assert recognise(path) == "a TensorFlow checkpoint"


def test_the_real_files_of_llama2c(shared):
    kinds = {
        "stories260K.bin": "model (version 0)",
        "tok512.bin": "tokenizer",
        "tokenizer.bin": "tokenizer",
    }
    for name, kind in kinds.items():
        assert recognise(shared / "llama2c" / name) == f"a llama2.c {kind}"


def test_llm_cs_numbers_are_those_that_its_readers_expect():
    expected = {
        llmc.MODEL_MAGIC,
        llmc.STATE_MAGIC,
        llmc_tokenizer.MAGIC,
        llmc_eval.MAGIC,
        *token_shards.FLAVOURS,
    }
    assert LLMC.keys() == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"PK\x03\x04" + bytes(range(256)),  # no end of an archive
        b"\x1f\x8b\x08\xff" + bytes(64),  # flags that no gzip file has
        b"GGUF is a format of files",
        b"\x80\x02\xff\xff.",  # no such instruction
        llama2c(32)[:-4],
        llama2c(32) + bytes(4),
        llama2c_tokenizer([b"<unk>", b"a"])[:-1],
        sentencepiece([b"<unk>"]),
        b"\n\x07\n\x05text of a diary, begun on a line of its own",
        b"\x08\x08\x12\xff" + bytes(300),
    ],
)
def test_what_only_begins_like_one_is_not(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    assert recognise(tmp_path / "x.bin") is None


@given(st.lists(st.integers(0, 50256), min_size=8, max_size=40), st.sampled_from(["<u2", "<i4"]))
def test_token_ids_without_a_header_are_not_taken_for_anything(tmp_path_factory, ids, dtype):
    path = tmp_path_factory.mktemp("ids") / "train.bin"
    np.array(ids, dtype).tofile(path)
    assert recognise(path) is None
