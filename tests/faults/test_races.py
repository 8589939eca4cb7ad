"""Starts and resumes at the same time."""

import json
import re
import subprocess
import sys

import pytest

from gptjax.train.folders import claim
from tests.conftest import ROOT
from tests.faults.tally import trials
from tests.train.test_command import command, data_root, metrics, start  # noqa: F401

RACERS = 4
# Takes a folder each time that it is told to, says which, and gives it back.
RACER = """
import contextlib, json, sys
from pathlib import Path
from gptjax.errors import CheckpointError
from gptjax.train.folders import claim
for line in sys.stdin:
    runs, resume = json.loads(line)
    try:
        with claim(Path(runs), "a", resume) as folder:
            (folder / "config.yaml").touch()
            print(folder.name, flush=True)
            sys.stdin.readline()
    except CheckpointError as error:
        print(error, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def race():
    """``race(runs, resume)``: what each of some processes gets, or is told, that all want the
    folder of a run.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    racers = [subprocess.Popen([sys.executable, "-c", RACER], **pipes) for _ in range(RACERS)]

    def tell(line: str) -> None:
        for racer in racers:
            racer.stdin.write(line + "\n")
            racer.stdin.flush()

    def go(runs, resume: str | None) -> list[str]:
        tell(json.dumps([str(runs), resume]))
        said = [racer.stdout.readline().strip() for racer in racers]
        tell("enough")
        return said

    yield go
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0


def test_each_start_gets_a_folder_of_its_own(race, tmp_path, tally):
    count = trials(20)
    held = 0
    for trial in range(count):
        held += sorted(race(tmp_path / str(trial), None)) == ["a", "a-2", "a-3", "a-4"]
    tally("starts at once, four of a name", count, held)


@pytest.mark.parametrize("begun", [True, False])
def test_one_resumes_and_the_others_name_it(race, tmp_path, tally, begun):
    count = trials(20)
    held = 0
    for trial in range(count):
        runs = tmp_path / str(trial)
        if begun:
            (runs / "a" / "checkpoints").mkdir(parents=True)
        said = sorted(race(runs, "auto"))
        held += said[-1] == "a" and all(
            "/a is being trained by process " in words for words in said[:-1]
        )
    tally("resumes at once, four of a run", count, held)


def test_two_starts_and_two_resumes_of_the_command(command, tmp_path, tally):  # noqa: F811
    """And a start while a run of that name is trained, which kill -9 then sets free."""
    runs = tmp_path / "runs"
    few = [*command, "--train.steps", "4", "--train.eval_every", "0"]
    both = [start(*few), start(*few)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    tally(
        "starts at once, of the command",
        2,
        sum(len(metrics(runs / name)) == 4 for name in ("tiny", "tiny-2")),
    )
    for folder in (runs / "tiny", runs / "tiny-2"):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]

    long = [
        *command,
        "--train.steps",
        "1000000",
        "--train.eval_every",
        "0",
        "--train.checkpoint_every",
        "0",
        "--reschedule",
    ]
    both = {
        process.pid: process
        for process in (start(*long, "--resume", "auto"), start(*long, "--resume", "auto"))
    }
    refused = None
    while refused is None:
        refused = next((process for process in both.values() if process.poll() is not None), None)
    trained = next(process for process in both.values() if process is not refused)
    error = refused.communicate()[1]
    named = re.search(r"error: \S+/tiny-2 is being trained by process (\d+) on ", error)
    assert trained.poll() is None, trained.communicate()[1]
    trained.kill()
    trained.communicate()
    assert named, error
    tally(
        "resumes at once, of the command",
        1,
        refused.returncode == 2 and int(named[1]) == trained.pid,
    )
    with claim(runs, "tiny", "auto") as folder:  # the kill has set it free
        assert folder == runs / "tiny-2"
