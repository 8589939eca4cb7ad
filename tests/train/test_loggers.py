"""TensorBoard read back by TensorBoard itself, Weights & Biases offline, and what happens when they
fail.
"""

import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gptjax.config import LogConfig
from gptjax.errors import ConfigError
from gptjax.train.loggers import Loggers, check_installed, open_loggers

RECORD = {"step": 1, "loss": 2.5, "grad_norm": 1.5, "lr": 1e-3, "ms": 10.0, "tokens_per_s": 100.0}
CONFIG = {"model": {"num_layers": 2}, "name": None}


def refuse(text: str) -> None:
    raise AssertionError(text)


# TensorBoard


def events(folder: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return read.Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = events(folder)
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events(folder).Tensors(tag)
    ]


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    with open_loggers(LogConfig(tensorboard=True), tmp_path, 0, CONFIG, refuse) as loggers:
        loggers.write(RECORD)
        found = scalars(tmp_path / "tensorboard")  # on disk before the file is closed
        loggers.write(RECORD | {"step": 2, "loss": math.nan, "val_loss": 3.25, "skipped": True})
        loggers.text("sample", "\n\n# To be\n  or *not*", 2)
    assert found == {
        "train/loss": [(1, 2.5)],
        "train/grad_norm": [(1, 1.5)],
        "train/lr": [(1, pytest.approx(1e-3))],
        "speed/ms": [(1, 10.0)],
        "speed/tokens_per_s": [(1, 100.0)],
    }
    found = scalars(tmp_path / "tensorboard")
    assert found["val/loss"] == [(2, 3.25)]
    assert found["train/skipped"] == [(2, 1.0)]
    assert math.isnan(found["train/loss"][1][1])
    assert texts(tmp_path / "tensorboard", "sample") == [
        (2, "    \n    \n    # To be\n      or *not*")
    ]  # code, in Markdown
    assert texts(tmp_path / "tensorboard", "config") == [
        (0, "    model:\n      num_layers: 2\n    name: null\n")
    ]


@pytest.mark.parametrize(("done", "kept"), [(2, [(1, 1.0), (2, 1.0)]), (0, [])])
def test_tensorboard_drops_steps_that_a_resumed_run_repeats(tmp_path, done, kept):
    pytest.importorskip("tensorboard")
    for start, stop, loss in ((0, 5, 1.0), (done, 4, 2.0)):
        with open_loggers(LogConfig(tensorboard=True), tmp_path, start, CONFIG, refuse) as loggers:
            for step in range(start + 1, stop + 1):
                loggers.write({"step": step, "loss": loss})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path / "tensorboard")["train/loss"] == kept + [
        (step, 2.0) for step in range(done + 1, 5)
    ]


# Weights & Biases


class FakeRun:
    """Remembers what it is told, and has had the steps below ``starting_step`` before."""

    def __init__(self, **arguments):
        self.arguments, self.logged, self.exit_code = arguments, [], None
        self.id, self.starting_step = (
            arguments["id"] or "fresh",
            0 if arguments["id"] is None else 4,
        )

    def log(self, values, step):
        """As wandb's."""
        self.logged.append((step, values))

    def finish(self, exit_code):
        """As wandb's."""
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch):
    """The runs that a stand-in for the package was asked to start."""
    started = []

    def init(**arguments):
        started.append(FakeRun(**arguments))
        return started[-1]

    fake = types.SimpleNamespace(init=init, Html=str, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path, runs):
    folder = tmp_path / "runs" / "a"
    with open_loggers(LogConfig(wandb="team/project"), folder, 0, CONFIG, refuse) as loggers:
        loggers.write(RECORD | {"val_loss": 3.0})
        loggers.text("sample", "a < b\n", 1)
    (first,) = runs
    asked = {
        key: first.arguments[key] for key in ("entity", "project", "name", "id", "dir", "config")
    }
    assert asked == {
        "entity": "team",
        "project": "project",
        "name": "a",
        "id": None,
        "dir": folder,
        "config": CONFIG,
    }
    charts = {
        "train/loss": 2.5,
        "train/grad_norm": 1.5,
        "train/lr": 1e-3,
        "speed/ms": 10.0,
        "speed/tokens_per_s": 100.0,
    }
    assert first.logged == [
        (1, charts | {"val/loss": 3.0}),
        (1, {"sample": "<pre>a &lt; b\n</pre>"}),
    ]
    assert first.exit_code == 0
    with (
        pytest.raises(ZeroDivisionError),
        open_loggers(LogConfig(wandb="project"), folder, 2, CONFIG, refuse) as loggers,
    ):
        for step in (3, 4, 5):
            loggers.write({"step": step, "loss": 1.0})
        raise ZeroDivisionError
    assert runs[1].arguments["id"] == "fresh"
    assert runs[1].arguments["entity"] is None
    # It has had the third, and takes no step back
    assert [step for step, _ in runs[1].logged] == [4, 5]
    assert runs[1].exit_code == 1
    open_loggers(LogConfig(wandb="project"), folder, 0, CONFIG, refuse)
    assert runs[2].arguments["id"] is None  # from the start again: another run


