"""Processes that train together, on this machine; and what they agree on, with a store in place of the real one."""

import contextlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from gptjax import distributed
from gptjax.distributed import DistributedConfig, Stop
from gptjax.errors import ConfigError
from tests.conftest import ROOT
from tests.test_train import TINY, data_root, metrics, run  # noqa: F401


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
    monkeypatch.setattr(distributed, "store", lambda: store)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    return store


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_stop_at_the_same_step_whoever_gets_the_signal_and_however_far_the_others_are(store, order):
    """Whoever has the results of step n has them because all have started it: one may be a step ahead of another."""
    signals = [[], [], []]
    stops = [Stop(received) for received in signals]
    last = [0, 0, 0]
    for step in range(1, 10):
        if step == 4:
            signals[1].append("SIGTERM")
        if step == 5:
            signals[2].append("SIGINT")  # too late to matter
        for process in order:  # all start the step,
            if not last[process]:
                stops[process].say(step)
        for process in reversed(order):  # so the step before it is done everywhere
            if not last[process] and stops[process].now(step):
                last[process] = step
    assert last == [5, 5, 5]
    assert {stop.name for stop in stops} == {"SIGTERM"}


def test_one_process_stops_at_once():
    received = []
    stop = Stop(received)
    stop.say(1)
    assert not stop.now(1)
    received.append("SIGINT")
    assert stop.now(1)
    assert stop.name == "SIGINT"


def test_the_others_get_what_the_first_decides_or_why_it_could_not(store, monkeypatch):
    process = [0]
    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    assert distributed.agreed("folder", lambda: "runs/a") == "runs/a"
    process[0] = 1
    assert distributed.agreed("folder", lambda: "runs/a-2") == "runs/a"
    process[0] = 0
    with pytest.raises(ZeroDivisionError):
        distributed.first_then_others("corpus", lambda: 1 / 0)
    process[0] = 1
    with pytest.raises(ConfigError, match="process 0 failed: division by zero"):
        distributed.first_then_others("corpus", lambda: 1)


def test_all_have_to_be_given_the_same_options(store, monkeypatch):
    process = [0]
    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    distributed.require_same({"seed": 0})
    process[0] = 1
    distributed.require_same({"seed": 0})
    with pytest.raises(ConfigError, match="other options than process 0"):
        distributed.require_same({"seed": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "given together or not at all"),
        ({"coordinator": "a", "process": "0/2"}, "must be HOST:PORT, not a"),
        ({"coordinator": "a:1", "process": "2/2"}, "N/M, with N from 0 to M - 1, not 2/2"),
        ({"coordinator": "a:1", "process": "one"}, "not one"),
        ({"timeout": 0}, "at least 1 second"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**options)


def test_alone_nothing_is_joined():
    """JAX has started here long ago, and there is no cluster."""
    distributed.start(DistributedConfig())
    assert not jax.distributed.is_initialized()
    assert distributed.is_first()


@contextlib.contextmanager
def processes(count, args):
    """The command in so many processes, each with one device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gptjax.train", *args, "--distributed.coordinator", at, "--distributed.process"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([*command, f"{n}/{count}"], **pipes) for n in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_processes_train_as_one_and_a_lost_one_ends_them_in_time_to_go_on_in_another_number(tmp_path, data_root):  # noqa: F811
    """Two processes, one of which is killed; four go on, and one; the losses are those of one that did it all."""
    config = tmp_path / "tiny.yaml"
    settings = {"schedule": "constant", "learning_rate": 1e-3}
    train = {"steps": 5000, "eval_every": 0, "sample_tokens": 0, "checkpoint_every": 2, "eval_tokens": 64}
    model = TINY["model"] | {"num_heads": 4, "vocab_size": 4096}
    config.write_text(yaml.safe_dump({"model": model, "data": TINY["data"], "optim": settings, "train": train}))
    common = ["--config", str(config), "--runs", str(tmp_path / "runs"), "--data.root", str(data_root)]
    folder = tmp_path / "runs" / "many"
    many = [*common, "--name", "many", "--resume", "auto"]

    with processes(2, [*many, "--mesh.fsdp", "2", "--distributed.timeout", "30"]) as (first, second):
        deadline = time.monotonic() + 300  # on a machine that has other work
        while not any(folder.glob("checkpoints/step_????????")):
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second.kill()
        output = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, 2), output
    assert "2 processes; should one be lost, all end within 30 s" in output
    assert "another process was lost" in output
    assert "start them all again with --resume auto" in output

    reached = len(metrics(folder))
    middle, end = str(reached + 2), str(reached + 4)
    with processes(4, [*many, "--mesh.data", "2", "--mesh.tensor", "-1", "--train.steps", middle]) as four:
        outputs = [process.communicate(timeout=300)[0] for process in four]
    assert [process.returncode for process in four] == [0] * 4, outputs
    assert "resumed" in outputs[0]
    assert not [text for text in outputs[1:] if "loss" in text]  # only the first speaks
    assert run(*many, "--train.steps", end) == 0
    assert run(*common, "--name", "one", "--train.steps", end) == 0
    found, expected = metrics(folder), metrics(tmp_path / "runs" / "one")
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, reached + 5))
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=2e-4)
