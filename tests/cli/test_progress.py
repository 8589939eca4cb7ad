"""What is shown of long work where stderr is no terminal."""

import pytest

from gptjax.cli import progress


@pytest.mark.parametrize(
    ("every", "lines"),
    [(0.0, ["scoring 300/1,200 | acc 0.5", "scoring 1,200/1,200 | acc 0.6"]), (60.0, [])],
)
def test_lines_stand_in_for_the_bar(every, lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", every)
    with progress.counting("scoring", 1200) as advance:
        advance(300, "acc 0.5")
        advance(900, "acc 0.6")
    assert capsys.readouterr().err.splitlines() == lines


def test_a_bar_without_a_terminal_is_silent(capsys):
    with progress.progress("reading", 20) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_work_of_unknown_size_is_named_without_a_terminal(capsys):
    with progress.progress("downloading", None) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "downloading\n")
