"""The parts together, as on a GPU but of a tiny model on this machine."""

import importlib
import json
import re

import pytest

from gptjax.bench import gpu_day
from tests.conftest import ROOT

command = importlib.import_module("gptjax.bench.__main__")
TINY = [
    *("--config", str(ROOT / "configs" / "debug.yaml"), "--rounds", "2"),
    *("--model.num_layers", "1", "--model.vocab_size", "4096", "--model.max_seq_len", "272"),
    *("--data.batch_size", "2", "--data.seq_len", "8"),
]


def test_every_part_runs(monkeypatch, tmp_path, capfd):
    """In processes of their own; PyTorch's is a part that is skipped."""
    (tmp_path / "torch.py").write_text("raise ImportError('planted', name='torch')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    file = tmp_path / "r.json"
    assert command.main([*TINY, "--what", "gpu", "--json", str(file)]) == 0
    out = capfd.readouterr().out
    assert re.findall(r"^--- (.*)", out, re.MULTILINE) == [
        *(part.name for part in gpu_day.PARTS),
        "the step",
    ]
    assert "skipped: peer torch needs torch: pip install 'gptjax[parity]'\n" in out
    assert "peak not reported" in out

    record = json.loads(file.read_text())
    assert list(record) == [part.name for part in gpu_day.PARTS]
    assert all(found["status"] == 0 for found in record.values())
    for way in ("manual", "autodiff"):
        counted, traced = record[way]["counted"], record["profile"][way]
        whole, *kinds = traced["kind"]
        # The same program, compiled twice
        assert whole["kernels"] == counted["kernels"] > 50
        # A CPU's trace has every instruction but those of loops, each of which is one there
        once = [one for one in traced["instructions"] if one["times"] == 1]
        assert len(once) > 50
        assert all(one["launches"] == 1 for one in once)
        assert sum(row["traced_ms"] for row in kinds) == pytest.approx(whole["traced_ms"])
        assert 0 < traced["busy_ms"] < traced["span_ms"]
        assert record[way]["timed"]["tokens_per_s"] > 0
        assert record[way]["planned_bytes"] == counted["total_bytes"]
    # The products of a step: 6 FLOPs for each weight of a matrix and each of 16 tokens, and for
    # attention to 8 tokens 12 for each channel
    C, Vp, T = 64, 4096, 8
    flops = 16 * (6 * (12 * C * C + Vp * C) + 12 * C * T)
    assert record["manual"]["counted"]["flops"] == flops
    assert [row["name"] for row in record["decode"]["rows"]][::2] == ["greedy", "greedy, bfloat16"]


def test_without_a_gpu_one_line_says_what_is_missing(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert command.main(["--what", "gpu"]) == 2
    said = capfd.readouterr()
    assert said.out == "--- device\n"
    assert said.err == (
        "python -m gptjax.bench: error: model.attention cudnn needs an NVIDIA GPU, not cpu: "
        "choose auto, materialised or blockwise\n"
    )


def test_all_parts_end_in_8_minutes():
    assert sum(part.seconds for part in gpu_day.PARTS) < 8 * 60 - 10


def test_steps_are_compared_with_the_first(capsys):
    """Half the speed is twice the ratio and half the utilisation, in a program that does not know
    the device's peak, too.
    """
    ours = {"name": "manual", "ms": 20.0, "mfu": 0.5}
    theirs = {"name": "torch", "ms": 40.0}
    gpu_day.print_summary({"manual": {"timed": ours}, "decode": {}, "torch": {"timed": theirs}})
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["manual", "20.0", "50.0%", "1.00"],
        ["torch", "40.0", "25.0%", "2.00"],
    ]
    gpu_day.print_summary({"manual": {"error": ["all has failed"]}})
    assert capsys.readouterr().out == ""
