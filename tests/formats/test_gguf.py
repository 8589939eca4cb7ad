"""GGUF against the package that owns it, and hostile files."""

import contextlib
import dataclasses
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError, FormatError, GptjaxError
from gptjax.formats import gguf
from gptjax.models.params import unstack
from tests.models import tiny

library = pytest.importorskip("gguf")
SIZES = {
    "family": "llama",
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "channels": 32,
    "hidden": 64,
    "vocab_size": 40,
    "rope_theta": 5e4,
    "norm_eps": 1e-5,
}
CFG = tiny.config(**SIZES)
PARAMS = jax.tree.map(np.asarray, tiny.params(CFG, jnp.float32))
# Every type that the package dequantizes
QUANTIZED = sorted(kind.name for kind in library.quants._type_traits if kind.name != "BF16")


def written(path, kind="F32", cfg=CFG, params=PARAMS, **fields):
    gguf.write_model(path, params, cfg, kind, fields or None)
    return path


def read(path):
    """Architecture and arrays, unrolled."""
    cfg, params, _ = gguf.read_model(path)
    return cfg, jax.tree.map(np.asarray, params)


def unpadded(params, cfg=CFG):
    params = unstack(params, cfg.num_layers)
    tables = {name: getattr(params, name) for name in ("tok_emb", "wcls")}
    return params._replace(
        **{name: x if x is None else np.asarray(x)[: cfg.vocab_size] for name, x in tables.items()}
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_what_is_written_is_read_back(tmp_path, kind, kv_heads, tied):
    cfg = tiny.config(**SIZES | {"num_kv_heads": kv_heads, "tied": tied})
    params = jax.tree.map(np.asarray, tiny.params(cfg, jnp.float32))
    found, arrays = read(written(tmp_path / "m.gguf", kind, cfg, params))
    assert found == cfg.architecture
    expected = unpadded(params, cfg)
    if kind == "BF16":
        # Vectors stay in float32
        expected = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x,
            jax.tree.map(np.asarray, expected),
        )
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_eight_bits_are_within_half_a_step(tmp_path):
    """Each block of 32 inputs has its own scale; rows that are no whole blocks stay float32."""
    cfg = tiny.config(**SIZES | {"hidden": 48})
    params = jax.tree.map(np.asarray, tiny.params(cfg, jnp.float32))
    _, found = read(written(tmp_path / "m.gguf", "Q8_0", cfg, params))
    expected = unpadded(params, cfg)
    rows = expected.tok_emb.reshape(-1, 32)
    step = abs(rows).max(-1, keepdims=True) / 127
    # The scale itself is rounded to float16
    assert (abs(found.tok_emb.reshape(-1, 32) - rows) <= (0.5 + 127 * 2**-11) * step).all()
    np.testing.assert_array_equal(found.blocks[0].w2, expected.blocks[0].w2)
    kinds = {name: kind for name, (kind, _) in gguf.raw_blocks(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"


def test_the_owners_reader_finds_the_same(tmp_path):
    """Metadata, shapes, and rows of queries and keys that rotate neighbours (2i, 2i + 1)."""
    fields = {
        "tokenizer.ggml.model": "none",
        "x.list": ["a", "bc"],
        "x.kinds": np.arange(3, dtype="<i4"),
    }
    theirs = library.GGUFReader(written(tmp_path / "m.gguf", "F32", CFG, PARAMS, **fields))
    content = {name: field.contents() for name, field in theirs.fields.items()}
    assert content["general.architecture"] == "llama"
    assert content["llama.attention.head_count_kv"] == 2
    assert content["llama.rope.freq_base"] == 5e4
    assert content["llama.vocab_size"] == 40
    assert (content["x.list"], content["x.kinds"]) == (["a", "bc"], [0, 1, 2])
    tensors = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(tensors) == 2 + 9 * 2
    down = tensors["blk.1.ffn_down.weight"]
    assert down.shape.tolist() == [64, 32]
    np.testing.assert_array_equal(down.data, np.asarray(unpadded(PARAMS).blocks[1].w2).T)
    for name, param, heads in (("attn_q", "wq", 4), ("attn_k", "wk", 2)):
        ours = np.asarray(getattr(unpadded(PARAMS).blocks[0], param))  # (C, heads, D)
        turned = np.empty((heads, 8, 32), np.float32)
        for i in range(4):
            turned[:, 2 * i] = ours[:, :, i].T
            turned[:, 2 * i + 1] = ours[:, :, i + 4].T
        np.testing.assert_array_equal(tensors[f"blk.0.{name}.weight"].data, turned.reshape(-1, 32))


def foreign(path, kind, cfg, generator):
    """A file of llama.cpp's writer, its matrices random blocks of a type."""
    quantization = library.GGMLQuantizationType[kind]
    block, size = library.GGML_QUANT_SIZES[quantization]
    writer = library.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.channels)
    writer.add_feed_forward_length(cfg.hidden)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    blocks = {}
    for name, tensor, _ in gguf.each_layer(gguf._file_tensors(cfg), cfg):
        if len(tensor.shape) == 1:
            writer.add_tensor(name, np.ones(tensor.shape, np.float32))
            continue
        rows, columns = tensor.shape
        blocks[name] = generator.integers(0, 256, (rows, columns // block * size), np.uint8)
        writer.add_tensor(name, blocks[name], raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_type_is_dequantized_as_its_owner_does(tmp_path, kind):
    quantization = library.GGMLQuantizationType[kind]
    width = max(library.GGML_QUANT_SIZES[quantization][0], 64)
    cfg = tiny.config(
        **SIZES | {"num_layers": 1, "channels": width, "hidden": width, "vocab_size": 3}
    )
    blocks = foreign(tmp_path / "m.gguf", kind, cfg, np.random.default_rng(0))
    found, params = read(tmp_path / "m.gguf")
    assert found.rope_theta == 1e4  # where the file has none
    with np.errstate(all="ignore"):
        dequantize = lambda name: library.quants.dequantize(blocks[name], quantization)  # noqa: E731
        np.testing.assert_array_equal(params.tok_emb, dequantize("token_embd.weight"))
        np.testing.assert_array_equal(params.blocks[0].w1, dequantize("blk.0.ffn_gate.weight").T)
    raw = gguf.raw_blocks(tmp_path / "m.gguf")
    name = "blk.0.ffn_gate.weight"
    assert raw[name][0] == kind
    np.testing.assert_array_equal(raw[name][1], blocks[name])
    assert isinstance(raw[name][1], np.memmap)


def test_a_tensor_leaves_memory_with_its_array(tmp_path):
    """The mapping of another tensor, or of the metadata, does not hold it."""
    path = tmp_path / "m.gguf"
    _, params, _ = gguf.read_model(written(path, "Q8_0"))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list its mappings")
    assert str(path) not in maps.read_text()
    found = params.tok_emb.blocks()
    assert str(path) in maps.read_text()
    del found
    assert str(path) not in maps.read_text()


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path):
    path = written(tmp_path / "m.gguf")
    _, params, _ = gguf.read_model(path)
    other = written(tmp_path / "other.gguf", params=jax.tree.map(np.negative, PARAMS))
    other.replace(path)
    with pytest.raises(FormatError, match="has been changed while it was read"):
        np.asarray(params.tok_emb)


def changed(path, **changes):
    """The file with other metadata: fields with None are left out, dots are written as ``__``."""
    file = gguf.read_file(path)
    fields = file.fields | {name.replace("__", "."): value for name, value in changes.items()}
    described = gguf._described
    gguf._described = lambda cfg, kind: {k: v for k, v in fields.items() if v is not None}
    try:
        gguf.write_model(path, PARAMS, CFG, "F32", {"tokenizer.ggml.model": "none"})
    finally:
        gguf._described = described
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen2"}, "of architecture 'qwen2', but llama is expected"),
        ({"general__architecture": None}, "of architecture None, but llama is expected"),
        ({"general__type": "adapter"}, "holds no model, but an 'adapter'"),
        ({"split__count": 2}, "is one of 2 parts of a model"),
        ({"llama__block_count": None}, "has no usable llama.block_count: None"),
        ({"llama__block_count": 0}, "has no usable llama.block_count: 0"),
        ({"llama__block_count": 3000}, "announces 3000 layers, but there are 20 tensors"),
        ({"llama__block_count": 3}, "lacks the tensor blk.2.attn_norm.weight"),
        ({"llama__block_count": 1}, "holds tensors that this model does not have: blk.1"),
        ({"llama__feed_forward_length": 65}, "ffn_gate.weight has the shape [64, 32], but [65, 32]"),
        ({"llama__attention__head_count": 5}, "model.channels 32 is not divisible"),
        ({"llama__attention__head_count": 32}, "invalid model: model.channels 32"),
        ({"llama__rope__freq_base": 0.0}, "invalid model: model.rope_theta must be"),
        ({"llama__rope__freq_base": "many"}, "no usable llama.rope.freq_base: 'many'"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "no usable llama.attention.layer_norm"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count 4, but only 8"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn', but only"),
        ({"llama__rope__scaling__factor": 4.0}, "llama.rope.scaling.factor 4.0, but only 1.0"),
        ({"llama__expert_count": 8}, "llama.expert_count 8, but only 0"),
        ({"llama__vocab_size": 41}, "llama.vocab_size 41, but only 40"),
        ({"llama__swish": 1.0}, "has the setting llama.swish, which is not supported"),
        ({"general__alignment": 4096}, "is at 5120 of the data, where 8192 is expected"),
        ({"general__alignment": 3}, "general.alignment 3: a power of two"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_name(tmp_path, changes, message):
    path = changed(written(tmp_path / "m.gguf"), **changes)
    with pytest.raises(FormatError) as error:
        gguf.read_model(path)
    assert message in str(error.value)
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__rope__scaling__type": "none"},
        {"llama__rope__dimension_count": None},
        {"llama__attention__key_length": 8},
        {"llama__rope__scaling__finetuned": False},
    ],
)
def test_settings_that_change_nothing_are_taken(tmp_path, changes):
    cfg, _, _ = gguf.read_model(changed(written(tmp_path / "m.gguf"), **changes))
    assert cfg == CFG.architecture


def test_a_scaled_rotation_is_refused(tmp_path, monkeypatch):
    """Llama 3 keeps the factors of its scaled rotation as a tensor."""
    table = gguf.TABLES["llama"]
    renamed = {k.replace("output_norm.weight", "rope_freqs.weight"): v for k, v in table.items()}
    with monkeypatch.context() as patch:
        patch.setitem(gguf.TABLES, "llama", renamed)
        written(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="scales its rotary embedding"):
        gguf.read_model(tmp_path / "m.gguf")


def test_a_number_that_float32_lacks_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="model.rope_theta in float32, which cannot represent 10000.0001"
    ):
        written(tmp_path / "m.gguf", cfg=dataclasses.replace(CFG, rope_theta=10000.0001))
    with pytest.raises(
        ConfigError, match="a GGUF model holds models of the family llama, and this is gpt2"
    ):
        gguf.write_model(tmp_path / "m.gguf", None, tiny.CONFIG)
    assert not (tmp_path / "m.gguf").exists()


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"GGUF files need the package gguf: pip install"):
        gguf.read_model(path)


