"""What a person at a terminal does to a run: Ctrl-C, Ctrl-C again, a terminal that is closed,
output that nobody reads.
"""

import contextlib
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.faults.tally import trials
from tests.train.test_command import arrays, command, data_root, metrics, start  # noqa: F401

CTRL_C = b"\x03"
PATIENCE = 120.0  # seconds, on a machine that has other work
# In a session of its own, whose terminal is standard input.
LAUNCH = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, sys.argv[1:])"
)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *args: str, before: str = "") -> None:
        """Start it; ``before`` is Python to run in its process first."""
        self.fd, theirs = pty.openpty()
        launch = [
            sys.executable,
            "-c",
            f"{before}\n{LAUNCH}",
            sys.executable,
            "-m",
            "gptjax.train",
            *args,
        ]
        self.process = subprocess.Popen(
            launch,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: bytes) -> None:
        """Type."""
        os.write(self.fd, keys)

    def read_until(self, words: str = "\0", seconds: float = PATIENCE) -> bool:
        """Read what is shown until ``words`` are, or the terminal is left, or time is up."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            if not select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            try:
                more = os.read(self.fd, 65536)
            except OSError:  # Linux's way to say that nobody holds the other end
                return False
            if not more:
                return False
            self.shown += more.decode(errors="replace")
        return True

    def end(self) -> int:
        """Read all there is to come. Returns the exit status."""
        self.read_until()
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """Close the window."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def terminal():
    """Opens terminals, which are closed in the end."""
    opened = []

    def open_one(*args: str, **options: str) -> Terminal:
        opened.append(Terminal(*args, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.process.kill()
        one.process.wait()
        one.close()


@pytest.fixture
def endless(command):  # noqa: F811
    """The arguments of a run that ends only when it is stopped."""
    never = [f"--train.{name}=0" for name in ("eval_every", "sample_tokens", "checkpoint_every")]
    return [
        *command,
        *never,
        "--train.steps",
        "1000000",
        "--name",
        "endless",
        "--optim.schedule",
        "constant",
    ]


def test_ctrl_c_says_at_once_what_will_happen_and_saves(endless, tmp_path, terminal, tally):
    window = terminal(*endless)
    assert window.read_until("step      20/1000000"), window.shown
    window.type(CTRL_C)
    assert window.end() == 0, window.shown
    said = re.search(
        r"stopping after step (\d+), saving; Ctrl-C again quits without saving\r\n", window.shown
    )
    step = int(said[1])
    after = window.shown[said.end() :]
    folder = tmp_path / "runs" / "endless"
    assert f"stopped by SIGINT after step {step}, saved in {folder}; continue with\r\n" in after
    assert window.shown.endswith(f"python -m gptjax.train --resume {folder}\r\n")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert metrics(folder)[-1]["step"] == step
    tally("Ctrl-C", 1, 1)


def test_a_second_ctrl_c_ends_cleanly_whatever_is_being_saved(endless, tmp_path, terminal, tally):
    """Each time the run goes on from what the last one left, or anew; the terminal gets its cursor
    back.
    """
    rng, tried, held = random.Random(0), trials(3), 0
    checkpoints = tmp_path / "runs" / "endless" / "checkpoints"
    for trial in range(tried):
        window = terminal(*endless, "--resume", "auto", "--train.checkpoint_every", "1")
        assert window.read_until("tok/s"), window.shown
        time.sleep(rng.uniform(0, 1))
        window.type(CTRL_C)
        assert window.read_until("stopping after"), window.shown
        time.sleep(rng.uniform(0, 0.1) if trial else 0)
        window.type(CTRL_C)
        status = window.end()
        assert "damaged" not in window.shown
        if "saved in" in window.shown:  # it was saved before the second
            tried -= 1
            continue
        held += (
            status == 130
            and window.shown.rstrip().endswith("error: interrupted")
            and "\x1b[?25h" in window.shown
        )
        for path in checkpoints.glob("step_????????"):
            assert len(arrays(checkpoints.parent, int(path.name[-8:]))) > 40
    tally("Ctrl-C twice", tried, held)


def test_a_closed_terminal_saves(endless, tmp_path, terminal, tally):
    window = terminal(*endless)
    assert window.read_until("step      20/1000000"), window.shown
    window.close()  # the system sends SIGHUP
    assert window.process.wait(PATIENCE) == 0
    folder = tmp_path / "runs" / "endless"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        f"step_{metrics(folder)[-1]['step']:08d}"
    ]
    tally("a closed terminal", 1, 1)


def test_what_nohup_ignores_stays_ignored(endless, tmp_path, terminal, tally):
    window = terminal(
        *endless, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    assert window.read_until("step      20/1000000"), window.shown
    window.process.send_signal(signal.SIGHUP)
    before = metrics(tmp_path / "runs" / "endless")[-1]["step"]
    deadline = time.monotonic() + PATIENCE
    while metrics(tmp_path / "runs" / "endless")[-1]["step"] < before + 20:
        assert window.process.poll() is None, window.shown
        assert time.monotonic() < deadline
        window.read_until(seconds=0.05)
    window.process.send_signal(signal.SIGTERM)
    assert window.end() == 0
    assert "stopped by SIGTERM" in window.shown
    tally("SIGHUP under nohup", 1, 1)


@pytest.mark.parametrize("streams", ["stdout", "stdout and stderr"])
def test_output_that_nobody_reads_ends_the_display_alone(command, tmp_path, tally, streams):  # noqa: F811
    process = start(*command)
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    if "stderr" in streams:
        process.stderr.close()
        assert process.wait(PATIENCE) == 0
    else:
        with contextlib.closing(process.stderr):
            assert (
                process.stderr.read()
                == "the output can no longer be written (Broken pipe); training goes on\n"
            )
        assert process.wait(PATIENCE) == 0
    folder = tmp_path / "runs" / "tiny"
    assert metrics(folder)[-1]["step"] == 20
    assert (folder / "checkpoints" / "step_00000020").exists()
    tally("output that nobody reads", 1, 1)
