import io
import sys

import pytest

from gptjax.cli.streams import show, standard_input, whole_output
from gptjax.errors import ConfigError, DataError, FormatError


def test_output_is_written_before_the_block_ends(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    with whole_output():
        print("hello")
        assert raw.getvalue() == b""
    assert raw.getvalue() == b"hello\n"
    with pytest.raises(SystemExit), whole_output():
        print("help")
        raise SystemExit(0)
    assert raw.getvalue() == b"hello\nhelp\n"


def test_a_command_without_stdout_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ConfigError, match="standard output is closed"), whole_output():
        pass


def test_what_stdin_may_hold(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"12345")))
    assert standard_input(5) == b"12345"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"12345")))
    with pytest.raises(FormatError, match="standard input has more than the 4 bytes"):
        standard_input(4)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        standard_input(5)


def test_control_characters_are_not_sent_to_a_terminal(capsys, monkeypatch):
    show("a\x1b[2J")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show("b\x1b\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\N{REPLACEMENT CHARACTER}\n"
