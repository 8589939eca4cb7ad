import dataclasses
import sys
import types

import pytest

from gptjax import cli
from gptjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section.

    Attributes are documented below them.
    """

    size: int = 3
    """How large."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    """The section."""
    rate: float = 0.5
    """How fast."""


def parse(*args: str):
    return cli.parse(Options, "prog", "What it does.", list(args))


def test_defaults_then_file_then_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("inner: {size: 7}\nrate: 1e-3\n")
    assert parse() == (Options(), None)
    assert parse("--config", str(path)) == (Options(Inner(7), 1e-3), path)
    assert parse("--config", str(path), "--inner.size", "9")[0] == Options(Inner(9), 1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--inner.sice", "3"], r"unknown option inner\.sice: did you mean inner\.size\?"),
        (["--zzz=3"], "unknown option zzz; --help lists them all"),
        (["--inner.size", "big"], r"inner\.size: Expected a int\. Got value: big"),
    ],
)
def test_mistakes_in_one_sentence(args, message):
    with pytest.raises(ConfigError, match=message):
        parse(*args)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a\n  b"), 2, "prog: error: a b\n"),
        (KeyboardInterrupt(), 130, "prog: error: interrupted\n"),
        (OSError(28, "No space left on device", "x"), 2, "prog: error: x cannot be used: No space left on device; free space"),
    ],
)
def test_errors_that_a_person_can_mend(error, status, message, capsys):
    with pytest.raises(SystemExit) as stop, cli.reported_errors("prog"):
        raise error
    assert stop.value.code == status
    assert capsys.readouterr().err.startswith(message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.reported_errors("prog"):
        raise ZeroDivisionError
    with pytest.raises(OSError, match="strange"), cli.reported_errors("prog"):
        raise OSError("strange")


@pytest.mark.parametrize("words", [*cli.GIVEN_UP, "something else"])
def test_of_what_libraries_gave_up_nothing_is_shown(words, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    cli.quiet_libraries()
    unraisable = types.SimpleNamespace(exc_value=ValueError(f"{words} and more"))
    sys.unraisablehook(unraisable)
    assert shown == ([unraisable] if words == "something else" else [])
