"""The lines of a plan that depend on what devices are."""

import importlib
import re

import pytest

from gptjax.plan import report
from tests.conftest import ROOT

plan = importlib.import_module("gptjax.plan.__main__")


@pytest.mark.parametrize(("topology", "told"), [("h100:8", False), ("h100:16", True)])
def test_a_plan_that_uses_the_network_states_its_rate(topology, told, capsys):
    batch = ["--data.batch_size", "16", "--model.channels", "128", "--largest", "false"]
    assert (
        plan.main(
            [
                "--config",
                str(ROOT / "configs" / "debug.yaml"),
                "--topology",
                topology,
                "--mesh.fsdp",
                "-1",
                *batch,
            ]
        )
        == 0
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("assuming"))
    assert ("50 GB/s for each device between machines" in line) == told


def test_one_device_sends_nothing(capsys):
    """So nothing is said of collectives and links; and little work takes minutes, not days."""
    config = str(ROOT / "configs" / "debug.yaml")
    options = ["--predict", "--largest", "false", "--tokens", "1e9"]
    assert plan.main(["--config", config, "--topology", "h100:1", *options]) == 0
    out = capsys.readouterr().out
    for word in ("no overlap", "collectives 0", "efficiency", "links"):
        assert word not in out
    assert re.search(r"full overlap +[\d,.]+ ms, [\d,]+ tokens/s, [\d.]+ minutes for 1e\+09", out)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(8640, "0.10 days"), (8639, "144.0 minutes"), (6, "0.1 minutes"), (5.9, "5.9 seconds")],
)
def test_a_duration_is_told_in_the_unit_that_fits(seconds, words):
    assert report._duration(seconds) == words
