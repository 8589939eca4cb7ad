"""Pictures of runs: what they show is read back from the figure's own lines."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import plot
from gptjax.plot.curves import COLOURS, PANELS, RunRecords, draw, running_mean
from gptjax.train.metrics import read_records
from tests.commands import expect_error

matplotlib = pytest.importorskip("matplotlib", reason="needs the [plot] extra")


def records(steps=100, skipped=(), **changes):
    """What a run writes, the loss falling from 11 to 3."""
    made = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 3 + 8 * math.exp(-step / 20), "grad_norm": 1.0 + step % 3, "lr": 1e-3, "ms": 250.0}
        record |= {"tokens_per_s": 4096.0} | ({"val_loss": 4.0 - step / 100} if step % 10 == 0 else {}) | changes
        made.append(record | ({"loss": None, "grad_norm": None, "skipped": True} if step in skipped else {}))
    return made


def write(folder, made, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made) + end)
    return str(folder)


def panels(figure):
    """The axes by their titles."""
    return {axes.get_title("left"): axes for axes in figure.axes}


def drawn(axes):
    """Its lines as (x, y), faint ones and crosses too."""
    return [tuple(np.asarray(part, float) for part in line.get_data()) for line in axes.lines]


# The command


def test_one_run_is_drawn_in_its_folder_as_often_as_asked(tmp_path, capsys):
    folder = write(tmp_path / "runs" / "a", records(20))
    for _ in range(2):
        assert plot.main([folder]) == 0
    assert (tmp_path / "runs" / "a" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "runs" / "a").iterdir()} == {"metrics.jsonl", "metrics.png"}
    out = capsys.readouterr().out
    assert "run        a: step 20, loss 5.9430, validation loss 3.8000\n" in out
    assert f"wrote      {folder}/metrics.png, " in out


@pytest.mark.parametrize("x", ["steps", "tokens", "time"])
def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path, capsys, x):
    """Records without a time, a loss beyond float32, a run whose only step is 0."""
    huge = {"step": 3, "loss": 1e308, "ms": 1, "tokens_per_s": 1}
    timeless = write(tmp_path / "a", [*records(2, ms=None, tokens_per_s=None), huge])
    start = write(tmp_path / "b", [{"step": 0, "loss": -1e308, "ms": 0, "tokens_per_s": 0}])
    assert plot.main([timeless, start, "--x", x, "--output", str(tmp_path / "o.png")]) == 0
    assert not capsys.readouterr().err


def test_several_runs_are_drawn_here_or_where_asked(tmp_path, monkeypatch, capsys):
    one, other = (write(tmp_path / "runs" / name, records(5)) for name in ("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert plot.main([one, other + "/metrics.jsonl", one]) == 0
    assert (tmp_path / "metrics.png").exists()
    assert capsys.readouterr().out.count("run        ") == 2  # each once
    assert plot.main([one, other, "--output", "pictures/both.svg", "--x", "tokens", "--smooth", "1"]) == 0
    assert "<svg" in (tmp_path / "pictures" / "both.svg").read_text()


def test_a_run_without_a_step_is_left_out_of_several(tmp_path, capsys):
    one, empty = write(tmp_path / "a", records(5)), write(tmp_path / "b", [])
    assert plot.main([empty, one, "--output", str(tmp_path / "x.png")]) == 0
    assert f"note       {empty}/metrics.jsonl has no step yet: left out" in capsys.readouterr().out
    expect_error(plot.main, [empty], "has no step yet: nothing to draw", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "nowhere is no run: there is no "),
        (["{}"], "is no run: there is no "),
        ([], "runs"),
        (["{}/a", "--output", "{}/a/metrics.jsonl"], "must be a file whose name ends in .png, .svg or .pdf"),
        (["{}/a", "--output", "{}/a"], "must be a file whose name ends in .png"),
        (["{}/a", "--output", "/dev/null/x/y.png"], "/dev/null/x cannot be used"),
        (["{}/a", "--x", "epochs"], "epochs"),
        (["{}/a", "--smooth", "0"], "--smooth must be at least 1, not 0"),
        (["{}/old", "--x", "time"], "old does not say how long each step took, which --x time needs"),
        (["{}/none"], "none holds nothing to draw"),
        (["{}/model.bin"], "model.bin is damaged: line 1 is not the record of a step"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, capsys, arguments, message):
    write(tmp_path / "a", records(3))
    write(tmp_path / "old", [{"step": 1, "loss": 2.0}])
    write(tmp_path / "none", [{"step": 1}])
    (tmp_path / "model.bin").write_bytes(bytes(100))
    expect_error(plot.main, [argument.format(tmp_path) for argument in arguments], message, capsys)
    assert read_records(tmp_path / "a" / "metrics.jsonl") == records(3)


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write(tmp_path / "a", records(3))
    expect_error(plot.main, [folder], "drawing needs matplotlib", capsys)
    assert not (tmp_path / "a" / "metrics.png").exists()


# The picture


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


@pytest.mark.parametrize(("x", "label", "last"), [("tokens", "tokens", 100 * 1024), ("time", "training time (seconds)", 25.0)])
def test_the_horizontal_axis_in_tokens_and_in_time(x, label, last):
    """1024 tokens and 250 ms a step, also in a run whose first steps are gone."""
    shown = panels(draw([RunRecords("a", records())], x, smooth=1))
    for title in ("Training loss", "Validation loss"):
        assert shown[title].get_xlabel() == label
        assert drawn(shown[title])[0][0][-1] == pytest.approx(last)
    assert RunRecords("a", records()[50:]).horizontal("tokens", "loss")[0] == 51 * 1024


@pytest.mark.parametrize(("ms", "unit"), [(1e3, "seconds"), (2e3, "minutes"), (1e5, "hours")])
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
    assert len(panels(draw(many, smooth=5))["Training loss"].lines) == 7  # of so many, the means alone


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
    for title, where in (("Training loss", [30, 31]), ("Gradient norm", [30, 31]), ("Validation loss", [50])):
        (x, y), (crosses, heights) = drawn(shown[title])
        assert x[np.isnan(y)].tolist() == where == crosses.tolist()
        assert all(heights > 0)
        assert all(heights < 0.1)  # of the panel's height
        assert shown[title].get_title("right") == "\N{MULTIPLICATION SIGN} not finite"
    assert len(shown["Throughput"].lines) == 1
    assert panels(draw([RunRecords("a", records(3, skipped={1, 2, 3}))]))["Training loss"].get_yticks().size == 0


def test_a_loss_that_explodes_leaves_the_others_visible():
    wild = records()
    for record in wild[90:]:
        record["loss"] *= 10.0 ** (record["step"] - 90)
    axes = panels(draw([RunRecords("a", records()), RunRecords("b", wild)]))["Training loss"]
    low, high = axes.get_ylim()
    assert low < 3.1
    assert 10 < high < 30
    assert "cut off above" in axes.get_title("right")
    assert "cut off" not in panels(draw([RunRecords("a", records())]))["Training loss"].get_title("right")


def test_a_wide_range_gets_a_logarithmic_axis():
    spiky = records()
    spiky[40]["grad_norm"] = 500.0
    scales = [panels(draw([RunRecords("a", made)]))["Gradient norm"].get_yscale() for made in (records(), spiky)]
    assert scales == ["linear", "log"]


def test_runs_of_any_lengths_and_names_are_told_apart():
    names = ["_hidden", "$x^$", "n" * 200, *map(str, range(13))]
    runs = [RunRecords(name, records(5 + 10 * i, val_loss=3.0) if i else records(1)) for i, name in enumerate(names)]
    figure = draw(runs)
    figure.draw_without_rendering()
    shown = panels(figure)
    styles = {
        (line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern)) for line in shown["Validation loss"].lines
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


def test_names_are_as_long_as_it_takes(tmp_path):
    files = [tmp_path / run / "metrics.jsonl" for run in ("x/a", "y/a", "y/b")]
    assert plot.short_names(files[1:]) == ["a", "b"]
    assert plot.short_names(files) == ["x/a", "y/a", "y/b"]
    assert plot.short_names([tmp_path / "old.jsonl"]) == ["old.jsonl"]