def test_every_count_and_size_is_checked_before_it_is_used(tmp_path):
    """A number of 8 bytes anywhere in the header may be anything."""
    path = written(tmp_path / "m.gguf", **{"tokenizer.ggml.model": "none", "x": ["a", "b"]})
    content = path.read_bytes()
    header = min(tensor.start for tensor in gguf.read_file(path).tensors.values())
    refused = 0
    for value in (0, 2**31, 2**63 - 1, 2**64 - 1):
        for at in range(8, header - 8, 3):
            path.write_bytes(content[:at] + struct.pack("<Q", value) + content[at + 8 :])
            with contextlib.suppress(FormatError):
                gguf.read_model(path)
                continue
            refused += 1
    assert refused > header


@given(st.integers(0, 10**6), st.integers(0, 60))
def test_a_file_of_another_length_is_refused(tmp_path_factory, cut, more):
    path = written(tmp_path_factory.mktemp("gguf") / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: cut % len(content)])
    with pytest.raises(FormatError, match=r"truncated|is not a GGUF|announces"):
        gguf.read_model(path)
    path.write_bytes(content + bytes(more + 1))
    with pytest.raises(FormatError, match="malformed: its header announces"):
        gguf.read_model(path)


@given(st.data())
def test_random_bytes_after_the_magic_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + data.draw(st.binary(max_size=300)))
    with pytest.raises(GptjaxError):
        gguf.read_model(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF", "is truncated"),
        (b"GGUF\1\0\0\0", "of version 1: 2 and 3 can be read"),
        (b"GGUF\0\0\0\3", "of the other byte order"),
        (b"GGUX\3\0\0\0", "does not begin with GGUF"),
    ],
)
def test_other_beginnings(tmp_path, start, message):
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(FormatError, match=message):
        gguf.read_model(tmp_path / "m.gguf")
