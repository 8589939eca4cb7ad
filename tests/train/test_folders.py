"""Whose a run's folder is. Within one process two locks exclude each other as they do between
two.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading

import pytest

from gptjax.config import check_name
from gptjax.errors import CheckpointError, ConfigError
from gptjax.train import folders
from gptjax.train.folders import LOCK_FILE, RunInUseError, claim


def trained(folder):
    """Make it the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    return folder


def test_a_new_run_never_takes_an_old_ones_folder(tmp_path):
    for expected in ("a", "a-2", "a-3"):
        with claim(tmp_path, "a", None) as folder:
            assert folder == trained(tmp_path / expected)
    (tmp_path / "a" / "config.yaml").unlink()
    with claim(tmp_path, "a", None) as folder:
        assert folder == tmp_path / "a-4"


def test_auto_takes_the_newest_run_of_the_name(tmp_path):
    for number in (2, 10, 9):
        trained(tmp_path / f"a-{number}")
    trained(tmp_path / "ab-11")
    with claim(tmp_path, "a", "auto") as folder:
        assert folder == tmp_path / "a-10"
    with claim(tmp_path, "b", "auto") as folder:
        assert folder == tmp_path / "b"


def test_a_named_folder_must_be_a_runs(tmp_path):
    with (
        pytest.raises(CheckpointError, match="is not the folder of a run"),
        claim(tmp_path, "a", str(tmp_path)),
    ):
        pass
    (tmp_path / "checkpoints").mkdir()
    with claim(tmp_path, "a", str(tmp_path)) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_a_run_that_is_being_trained_cannot_be_claimed(tmp_path, resume):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    again = "auto" if resume == "auto" else str(tmp_path / "a")
    owner = f"a is being trained by process {os.getpid()} on {socket.gethostname()}: wait"
    with claim(tmp_path, "a", again):
        with pytest.raises(RunInUseError, match=owner), claim(tmp_path, "a", again):
            pass
        with claim(tmp_path, "a", None) as other:
            assert other == tmp_path / "a-2"
    with claim(tmp_path, "a", again) as folder:  # which is free again
        assert folder == tmp_path / "a"


def test_an_owner_that_is_slow_to_write_its_name_is_named(tmp_path):
    folder = trained(tmp_path / "a")
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write():
            lock.write("process 7 on a slow machine\n")
            lock.flush()

        later = threading.Timer(0.5, write)
        later.start()
        with pytest.raises(RunInUseError, match="process 7"), claim(tmp_path, "a", "auto"):
            pass
        later.join()


def test_auto_waits_for_no_run_that_is_only_starting(tmp_path):
    trained(tmp_path / "a")
    with (
        claim(tmp_path, "a", None) as starting,
        pytest.raises(RunInUseError, match="a-2 is being trained"),
        claim(tmp_path, "a", "auto"),
    ):
        pass
    assert starting == tmp_path / "a-2"


def test_auto_refuses_an_older_run_that_is_being_trained(tmp_path):
    (tmp_path / "a-2").mkdir()  # what a kill left
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    with (
        claim(tmp_path, "a", str(tmp_path / "a")),
        pytest.raises(RunInUseError, match="a is being trained"),
        claim(tmp_path, "a", "auto"),
    ):
        pass


def test_auto_takes_the_newest_of_what_killed_starts_left(tmp_path):
    """And leaves the others free."""
    for name in ("a", "a-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK_FILE).touch()
    with claim(tmp_path, "a", "auto") as folder, (tmp_path / "a" / LOCK_FILE).open() as other:
        assert folder == tmp_path / "a-2"
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


STEPS = LOCK_FILE, "tokenizer.json", "config.yaml.7.partial", "config.yaml"


@pytest.mark.parametrize("done", range(len(STEPS)))
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("at_once", [1, len(STEPS)])
def test_auto_refuses_a_run_that_begins_while_it_looks(tmp_path, monkeypatch, done, newer, at_once):
    """After each question about the folder, the process that owns it goes one step on, or all, from
    any of them; beside it there may be what a killed start left.
    """
    folder = tmp_path / "a"
    folder.mkdir()
    if newer:
        (tmp_path / "a-2").mkdir()
    steps = list(STEPS)
    with contextlib.ExitStack() as held:

        def go_on():
            if steps:
                file = held.enter_context((folder / steps.pop(0)).open("w"))
                if len(steps) == len(STEPS) - 1:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write("process 7 on this machine\n")
                    file.flush()

        def then_goes_on(ask):
            def asked(of):
                answer = ask(of)
                for _ in range(at_once if of == folder else 0):
                    go_on()
                return answer

            return asked

        for _ in range(done):
            go_on()
        for name in ("is_run", "_is_unused"):
            monkeypatch.setattr(folders, name, then_goes_on(getattr(folders, name)))
        with pytest.raises(RunInUseError, match="process 7"), claim(tmp_path, "a", "auto"):
            pass


@pytest.mark.parametrize("left", [STEPS[:2], STEPS[:3], ("notes.txt",)])
def test_auto_leaves_a_folder_alone_that_is_neither_unused_nor_a_run(tmp_path, left):
    """One in which a process was killed as it began, or another's."""
    for name in left:
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).touch()
    for _ in range(2):
        with claim(tmp_path, "a", "auto") as folder:
            assert folder == tmp_path / "a-2"
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(left)
    trained(tmp_path / "a-3")
    with claim(tmp_path, "a", "auto") as folder:
        assert folder == tmp_path / "a-3"


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "runs", "a", None):
        raise ZeroDivisionError
    assert not list((tmp_path / "runs").iterdir())


def test_the_folder_of_a_killed_start_is_used_again(tmp_path):
    trained(tmp_path / "a")
    (tmp_path / "a-2").mkdir()
    (tmp_path / "a-2" / LOCK_FILE).write_text("process 1 on earth\n")
    with claim(tmp_path, "a", "auto") as folder:
        assert folder == tmp_path / "a"
    with claim(tmp_path, "a", None) as folder:
        assert folder == tmp_path / "a-2"
        assert (
            folder / LOCK_FILE
        ).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (trained(tmp_path / "a") / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="lock"), claim(tmp_path, "a", "auto"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="a cannot be locked on this file system"),
        claim(tmp_path, "a", None) as folder,
    ):
        assert folder == tmp_path / "a"


@pytest.mark.parametrize("name", ["a", "lr 1e-3", "été", "-x", "...", "a" * 200])
def test_names_of_one_folder(name):
    check_name(name)


@pytest.mark.parametrize("name", ["a" * 201, "é" * 101])
def test_a_name_must_leave_room_for_a_number(name):
    with pytest.raises(ConfigError, match="name must have at most 200 bytes, not 20"):
        check_name(name)
