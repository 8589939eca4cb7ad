"""The command, on what runs write."""

import json
import math
import sys

import pytest

from gptjax.plot import __main__ as plot
from gptjax.train.metrics import read_records
from tests.commands import expect_error

matplotlib = pytest.importorskip("matplotlib", reason="needs the [plot] extra")


def records(steps=100, skipped=(), **changes):
    """What a run writes, the loss falling from 11 to 3."""
    made = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 3 + 8 * math.exp(-step / 20),
            "grad_norm": 1.0 + step % 3,
            "lr": 1e-3,
            "ms": 250.0,
        }
        record |= (
            {"tokens_per_s": 4096.0}
            | ({"val_loss": 4.0 - step / 100} if step % 10 == 0 else {})
            | changes
        )
        made.append(
            record | ({"loss": None, "grad_norm": None, "skipped": True} if step in skipped else {})
        )
    return made


def write(folder, made, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in made) + end
    )
    return str(folder)


def test_one_run_is_drawn_in_its_folder_as_often_as_asked(tmp_path, capsys):
    folder = write(tmp_path / "runs" / "a", records(20))
    for _ in range(2):
        assert plot.main([folder]) == 0
    assert (tmp_path / "runs" / "a" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "runs" / "a").iterdir()} == {"metrics.jsonl", "metrics.png"}
    out = capsys.readouterr().out
    assert "run        a: step 20, loss 5.9430, validation loss 3.8000\n" in out
    assert f"wrote      {folder}/metrics.png, " in out


def test_a_bare_name_is_a_run_s(tmp_path, capsys, monkeypatch):
    write(tmp_path / "runs" / "a", records(20))
    write(tmp_path / "b", records(20))
    monkeypatch.chdir(tmp_path)
    assert plot.main(["a", "b"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == [
        "run        a",
        "run        b",
    ]


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
    assert (
        plot.main([one, other, "--output", "pictures/both.svg", "--x", "tokens", "--smooth", "1"])
        == 0
    )
    assert "<svg" in (tmp_path / "pictures" / "both.svg").read_text()


def test_a_run_without_a_step_is_left_out_of_several(tmp_path, capsys):
    one, empty = write(tmp_path / "a", records(5)), write(tmp_path / "b", [])
    assert plot.main([empty, one, "--output", str(tmp_path / "x.png")]) == 0
    assert (
        f"note       {empty}/metrics.jsonl has no step yet and is left out"
        in capsys.readouterr().out
    )
    expect_error(plot.main, [empty], "has no step yet, so there is nothing to draw", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "nowhere is not a run: there is no "),
        (["{}"], "is not a run: there is no "),
        ([], "runs"),
        (
            ["{}/a", "--output", "{}/a/metrics.jsonl"],
            "must be a file whose name ends in .png, .svg or .pdf",
        ),
        (["{}/a", "--output", "{}/a"], "must be a file whose name ends in .png"),
        (["{}/a", "--output", "/dev/null/x/y.png"], "/dev/null/x cannot be used"),
        (["{}/a", "--x", "epochs"], "epochs"),
        (["{}/a", "--smooth", "0"], "--smooth must be at least 1, not 0"),
        (
            ["{}/old", "--x", "time"],
            "the records of old lack step times, which --x time needs",
        ),
        (["{}/none"], "none has nothing to draw"),
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


def test_names_are_as_long_as_it_takes(tmp_path):
    files = [tmp_path / run / "metrics.jsonl" for run in ("x/a", "y/a", "y/b")]
    assert plot.short_names(files[1:]) == ["a", "b"]
    assert plot.short_names(files) == ["x/a", "y/a", "y/b"]
    assert plot.short_names([tmp_path / "old.jsonl"]) == ["old.jsonl"]
