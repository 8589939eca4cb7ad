import io

import matplotlib as mpl
import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.models import gpt2
from gptjax.ops import gelu_bwd
from gptjax.plot import figures
from gptjax.verify import compare
from tests.models import tiny


@pytest.fixture
def ax():
    """Axes on a canvas that needs no screen, in the notebooks' style."""
    mpl.use("agg")
    with mpl.rc_context():
        figures.use_style()
        yield figures.plt.subplots()[1]
        figures.plt.close("all")


def test_source_is_the_function_as_it_stands():
    shown = figures.SourceCode(gelu_bwd)
    assert repr(shown).startswith("@jax.jit\ndef gelu_bwd(")
    assert shown._repr_markdown_() == f"```python\n{shown}\n```"


def test_pieces_are_printable():
    byte = tokenizers.byte()
    assert figures.pieces(byte, byte.encode("a b\n")) == ["a", "\u2423", "b", "\u21b5"]
    assert figures.pieces(byte, byte.encode("é")) == ["c3", "a9"]
    assert figures.pieces(byte, [0]) == ["00"]


def test_a_diverging_map_is_symmetric_and_says_what_it_is_given(ax):
    figures.heat_map(
        ax,
        [[1.0, -3.0], [np.nan, 0.0]],
        "nats",
        rows=["a", "b"],
        diverging=True,
        texts=[["1", "-3"], ["", "0"]],
    )
    (image,) = ax.images
    assert image.get_clim() == (-3, 3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in ax.texts] == ["1", "-3", "", "0"]
    assert ax.figure.axes[1].get_ylabel() == "nats"
    ax.figure.savefig(io.BytesIO())


def test_axes_shared_with_named_ones_keep_the_names(ax):
    both = ax.figure.subplots(1, 2, sharey=True)
    figures.heat_map(both[0], np.eye(9), "", rows=list("abcdefghi"))
    figures.heat_map(both[1], np.eye(9), "")
    assert [label.get_text() for label in both[0].get_yticklabels()] == list("abcdefghi")
    assert all(at == round(at) for at in both[1].get_xticks())


def test_a_logarithmic_map_leaves_zeros_out(ax):
    figures.heat_map(ax, [[0.0, 0.1], [10.0, 1.0]], "norm", log=True, bar=False)
    (image,) = ax.images
    assert image.get_clim() == (0.1, 10)
    assert image.get_array().mask.tolist() == [[True, False], [False, False]]
    assert len(ax.figure.axes) == 1


def test_by_layer_has_a_place_for_each_gradient_of_the_model():
    cfg = tiny.CONFIG
    params = tiny.params(cfg)
    found = compare(params, params)
    values, rows, columns = figures.by_layer(found, lambda row: row.norm)
    assert rows == ["wte", "wpe", *gpt2.Block._fields, "lnfw", "lnfb"]
    assert columns == ["embed", "0", "1", "final"]
    assert np.isfinite(values).sum() == len(found.rows) == 4 + 16 * cfg.num_layers
    np.testing.assert_allclose(values[rows.index("fcw"), 2], np.linalg.norm(params.blocks[1].fcw))
    np.testing.assert_allclose(values[rows.index("wpe"), 0], np.linalg.norm(params.wpe))
    np.testing.assert_allclose(values[rows.index("lnfb"), 3], np.linalg.norm(params.lnfb))


def test_the_diagram_shows_every_weight_of_a_block_and_each_gradient(ax):
    forward, backward = (
        {t.get_text() for t in figures.block_diagram(b).axes[0].texts} for b in (False, True)
    )
    weights = {name for names in forward for name in names.split()}
    assert weights >= set(gpt2.Block._fields)
    assert {"dx", "dh1", "dq dk dv", "do", "da", "dh2", "df", "dg", "dm"} == {
        t for t in backward if t.startswith("d")
    }
    assert not any(t.startswith("d") for t in forward)
