"""llm.c's files, read by an independent reading of their layout, and hostile ones."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError, FormatError
from gptjax.formats import llmc
from gptjax.models.params import init_params, num_padded_params, stack, unstack
from tests.models import tiny
from tests.models.fused import MATRICES, fuse

CFG = tiny.config(num_layers=2, channels=8, vocab_size=11, max_seq_len=12)  # 11 ids, padded to 128


def make_params():
    """Stacked, in NumPy's arrays."""
    return jax.tree.map(
        np.asarray, tiny.params(dataclasses.replace(CFG, layers="scan"), jnp.float32)
    )


def make_state(params=None):
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    logits = np.arange(2 * 5 * 11, dtype=np.float32).reshape(2, 5, 11)
    return llmc.DebugState(ids, ids[::-1].copy(), logits, 2.5, params or make_params())


def loaded(params):
    """Tensors of a file, read, stacked, and padded as those in use are."""
    found = stack(jax.tree.map(np.asarray, params))
    return found._replace(wte=np.pad(found.wte, ((0, 128 - len(found.wte)), (0, 0))))


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("unrolled", [False, True])
def test_model_bytes_are_llm_cs(tmp_path, unrolled):
    """Header, then the 16 tensors in llm.c's order, matrices (out, in), padded vocabulary, nothing
    after them.
    """
    params = make_params()
    llmc.write_model(tmp_path / "m.bin", unstack(params) if unrolled else params, CFG)
    content = (tmp_path / "m.bin").read_bytes()
    assert struct.unpack("<8i", content[:32]) == (20240326, 3, 12, 11, 2, 2, 8, 128)
    assert content[32:1024] == bytes(992)
    offset = 1024
    for name, tensor in fuse(params).items():
        expected = tensor.swapaxes(1, 2) if name in MATRICES else tensor
        found = np.frombuffer(content, "<f4", expected.size, offset)
        np.testing.assert_array_equal(found, expected.ravel(), err_msg=name)
        offset += 4 * expected.size
    assert offset == len(content)


def test_the_size_of_124m_is_llm_cs():
    cfg = tiny.config(num_layers=12, num_heads=12, channels=768, vocab_size=50257, max_seq_len=1024)
    count = num_padded_params(cfg)
    assert 1024 + 4 * count == 497_904_640
    assert 1024 + 4 * (2 * 4 * 64 + 4 * 64 * 50257 + 1 + count) == 549_369_860


def test_what_is_written_is_read_back(tmp_path):
    llmc.write_model(tmp_path / "m.bin", make_params(), CFG)
    cfg, params = llmc.read_model(tmp_path / "m.bin")
    assert (cfg.num_layers, cfg.num_heads, cfg.channels, cfg.vocab_size, cfg.max_seq_len) == (
        2,
        2,
        8,
        11,
        12,
    )
    assert_same(loaded(params), make_params())
    assert llmc.is_model(tmp_path / "m.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


def test_bfloat16_is_rounded_once(tmp_path):
    llmc.write_model(tmp_path / "m.bin", make_params(), CFG, version=5)
    _, params = llmc.read_model(tmp_path / "m.bin")
    assert_same(
        loaded(params),
        jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16)), make_params()),
    )


def as_version(version: int) -> bytes:
    """A model file of a version that is read but not written, laid out here by hand."""
    params = make_params()
    header = struct.pack("<8i", 20240326, version, 12, 11, 2, 2, 8, 0 if version == 1 else 128)
    parts = [header.ljust(1024, b"\0")]
    for name, tensor in fuse(params).items():
        tensor = tensor[:11] if name == "wte" and version == 1 else tensor
        tensor = tensor.swapaxes(1, 2) if name in MATRICES else tensor
        wide = version == 1 or name.startswith("ln")
        parts.append(np.ascontiguousarray(tensor, "<f4" if wide else jnp.bfloat16).tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("version", [1, 4])
def test_versions_that_are_only_read(tmp_path, version):
    (tmp_path / "m.bin").write_bytes(as_version(version))
    _, params = llmc.read_model(tmp_path / "m.bin")
    assert params.wte.shape == (11, 8)
    params = loaded(params)
    expected = make_params()
    np.testing.assert_array_equal(params.blocks.ln1w, expected.blocks.ln1w)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), theirs, rtol=0 if version == 1 else 2**-8
        )


