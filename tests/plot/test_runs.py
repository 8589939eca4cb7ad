"""Pictures of runs: what they show is read back from the figure's own lines."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.plot.runs import COLOURS, PANELS, RunRecords, draw, running_mean
from tests.plot.test_command import records


def panels(figure):
    """The axes by their titles."""
    return {axes.get_title("left"): axes for axes in figure.axes}


def drawn(axes):
    """Its lines as (x, y), faint ones and crosses too."""
    return [tuple(np.asarray(part, float) for part in line.get_data()) for line in axes.lines]


def test_each_panel_shows_what_the_records_hold_of_it():
    made = [r | ({"gradient_error": 1e-6} if r["step"] == 50 else {}) for r in records()]
    shown = panels(draw([RunRecords("a", made)], smooth=1))
    assert list(shown) == [panel.title for panel in PANELS]
    for panel in PANELS:
        axes = shown[panel.title]
        assert axes.get_ylabel()
        assert axes.get_xlabel() == "steps"
        ((x, y),) = drawn(axes)
        np.testing.assert_array_equal(x, [r["step"] for r in made if panel.key in r])
        np.testing.assert_array_equal(y, [r[panel.key] for r in made if panel.key in r])
    assert shown["Gradient checks"].get_yscale() == "log"
    bare = panels(draw([RunRecords("a", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])]))
    assert list(bare) == ["Training loss"]


@pytest.mark.parametrize(
    ("x", "label", "last"),
    [("tokens", "tokens", 100 * 1024), ("time", "training time (minutes)", 25 / 60)],
)
def test_the_horizontal_axis_in_tokens_and_in_time(x, label, last):
    """1024 tokens and 250 ms a step, also in a run whose first steps are gone."""
    shown = panels(draw([RunRecords("a", records())], x, smooth=1))
    for title in ("Training loss", "Validation loss"):
        assert shown[title].get_xlabel() == label
        assert drawn(shown[title])[0][0][-1] == pytest.approx(last)
    assert RunRecords("a", records()[50:]).horizontal("tokens", "loss")[0] == 51 * 1024


@pytest.mark.parametrize(("ms", "unit"), [(1e3, "minutes"), (4e5, "hours")])
def test_time_has_the_unit_that_suits_it(ms, unit):
    axes = panels(draw([RunRecords("a", records(100, ms=ms))], "time"))["Training loss"]
    assert axes.get_xlabel() == f"training time ({unit})"
    assert axes.get_xlim()[1] > 1


def test_the_running_mean_lies_over_what_was_measured():
    shown = panels(draw([RunRecords("a", records())], smooth=10))["Training loss"]
    (_, raw), (_, mean) = drawn(shown)
    np.testing.assert_array_equal(raw, [r["loss"] for r in records()])
    np.testing.assert_array_equal(mean, running_mean(raw, 11))
    assert shown.get_title("right") == "mean of 11 steps"
    faint, line = shown.lines
    assert faint.get_alpha() < 0.5
    assert faint.get_zorder() < line.get_zorder()
    many = [RunRecords(str(i), records(50)) for i in range(7)]
    # Of so many, the means alone
    assert len(panels(draw(many, smooth=5))["Training loss"].lines) == 7


@given(
    st.lists(st.sampled_from([0.0, 1.0, -2.5, 1e30, math.nan]), min_size=1, max_size=30),
    st.integers(0, 20).map(lambda n: 2 * n + 1),
)
def test_the_running_mean_is_the_mean_of_each_window(values, window):
    values = np.array(values)
    expected = []
    for i in range(values.size):
        half = min(window // 2, i)
        finite = [v for v in values[i - half : i + half + 1] if not math.isnan(v)]
        expected.append(math.fsum(finite) / len(finite) if finite else math.nan)
    np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-12)


def test_what_is_not_finite_is_a_gap_and_a_cross():
    made = records(skipped={30, 31})
    made[49]["val_loss"] = None
    shown = panels(draw([RunRecords("a", made)], smooth=1))
    for title, where in (
        ("Training loss", [30, 31]),
        ("Gradient norm", [30, 31]),
        ("Validation loss", [50]),
    ):
        (x, y), (crosses, heights) = drawn(shown[title])
        assert x[np.isnan(y)].tolist() == where == crosses.tolist()
        assert all(heights > 0)
        assert all(heights < 0.1)  # of the panel's height
        assert shown[title].get_title("right") == "\N{MULTIPLICATION SIGN} not finite"
    assert len(shown["Throughput"].lines) == 1
    assert (
        panels(draw([RunRecords("a", records(3, skipped={1, 2, 3}))]))["Training loss"]
        .get_yticks()
        .size
        == 0
    )


def test_a_loss_that_explodes_leaves_the_others_visible():
    wild = records()
    for record in wild[90:]:
        record["loss"] *= 10.0 ** (record["step"] - 90)
    axes = panels(draw([RunRecords("a", records()), RunRecords("b", wild)]))["Training loss"]
    low, high = axes.get_ylim()
    assert low < 3.1
    assert 10 < high < 30
    assert "cut off above" in axes.get_title("right")
    assert "cut off" not in panels(draw([RunRecords("a", records())]))["Training loss"].get_title(
        "right"
    )


def test_a_wide_range_gets_a_logarithmic_axis():
    spiky = records()
    spiky[40]["grad_norm"] = 500.0
    scales = [
        panels(draw([RunRecords("a", made)]))["Gradient norm"].get_yscale()
        for made in (records(), spiky)
    ]
    assert scales == ["linear", "log"]


def test_runs_of_any_lengths_and_names_are_told_apart():
    names = ["_hidden", "$x^$", "n" * 200, *map(str, range(13))]
    runs = [
        RunRecords(name, records(5 + 10 * i, val_loss=3.0) if i else records(1))
        for i, name in enumerate(names)
    ]
    figure = draw(runs)
    figure.draw_without_rendering()
    shown = panels(figure)
    styles = {
        (line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern))
        for line in shown["Validation loss"].lines
    }
    assert len(styles) == len(runs) > len(COLOURS)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == names[:2]
    assert texts[2].startswith("nnn")
    assert len(texts[2]) <= 60
    assert texts[3:] == names[3:]
    box, width = legend.get_window_extent(), figure.get_size_inches()[0] * figure.dpi
    assert box.x0 >= 0
    assert box.x1 <= width
    assert all(axes.get_window_extent().y0 > box.y1 for axes in figure.axes)  # it covers no curve
    few = draw(runs[:2])
    few.draw_without_rendering()
    tall = [[axes.get_window_extent().height for axes in drawing.axes] for drawing in (few, figure)]
    np.testing.assert_allclose(*tall, rtol=0.05)  # nor takes their place
    assert all(axes.get_xlim() == (0, 155 * 1.02) for axes in figure.axes)


def test_a_single_run_has_a_title_and_no_legend():
    figure = draw([RunRecords("$x^$", records(5))])
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "$x^$"
    assert not figure.legends
    assert figure.get_facecolor() == (1, 1, 1, 1)
