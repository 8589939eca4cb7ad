"""How processes end: real ones on this machine, and what they print."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from gptjax.errors import CheckpointError
from gptjax.parallel import heartbeat, processes
from gptjax.train.checkpoint import _write_errors
from tests.conftest import ROOT
from tests.parallel.test_processes import store  # noqa: F401

PROGRAM = """
import sys, time, jax
from gptjax import cli
from gptjax.parallel import processes
from gptjax.parallel import heartbeat
from gptjax.errors import ConfigError
address, process, error = sys.argv[1:]
with heartbeat.exit_together("prog"), cli.reported_errors("prog", should_report=heartbeat.should_report):
    processes.start(processes.DistributedConfig(coordinator=address, process=process))
    jax.devices()
    with heartbeat.watched("prog", 6):
        print("ready", flush=True)
        if error:
            raise ConfigError(error)
        time.sleep(60)
"""


@contextlib.contextmanager
def pair(*errors):
    """Two processes that wait, or fail with these errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROGRAM, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    both = [
        subprocess.Popen([*command, f"{n}/2", error], **pipes) for n, error in enumerate(errors)
    ]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_process_that_hangs_or_dies_is_named_by_the_others():
    """Process 0, which keeps the store, and another one; JAX's threads would end the other process
    without a word of ours.

    If process 0 dies they may have the last word.
    """
    with pair("", "") as a, pair("", "") as b, pair("", "") as c:
        cases = (
            (a, 1, signal.SIGSTOP, "1 of 2"),
            (b, 0, signal.SIGSTOP, "0 of 2"),
            (c, 0, signal.SIGKILL, "0 is gone"),
        )
        for both, *_ in cases:
            assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        time.sleep(1)
        for both, lost_one, number, _ in cases:
            both[lost_one].send_signal(number)
        for both, lost_one, _, words in cases:
            other = both[1 - lost_one]
            output = other.communicate(timeout=60)[0]
            (said,) = (
                line for line in output.splitlines() if "error: another process was lost" in line
            )
            assert said.startswith(f"prog: error: another process was lost (process {words}"), (
                output
            )
            assert "start them all again with --resume auto" in said
            assert other.returncode == 1


def test_an_error_in_all_processes_is_printed_once():
    with pair("a bad mesh", "a bad mesh") as both:
        outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], outputs
    assert outputs == ["ready\nprog: error: a bad mesh\n", "ready\n"]


def test_a_failure_of_process_0_is_reported_by_process_0_alone(store, monkeypatch):  # noqa: F811
    process = [0]
    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    assert heartbeat.should_report("no such corpus")
    process[0] = 1
    assert not heartbeat.should_report(f"{processes.FIRST_FAILED}no such corpus")
    process[0] = 2
    assert not heartbeat.should_report("no such corpus")
    assert heartbeat.should_report("differ from process 0")  # which only this one was given


def test_a_single_process_reports_every_error_and_watches_nobody():
    assert heartbeat.should_report("anything")
    with heartbeat.watched("prog", 0.001):
        time.sleep(0.01)


def test_a_lost_process_is_not_reported_as_a_disk_error(monkeypatch, tmp_path):
    for many, kind in ((True, ValueError), (False, CheckpointError)):
        monkeypatch.setattr(processes, "is_distributed", lambda many=many: many)
        with (
            pytest.raises(kind, match="waiting for async_write_complete barrier"),
            _write_errors(tmp_path),
        ):
            raise ValueError("Timed out while waiting for async_write_complete barrier.")


def test_a_failing_process_exits_at_once(store, monkeypatch, capsys):  # noqa: F811
    ended = []

    def end(status):
        ended.append(status)
        raise InterruptedError  # what comes after it in the code is not reached

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(heartbeat, "ENDING", threading.Lock())
    for error in (
        SystemExit(2),
        RuntimeError("UNKNOWN: Gloo all-reduce failed: reset"),
        ValueError("ours"),
    ):
        with pytest.raises(InterruptedError), heartbeat.exit_together("prog"):
            raise error
    assert ended == [2, 1, 1]
    shown = capsys.readouterr().err
    assert shown.startswith(
        "prog: error: another process was lost (UNKNOWN: Gloo all-reduce failed: reset)"
    )
    assert "ValueError: ours" in shown