def test_no_login_is_an_error_that_leaves_no_folder(tmp_path, runs, monkeypatch):
    def init(**arguments):
        raise RuntimeError("No API key.")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(
        ConfigError,
        match=r"log\.wandb p cannot start \(No API key\): run `wandb login`, or set WANDB_MODE=",
    ):
        open_loggers(LogConfig(wandb="p"), tmp_path / "a", 0, CONFIG, refuse)
    assert not (tmp_path / "a").exists()


def test_weights_and_biases_offline(tmp_path):
    """The package itself, in a process of its own: it changes signal handlers, the environment and
    standard output.
    """
    if not importlib.util.find_spec("wandb"):
        pytest.skip("needs the [wandb] extra")
    script = """if True:
        import pathlib, sys
        from gptjax.config import LogConfig
        from gptjax.train.loggers import open_loggers
        folder = pathlib.Path(sys.argv[1])
        with open_loggers(LogConfig(wandb="p"), folder, 0, {"a": {"b": 1}}, sys.exit) as loggers:
            loggers.write({"step": 1, "loss": float("nan")})
            loggers.text("sample", "To be", 1)
    """
    environment = {
        "WANDB_MODE": "offline",
        "PATH": "",
        "HOME": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        check=True,
        capture_output=True,
        env=environment,
    )
    run_id = (tmp_path / "a" / "wandb_id").read_text().strip()
    (log,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
    assert log.name == f"run-{run_id}.wandb"
    assert b"train/loss" in log.read_bytes()
    (sample,) = log.parent.glob("files/media/html/sample_*.html")
    assert "To be" in sample.read_text()


# Both


@pytest.mark.parametrize(
    ("cfg", "package"),
    [(LogConfig(tensorboard=True), "tensorboard"), (LogConfig(wandb="p"), "wandb")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, cfg, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"log\.{package} needs {package}: pip install 'gptjax\[{package}\]'"
    ):
        check_installed(cfg)
    check_installed(LogConfig())


def test_of_several_processes_the_first_one_logs(tmp_path, runs, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with open_loggers(
        LogConfig(tensorboard=True, wandb="p"), tmp_path / "a", 0, CONFIG, refuse
    ) as loggers:
        loggers.write(RECORD)
    assert not runs
    assert not (tmp_path / "a").exists()


class Failing:
    """Logs two records, then its disk is full."""

    title = "Failing"

    def __init__(self):
        self.calls = 0

    def write(self, record):
        """As a logger's."""
        self.calls += 1
        if self.calls == 3:
            raise OSError(28, "No space\nleft")

    def close(self, failed):
        """As a logger's."""
        raise AssertionError("closed after it failed")


def test_one_that_fails_is_left_out_with_one_warning(tmp_path):
    pytest.importorskip("tensorboard")
    warnings, failing = [], Failing()
    good = open_loggers(LogConfig(tensorboard=True), tmp_path, 0, CONFIG, refuse)._loggers
    with Loggers([failing, *good], warnings.append) as loggers:
        for step in range(1, 6):
            loggers.write({"step": step, "loss": 1.0})
    message = (
        "Failing failed and is no longer used: [Errno 28] No space left; metrics.jsonl "
        "has every step"
    )
    assert (warnings, failing.calls) == ([message], 3)
    assert len(scalars(tmp_path / "tensorboard")["train/loss"]) == 5
