import base64
import io

import matplotlib as mpl
import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.models import gpt2
from gptjax.ops import gelu_bwd, gelu_fwd
from gptjax.plot import figures
from gptjax.verify import compare
from tests.models import tiny


@pytest.fixture
def ax():
    """Axes on a canvas that needs no screen, in the notebooks' style."""
    with mpl.rc_context(figures.STYLE):
        yield figures.Figure().subplots()


def test_source_is_the_function_without_its_docstring_in_narrow_lines():
    shown = figures.SourceCode(gelu_fwd, gelu_bwd)
    assert repr(shown).startswith("@jax.jit\ndef gelu_fwd(")
    assert '"""' not in repr(shown)
    assert "\n\n@jax.jit\ndef gelu_bwd(" in repr(shown)
    assert shown._repr_markdown_() == f"```python\n{shown}\n```"
    long = "    y = f(" + ", ".join(["argument"] * 12) + ")"
    lines = figures._folded(long).splitlines()
    assert max(map(len, lines)) <= figures.COLUMNS
    assert [line[:8] for line in lines] == ["    y = ", "        "]
    assert " ".join(line.strip() for line in lines) == long.strip()
    assert figures._folded("x" * 99) == "x" * 99


def test_a_picture_stands_for_itself_in_words():
    picture = figures.lines({"loss": ([1, 2], [3.0, 1.0])}, "The loss falls.", title="Learning")
    assert repr(picture) == "The loss falls."
    data, metadata = picture._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata == {"image/png": {"alt": "The loss falls."}}
    assert mpl.rcParams["axes.spines.top"], "the style is the picture's alone"


def test_lines_have_names_marks_and_scales():
    picture = figures.lines(
        {"a": (range(3), [1, 2, 4]), "b": ([0, 1], [3, 3])},
        "",
        log="y",
        styles={"b": {"color": figures.GREY}},
        marks={"best": 0.5},
        xlabel="step",
    )
    (ax,) = picture.figure.axes
    assert (ax.get_xlabel(), ax.get_xscale(), ax.get_yscale()) == ("step", "linear", "log")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert [text.get_text() for text in ax.texts] == ["best"]
    mark, a, b = ax.lines
    assert list(mark.get_ydata()) == [0.5, 0.5]
    assert a.get_ydata().tolist() == [1, 2, 4]
    assert b.get_color() == figures.GREY


def test_bars_are_stacked_and_named():
    picture = figures.bars({"a": [1, 2], "b": [3, 4]}, "", names=["x", "y"], level=2.0)
    (ax,) = picture.figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert tops == [1, 2, 4, 6]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y"]
    assert list(ax.lines[0].get_ydata()) == [2.0, 2.0]


def test_maps_share_one_scale_and_one_bar():
    panels = {"a": [[1.0, -2.0]], "b": [[4.0, np.nan]], "c": [[0.0, 0.0]]}
    picture = figures.maps(panels, "", "nats", across=2, diverging=True, columns=["x", "y"])
    a, b, c, empty, bar = picture.figure.axes
    assert {ax.images[0].get_clim() for ax in (a, b, c)} == {(-4, 4)}
    assert [ax.get_title(loc="left") for ax in (a, b, c)] == ["a", "b", "c"]
    assert not empty.get_visible()
    assert bar.get_ylabel() == "nats"
    assert figures.maps(panels, "", "nats").figure.axes[0].images[0].get_clim() == (-2, 4)


def test_links_join_the_tokens_that_attend_to_each_other():
    picture = figures.links([[1.0, 0.0], [0.3, 0.7]], ["a", "b"], "", title="", least=0.3)
    (ax,) = picture.figure.axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 0], [1, 1]]
    assert [line.get_alpha() for line in ax.lines] == [1.0, 0.7]
    assert [text.get_text() for text in ax.texts] == ["a", "a", "b", "b"]


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


def test_the_diagram_shows_every_weight_of_a_block_and_each_gradient():
    forward, backward = (
        {t.get_text() for t in figures.block_diagram(b).figure.axes[0].texts} for b in (False, True)
    )
    weights = {name for names in forward for name in names.split()}
    assert weights >= set(gpt2.Block._fields)
    assert {"dx", "dh1", "dq dk dv", "do", "da", "dh2", "df", "dg", "dm"} == {
        t for t in backward if t.startswith("d")
    }
    assert not any(t.startswith("d") for t in forward)
