"""kill -9 at random points of one run, again and again; in the end it is the run that nobody
killed, bit for bit.
"""

import random
import subprocess
import time

import pytest

from tests.faults.tally import trials
from tests.train.test_command import assert_same_run, command, data_root, metrics_text, start  # noqa: F401

KILLS = 20  # of one run, at most
STEPS = 90
WINDOW = 4.0  # seconds after a start in which it imports, compiles and reads the checkpoint


@pytest.mark.parametrize("seed", range(trials(1)))
def test_a_run_killed_at_random_points_is_the_run_that_was_not(command, tmp_path, tally, seed):  # noqa: F811
    """A quarter of the kills may fall before training goes on, the others between or in two steps,
    or in a save.
    """
    rng = random.Random(seed)
    common = [
        *command,
        "--train.steps",
        str(STEPS),
        "--train.sample_tokens",
        "0",
        "--seed",
        str(seed),
    ]
    common += ["--train.checkpoint_every", "1", "--train.eval_tokens", "6000"]
    straight = start(*common, "--name", "straight", "--train.eval_every", "0")
    assert straight.communicate(timeout=300)[1] == ""
    # Time to be killed in
    killed = [*common, "--name", "killed", "--resume", "auto", "--train.eval_every", "1"]
    kills, errors = 0, []
    while (process := start(*killed)) and kills < KILLS:
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, WINDOW))
        else:
            _wait_for_records(process, tmp_path / "runs" / "killed", rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:  # it was done before
            break
        kills += 1
        process.kill()
        errors.append(process.communicate()[1])
    errors.append(process.communicate(timeout=300)[1])
    assert process.returncode == 0, errors
    assert not any(errors), errors  # nothing was damaged, nothing set aside
    assert [path.name for path in (tmp_path / "runs").glob("killed*")] == ["killed"]
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "killed", STEPS)
    tally("kill -9, resumed bit for bit", kills, kills)
    assert kills >= KILLS / 2


def _wait_for_records(process: subprocess.Popen, folder, count: int) -> None:
    """Wait until so many steps more were recorded than the process found, or it is done."""
    changes, before = 0, metrics_text(folder)
    while process.poll() is None and changes < count:
        now = metrics_text(folder)
        changes, before = changes + (now != before), now
        time.sleep(0.002)
