"""A family that the formats have never heard of, and the tables of those that they have."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from gptjax.config import Architecture
from gptjax.convert.weights import load_params, open_weights
from gptjax.errors import ConfigError, FormatError
from gptjax.formats import hf, llmc
from gptjax.formats import safetensors as ours
from gptjax.formats.lazy import tensor_names
from gptjax.formats.tables import each_layer, file_tensors, join, open_params
from gptjax.models import FAMILIES
from gptjax.models.family import Weight
from gptjax.models.params import rows
from tests.models import tiny

FLOAT32 = ours.DTYPES["F32"]


class Block(NamedTuple):
    """One layer."""

    upw: Any
    gatew: Any
    downw: Any
    gain: Any


class Params(NamedTuple):
    """All weights; the classifier is not tied."""

    table: Any
    blocks: Any
    head: Any


def weights(cfg):
    return Params(
        table=Weight(("Vp", "C"), "table", "normal"),
        blocks=Block(
            upw=Weight(("C", "F"), "matrix", "normal"),
            gatew=Weight(("C", "H", "D"), "matrix", "normal"),
            downw=Weight(("H", "D", "F"), "matrix", "residual", inputs=2),
            gain=Weight(("H", "D"), "vector", "ones"),
        ),
        head=Weight(("Vp", "C"), "table", "normal"),
    )


@pytest.fixture
def cfg(monkeypatch):
    """A model of a family of this file."""
    monkeypatch.setitem(
        FAMILIES,
        "gated",
        SimpleNamespace(
            OPTIONS=(),
            Params=Params,
            Block=Block,
            head_name=lambda cfg: "head",
            weights=weights,
        ),
    )
    return tiny.config(family="gated", hidden=24, dtype="float32")


def leaves(params):
    return [np.asarray(x) for x in jax.tree.leaves(params)]


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_safetensors_hold_any_family_under_its_own_names(cfg, tmp_path, layers):
    path = tmp_path / "m.safetensors"
    params = tiny.params(cfg, np.float32)
    ours.write_model(path, params, cfg, FLOAT32)
    theirs = safetensors.numpy.load_file(path)
    assert {name: tensor.shape for name, tensor in theirs.items() if not name.endswith(".1")} == {
        "table": (11, 8),
        "upw.0": (8, 24),
        "gatew.0": (8, 8),
        "downw.0": (8, 24),
        "gain.0": (8,),
        "head": (11, 8),
    }
    np.testing.assert_array_equal(theirs["downw.1"][5], params.blocks[1].downw[1, 1])
    source = open_weights(str(path))
    assert source.cfg.architecture == cfg.architecture
    found = load_params(source, tiny.config(family="gated", hidden=24, layers=layers))
    expected = tiny.params(tiny.config(family="gated", hidden=24, layers=layers), np.float32)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_format_without_a_table_for_the_family_refuses_it(cfg, tmp_path):
    params = tiny.params(cfg, np.float32)
    ids = np.zeros((1, 2), np.int32)
    state = llmc.DebugState(ids, ids, np.zeros((1, 2, 11)), 0.0, params)
    sentence = (
        "holds models of the family gpt2, and this is gated: write another format, as safetensors"
    )
    with pytest.raises(ConfigError, match=f"an llm.c model {sentence}"):
        llmc.write_model(tmp_path / "m.bin", params, cfg)
    with pytest.raises(ConfigError, match=f"an llm.c model {sentence}"):
        llmc.write_debug_state(tmp_path / "s.bin", state, cfg)
    sentence = sentence.replace("gpt2", "gpt2 or llama")
    with pytest.raises(ConfigError, match=f"a Hugging Face folder {sentence}"):
        hf.write_model(tmp_path / "hf", params, cfg, FLOAT32, None, lambda into: None)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_family_that_is_gone(cfg, tmp_path, monkeypatch):
    ours.write_model(tmp_path / "m.safetensors", tiny.params(cfg, np.float32), cfg, FLOAT32)
    monkeypatch.delitem(FAMILIES, "gated")
    with pytest.raises(FormatError, match="model.family 'gated' is not known: choose one of gpt2"):
        ours.read_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_side_by_side(cfg, transposed):
    """Each lies where its outputs do, and only that place is read."""
    params = tiny.params(cfg, np.float32)
    table = {
        "up.{}": "upw gatew",
        "down.{}": "downw",
        "gain.{}": "gain",
        "table": "table",
        "head": "head",
    }
    tensors = file_tensors(table, cfg, transposed=transposed)
    files = {
        name: join(tensor, layer, params, cfg, FLOAT32)
        for name, tensor, layer in each_layer(tensors, cfg)
    }
    assert {name: file.shape for name, file in files.items()} == {
        name: tensor.shape for name, tensor, _ in each_layer(tensors, cfg)
    }
    up = files["up.1"].T if transposed else files["up.1"]
    np.testing.assert_array_equal(up[:, :24], params.blocks[1].upw)
    np.testing.assert_array_equal(up[:, 24:28], params.blocks[1].gatew[:, 0])
    np.testing.assert_array_equal(up[:, 28:], params.blocks[1].gatew[:, 1])
    sizes = []

    def read(tensor, layer, part):
        found = files[tensor.name.format(layer)][part.place]
        sizes.append(found.size)
        return found

    opened = open_params(tensors, cfg, read, lambda tensor, layer: FLOAT32)
    expected = [tensor[:11] if len(tensor) == 128 else tensor for tensor in leaves(params)]
    for a, b in zip(leaves(opened), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sizes == [tensor.size for tensor in expected]


TABLES = {
    **{f"llm.c {family}": (family, table) for family, table in llmc.TABLES.items()},
    **{f"safetensors {family}": (family, table) for family, table in ours.TABLES.items()},
    **{
        f"Hugging Face {family}": (family, theirs.tensors)
        for family, theirs in hf.CONVENTIONS.items()
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_each_parameter_once(name):
    family, table = TABLES[name]
    cfg = Architecture(
        family=family, num_layers=2, num_heads=2, channels=8, vocab_size=11, max_seq_len=12
    )
    assert sorted(" ".join(table.values()).split()) == sorted(param for param, *_ in rows(cfg))
    layered = {param for param, layer, _ in tensor_names(cfg) if layer == 0}
    for tensor in file_tensors(table, cfg):
        assert {part.param in layered for part in tensor.parts} == {tensor.layered}