@pytest.mark.parametrize("version", [1, 2])
def test_debug_state_there_and_back(tmp_path, version):
    state = make_state()
    llmc.write_debug_state(tmp_path / "s.bin", state, CFG, version)
    content = (tmp_path / "s.bin").read_bytes()
    assert struct.unpack("<4i", content[:16]) == (20240327, version, 2, 5)
    rows = 11 if version == 1 else 128
    assert len(content) == 1024 + 4 * (
        10 + 10 + 110 + 1 + num_padded_params(CFG) - (128 - rows) * 8
    )
    assert struct.unpack("<10i", content[1024:1064]) == tuple(range(10))
    assert struct.unpack("<f", content[1024 + 4 * 130 : 1024 + 4 * 131]) == (2.5,)
    found = llmc.read_debug_state(tmp_path / "s.bin", CFG)
    for ours, theirs in zip(found[:4], state[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same(found.grads, state.grads)


def header_of(path, **fields):
    content = bytearray(path.read_bytes())
    for index, value in fields.items():
        struct.pack_into("<i", content, 4 * int(index[1:]), value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_0": 7}, "begins 7 where 20240326 is expected"),
        ({"_1": 2}, "version 2, whose layout changed"),
        ({"_1": 9}, "of version 9: versions 1, 3, 4 and 5"),
        ({"_4": -1}, "its header holds the sizes 12, 11, -1"),
        ({"_4": 2**30}, "its header holds the sizes"),
        ({"_7": 5}, "its header holds the sizes"),
        ({"_5": 3}, "model.channels 8 is not divisible by model.num_heads 3"),
        ({"_4": 3}, "truncated: its header announces 3 layers"),
        ({"_3": 12, "_7": 127}, "malformed"),
    ],
)
def test_headers_that_lie(tmp_path, fields, message):
    path = tmp_path / "m.bin"
    llmc.write_model(path, make_params(), CFG)
    header_of(path, **fields)
    with pytest.raises(FormatError, match=message):
        llmc.read_model(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_0": 7}, "begins 7, 2 where 20240327, 1 or 2"),
        ({"_1": 3}, "begins 20240327, 3"),
        ({"_2": 0}, "0 sequences of 5 tokens"),
        ({"_3": 13}, "the model takes 1 to 12"),
        ({"_2": 3}, "truncated"),
        ({"_256": 11}, r"token ids 1\.\.11, but the model knows 0\.\.10"),
        ({"_266": -1}, r"token ids -1"),
    ],
)
def test_debug_states_that_lie(tmp_path, fields, message):
    path = tmp_path / "s.bin"
    llmc.write_debug_state(path, make_state(), CFG)
    header_of(path, **fields)
    with pytest.raises(FormatError, match=message):
        llmc.read_debug_state(path, CFG)


def test_missing_and_short_files(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        llmc.read_model(tmp_path / "none.bin")
    (tmp_path / "short.bin").write_bytes(b"abc")
    with pytest.raises(FormatError, match="3 bytes, but its header alone takes 1024"):
        llmc.read_debug_state(tmp_path / "short.bin", CFG)


def test_hidden_units_that_the_header_cannot_say(tmp_path):
    cfg = tiny.config(hidden=24)
    with pytest.raises(
        ConfigError, match=r"this model has model.hidden 24 and model.channels 8: write safetensors"
    ):
        llmc.write_model(tmp_path / "m.bin", tiny.params(cfg), cfg)
    assert list(tmp_path.iterdir()) == []


def test_versions_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="3 or 5 can be written, not 4"):
        llmc.write_model(tmp_path / "m.bin", make_params(), CFG, version=4)
    with pytest.raises(ValueError, match="1 or 2 can be written, not 3"):
        llmc.write_debug_state(tmp_path / "s.bin", make_state(), CFG, version=3)
    assert list(tmp_path.iterdir()) == []


@given(position=st.integers(0, 60), byte=st.integers(0, 255), cut=st.integers(0, 2000))
def test_any_damage_to_header_or_length_loads_or_is_refused(tmp_path_factory, position, byte, cut):
    path = tmp_path_factory.mktemp("fuzz") / "m.bin"
    llmc.write_model(path, make_params(), CFG)
    content = bytearray(path.read_bytes())
    content[position] = byte
    path.write_bytes(content[: len(content) - cut])
    refused = None
    try:
        _, params = llmc.read_model(path)
    except FormatError as error:
        refused = str(error)
    if refused:
        assert str(path) in refused
    else:
        assert cut == 0
        assert all(np.isfinite(np.asarray(t, np.float32)).all() for t in jax.tree.leaves(params))


def test_initial_parameters_of_either_layout_give_the_same_file(tmp_path):
    for layers in ("scan", "unroll"):
        params = init_params(jax.random.key(0), dataclasses.replace(CFG, layers=layers))
        llmc.write_model(tmp_path / layers, params, CFG)
        assert jax.tree.structure(stack(params)) == jax.tree.structure(make_params())
    assert (tmp_path / "scan").read_bytes() == (tmp_path / "unroll").read_bytes()
