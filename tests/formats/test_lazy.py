import jax
import numpy as np
import pytest

from gptjax.formats.lazy import (
    LazyTensor,
    collect,
    pad_vocab,
    stack_lazily,
    tensor_names,
    tensor_of,
)
from gptjax.models.params import stack, weight_table
from tests.models import tiny

CFG = tiny.config(dtype="float32")


@pytest.fixture
def reads():
    """(name, layer) of each tensor that was read."""
    return []


@pytest.fixture
def lazily(reads):
    """`tiny.params` without pad rows, each read when asked for."""
    params = tiny.params(CFG, np.float32)

    def load(name, layer):
        reads.append((name, layer))
        return tensor_of(params, name, layer, CFG)

    return collect(CFG, load, lambda name, layer: np.dtype(np.float32))


def test_nothing_is_read_before_it_is_used(lazily, reads):
    assert all(isinstance(tensor, LazyTensor) for tensor in jax.tree.leaves(lazily))
    assert len(jax.tree.leaves(lazily)) == len(list(tensor_names(CFG)))
    assert not reads
    fcw = np.asarray(lazily.blocks[1].fcw)
    assert reads == [("fcw", 1)]
    np.testing.assert_array_equal(fcw, tiny.params(CFG, np.float32).blocks[1].fcw)


def test_numpy_may_ask_for_another_dtype(lazily):
    assert np.asarray(lazily.lnfw, np.float64).dtype == np.float64


def test_stacked_layers_are_read_layer_by_layer(lazily, reads):
    stacked = stack_lazily(lazily)
    assert stacked.blocks.fcb.shape == (CFG.num_layers, CFG.hidden)
    assert not reads
    np.testing.assert_array_equal(
        stacked.blocks.fcb, stack(tiny.params(CFG, np.float32)).blocks.fcb
    )
    assert reads == [("fcb", 0), ("fcb", 1)]


def test_pad_rows_are_left_out_of_files_and_put_back():
    params, table = tiny.params(CFG, np.float32), weight_table(CFG, layered=False)
    ids = tensor_of(params, "wte", None, CFG)
    assert ids.shape == (CFG.vocab_size, CFG.channels)
    np.testing.assert_array_equal(pad_vocab(ids, table.wte, CFG), params.wte)
    assert pad_vocab(params.wpe, table.wpe, CFG) is params.wpe
    np.testing.assert_array_equal(tensor_of(stack(params), "fcw", 1, CFG), params.blocks[1].fcw)
