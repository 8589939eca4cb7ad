"""``python -m gptjax``, and what an installation has beside its modules."""

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gptjax
from gptjax.__main__ import COMMANDS, main
from tests.conftest import ROOT


def test_it_lists_the_commands_that_there_are(capsys):
    assert main() == 0
    listed = capsys.readouterr().out
    there = {p.parent.name for p in (ROOT / "gptjax").glob("*/__main__.py")}
    assert set(COMMANDS) == there
    for name, purpose in COMMANDS.items():
        assert importlib.util.find_spec(f"gptjax.{name}")
        assert f"python -m gptjax.{name}" in listed
        assert purpose in listed


def test_it_runs_as_a_module():
    listed = subprocess.run(
        [sys.executable, "-m", "gptjax"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert listed.stdout.startswith(f"gptjax {gptjax.__version__}\n")
    assert not listed.stderr


def test_the_version_is_that_of_the_distribution():
    assert gptjax.__version__ == version("gptjax")


def test_type_checkers_are_told_that_the_package_has_types():
    assert (Path(gptjax.__file__).parent / "py.typed").exists()
