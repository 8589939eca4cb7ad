"""Parts that fail in every way, each beside one that does not."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from gptjax.bench.parts import BenchPart, run_parts
from gptjax.errors import ConfigError


def succeed(cfg, tell):
    print("the table of a part")
    tell({"cfg": cfg, "flags": os.environ.get("XLA_FLAGS", "")})


def crash(cfg, tell):
    tell({"so far": 1})
    raise ValueError("the planted error")


def refuse(cfg, tell):
    raise ConfigError("there is no GPU")


def hang(cfg, tell):
    tell({"so far": 2})
    time.sleep(600)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The processes of the parts import this module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")


def test_a_part_that_crashes_leaves_the_others(capfd):
    kept = []
    parts = [
        BenchPart("bad", crash, 60),
        BenchPart("good", succeed, 60, "--xla_gpu_enable_command_buffer="),
    ]
    status, record = run_parts(parts, [3, "x"], lambda found: kept.append(json.dumps(found)))
    assert status == 1
    assert record["bad"]["so far"] == 1
    assert record["bad"]["error"][-2:] == [
        "ValueError: the planted error",
        "bad ended with exit status 1",
    ]
    assert record["good"]["status"] == 0
    assert record["good"]["cfg"] == [3, "x"]
    assert record["good"]["error"] == []
    assert record["good"]["flags"] == ("--xla_cpu_max_isa=AVX2 --xla_gpu_enable_command_buffer=")
    assert [list(json.loads(found)) for found in kept] == [["bad"], ["bad", "good"]]
    said = capfd.readouterr()
    assert said.out == "--- bad\n--- good\nthe table of a part\n"
    assert "ValueError: the planted error\nbad ended with exit status 1\n" in said.err


def test_a_part_that_hangs_is_stopped_and_leaves_the_others(capfd):
    """It has 5 s of its own; the next has what it needs."""
    status, record = run_parts(
        [BenchPart("bad", hang, 5), BenchPart("good", succeed, 60)], 0, print
    )
    assert status == 1
    assert 5 <= record["bad"]["seconds"] < 30
    assert record["bad"]["so far"] == 2
    assert (record["bad"]["status"], record["good"]["status"]) == (None, 0)
    assert capfd.readouterr().err == "bad was stopped after 5 s\n"


def test_nothing_is_run_where_the_first_part_says_what_is_missing(capfd):
    parts = [BenchPart("check", refuse, 60), BenchPart("never", succeed, 60)]
    assert run_parts(parts, 0, sys.exit) == (2, {})
    assert capfd.readouterr().err == "python -m gptjax.bench: error: there is no GPU\n"


def test_a_later_part_may_be_refused(capfd):
    parts = [BenchPart("good", succeed, 60), BenchPart("bad", refuse, 60)]
    status, record = run_parts(parts, 0, lambda found: None)
    assert (status, record["bad"]["status"], record["good"]["status"]) == (1, 2, 0)
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_part_may_use_the_time_that_others_have_left(capfd, monkeypatch):
    limits = []
    monkeypatch.setattr(
        "gptjax.bench.parts.run_part",
        lambda part, cfg, limit: limits.append(limit) or {"status": 0, "error": []},
    )
    run_parts([BenchPart("a", succeed, 10), BenchPart("b", succeed, 20)], 0, lambda found: None)
    assert limits == pytest.approx([10, 30], abs=1)
