"""Processes that train together, on this machine; and what they agree on, with a store in place of
the real one.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from gptjax.config import DistributedConfig
from gptjax.errors import ConfigError, GptjaxError
from gptjax.parallel import processes
from gptjax.parallel.processes import Stop
from tests.conftest import ROOT
from tests.train.test_command import TINY, data_root, metrics, run  # noqa: F401


class Store(dict):
    """What the coordination service keeps, for processes that are all this one."""

    def key_value_set(self, key, value, allow_overwrite=False):
        """The first to set it wins."""
        if key in self and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_try_get(self, key):
        """What was set."""
        if key not in self:
            raise RuntimeError("NOT_FOUND")
        return self[key]

    def blocking_key_value_get(self, key, milliseconds):
        """What was set, which has been."""
        return self[key]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(processes, "store", lambda: store)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    return store


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_processes_stop_at_the_same_step(store, order):
    """Whoever has the results of step n has them because all have started it: one may be a step
    ahead of another.
    """
    stops = [Stop() for _ in range(3)]
    last = [0, 0, 0]
    for step in range(1, 10):
        if step == 4:
            assert stops[1].receive("SIGTERM") == 5
        if step == 5:
            stops[2].receive("SIGINT")  # too late to matter
        for process in order:  # all start the step,
            if not last[process]:
                stops[process].announce(step)
        for process in reversed(order):  # so the step before it is done everywhere
            if not last[process] and stops[process].is_last(step):
                last[process] = step
            # No run has been stopped before its last step
            assert bool(stops[process].name) == bool(last[process])
    assert last == [5, 5, 5]
    assert {stop.name for stop in stops} == {"SIGTERM"}


def test_one_process_stops_at_once():
    stop = Stop(steps=3)
    stop.announce(1)
    assert not stop.is_last(1)
    assert stop.receive("SIGINT") == 2
    assert stop.is_last(2)
    assert stop.name == "SIGINT"


def test_process_0s_decision_or_error_reaches_the_others(store, monkeypatch):
    process = [0]
    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    assert processes.broadcast("folder", lambda: "runs/a") == "runs/a"
    process[0] = 1
    assert processes.broadcast("folder", lambda: "runs/a-2") == "runs/a"
    process[0] = 0
    with pytest.raises(ZeroDivisionError):
        processes.first_then_others("corpus", lambda: 1 / 0)
    process[0] = 1
    with pytest.raises(ConfigError, match="process 0 failed: division by zero"):
        processes.first_then_others("corpus", lambda: 1)


def test_different_options_are_rejected(store, monkeypatch):
    process = [0]
    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    processes.require_same({"seed": 0})
    process[0] = 1
    processes.require_same({"seed": 0})
    with pytest.raises(ConfigError, match="differ from process 0"):
        processes.require_same({"seed": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "given together or not at all"),
        ({"coordinator": "a", "process": "0/2"}, "must be HOST:PORT, not a"),
        ({"coordinator": "a:1", "process": "2/2"}, "N/M, with N from 0 to M - 1, not 2/2"),
        ({"coordinator": "a:1", "process": "one"}, "not one"),
        ({"timeout": 0}, "from 1 to 86400 seconds"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**options)


def test_a_single_process_joins_no_cluster():
    """JAX has started here long ago, and there is no cluster."""
    processes.start(DistributedConfig())
    assert not jax.distributed.is_initialized()
    assert processes.is_first()


def test_a_failure_in_one_process_fails_all_with_its_reason(store, monkeypatch):
    """The others have told what became of it, before this one does: process 1, then 2, where 0 has
    had no trouble.
    """
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for name, others, mine, kind, words in (
        ("good", ["", ""], None, None, ""),
        (
            "damaged",
            ["", ""],
            ValueError("bad sum\nand more"),
            RuntimeError,
            "^in process 1 of 3: bad sum$",
        ),
        (
            "elsewhere",
            ["", '[false, "cut off"]'],
            None,
            RuntimeError,
            "^in process 2 of 3: cut off$",
        ),
        (
            "all alike",
            ['[true, "other width"]'] * 2,
            ConfigError("other width"),
            GptjaxError,
            "^other width$",
        ),
        (
            "worse",
            ["", '[true, "no room"]'],
            ValueError("bad sum"),
            GptjaxError,
            "^in process 2 of 3: no room$",
        ),
    ):

        def do(error=mine):
            if error:
                raise error
            return "done"

        store |= {
            f"gptjax/{name}/{process}": said for process, said in zip((0, 2), others, strict=True)
        }
        if not kind:
            assert processes.run_in_all(name, do) == "done"
            continue
        with pytest.raises(kind, match=words) as raised:
            processes.run_in_all(name, do)
        assert raised.type is kind


@contextlib.contextmanager
def started(count, args, devices=1):
    """The command in so many processes, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "gptjax.train",
        *args,
        "--distributed.coordinator",
        at,
        "--distributed.process",
    ]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": ROOT,
        "env": environment,
    }
    started = [subprocess.Popen([*command, f"{n}/{count}"], **pipes) for n in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture
def common(tmp_path, data_root):  # noqa: F811
    """Options of a tiny run that others can be compared with; it ends where it is told to."""
    config = tmp_path / "tiny.yaml"
    settings = {"schedule": "constant", "learning_rate": 1e-3}
    train = {
        "steps": 5000,
        "eval_every": 0,
        "sample_tokens": 0,
        "checkpoint_every": 2,
        "eval_tokens": 64,
    }
    model = TINY["model"] | {"num_heads": 4, "vocab_size": 4096}
    config.write_text(
        yaml.safe_dump({"model": model, "data": TINY["data"], "optim": settings, "train": train})
    )
    return [
        "--config",
        str(config),
        "--runs",
        str(tmp_path / "runs"),
        "--data.root",
        str(data_root),
    ]


def wait_for_checkpoint(process, folder, step):
    """Wait until there is one of that step or a later one."""
    deadline = time.monotonic() + 300  # on a machine that has other work
    while not any(int(path.name[-8:]) >= step for path in folder.glob("checkpoints/step_????????")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_because_of_another(process):
    """What a process says that ends because another is gone, JAX's own words aside, which may come
    after.
    """
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    (said,) = (line for line in output.splitlines() if "error: another process was lost" in line)
    assert "start them all again with --resume auto" in said
    return output


def test_processes_train_as_one_and_resume_with_another_count(tmp_path, common):
    """Two processes, of which 1 is killed; four go on from an older checkpoint, since one of them
    cannot read its part of the newest, and 0 is killed; one goes on; the losses are those of one
    process that did it all.
    """
    folder = tmp_path / "runs" / "many"
    many = [*common, "--name", "many", "--resume", "auto", "--distributed.timeout", "30"]

    with started(2, [*many, "--mesh.fsdp", "2"]) as (first, second):
        wait_for_checkpoint(first, folder, 4)
        second.kill()
        assert "2 processes; if one is lost, all end within 30 s" in ended_because_of_another(first)

    newest = max(folder.glob("checkpoints/step_????????"))
    part = max(newest.glob("state/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(part, 100)
    with started(4, [*many, "--mesh.data", "2", "--mesh.tensor", "-1"]) as four:
        wait_for_checkpoint(four[0], folder, int(newest.name[-8:]) + 2)
        four[0].kill()
        outputs = [four[0].communicate(timeout=60)[0], *map(ended_because_of_another, four[1:])]
    assert f"{newest.name} is damaged and was set aside: in process " in outputs[0]
    assert f"resumed    {folder} after step {int(newest.name[-8:]) - 2}" in outputs[0]
    # Only the first speaks
    assert not [text for text in outputs[1:] if "loss" in text or "damaged" in text]
    assert not [text for text in outputs if "Exception ignored" in text]
    assert [path.name for path in folder.glob("checkpoints/damaged-*")] == [
        f"damaged-{newest.name}"
    ]

    end = str(int(max(folder.glob("checkpoints/step_????????")).name[-8:]) + 2)
    assert run(*many, "--train.steps", end) == 0
    assert run(*common, "--name", "one", "--train.steps", end) == 0
    assert_same_losses(folder, tmp_path / "runs" / "one", int(end))


def assert_same_losses(folder, other, steps):
    """Of every step, with the validations."""
    found, expected = metrics(folder), metrics(other)
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, steps + 1))
    assert [set(r) for r in found] == [set(r) for r in expected]
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        pairs = [(r[key], e[key]) for r, e in zip(found, expected, strict=True) if key in r]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-4) if pairs else None


def test_processes_load_evaluate_and_sample_as_one(tmp_path, common, capsys):
    """Two processes of two devices each, from the weights of another run."""
    runs = tmp_path / "runs"
    assert (
        run(*common, "--name", "given", "--train.steps", "2", "--optim.learning_rate", "0.1") == 0
    )
    training = [
        *common,
        "--init",
        str(runs / "given"),
        "--train.steps",
        "4",
        "--train.eval_every",
        "2",
    ]
    training += [
        "--train.sample_every",
        "2",
        "--train.sample_tokens",
        "8",
        "--train.sample_temperature",
        "0",
    ]
    with started(
        2, [*training, "--name", "many", "--mesh.fsdp", "2", "--mesh.data", "-1"], devices=2
    ) as both:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    capsys.readouterr()
    assert run(*training, "--name", "one") == 0
    alone = capsys.readouterr().out
    assert_same_losses(runs / "many", runs / "one", 4)
    assert sum("val_loss" in record for record in metrics(runs / "many")) == 2
    said = re.compile(
        r"^init [^\n]*|^--- sample after step \d ---$.*?^---$", re.MULTILINE | re.DOTALL
    )
    assert len(said.findall(alone)) == 3
    assert said.findall(outputs[0]) == said.findall(alone)
    assert "4 devices: data 2 x fsdp 2 x tensor 1" in outputs[0]
    assert not re.search("loss|sample", outputs[1])
