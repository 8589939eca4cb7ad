import re

import pytest

from gptjax import bench, verify
from gptjax.models import gpt2
from tests.conftest import ROOT

TINY = [
    "--config",
    str(ROOT / "configs" / "debug.yaml"),
    "--model.num_layers",
    "1",
    "--data.batch_size",
    "2",
    "--data.seq_len",
    "8",
]


def test_all_gradients_agree(capsys):
    assert verify.main(TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 16 + 1
    assert lines[-1].startswith("all gradients agree: worst float64")
    errors = [float(x) for line in lines[1:-1] for x in line.split()[-2:]]
    assert max(errors[1::2]) > max(errors[::2])  # float32 is worse than float64, so both were computed


def test_a_wrong_backward_is_found(monkeypatch, capsys):
    right = gpt2.gelu_bwd
    monkeypatch.setattr(gpt2, "gelu_bwd", lambda saved, dy: right(saved, dy) * (1 + 1e-9))
    assert verify.main(TINY) == verify.WRONG
    assert "A GRADIENT IS WRONG" in capsys.readouterr().out


def test_a_gradient_that_is_not_a_number_is_found(monkeypatch, capsys):
    right = gpt2.layernorm_bwd
    monkeypatch.setattr(gpt2, "layernorm_bwd", lambda saved, w, dy: (right(saved, w, dy)[0], w * float("nan"), w))
    assert verify.main(TINY) == verify.WRONG
    assert "A GRADIENT IS WRONG" in capsys.readouterr().out


def test_bad_input(capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main([*TINY, "--model.chanels", "3"])
    assert stop.value.code == 2
    assert "did you mean model.channels?" in capsys.readouterr().err


def test_bench_prints_a_row_for_each_way_to_compute_the_step(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    assert bench.main(TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines[2:]] == [
        "manual, unroll",
        "manual, scan",
        "autodiff, unroll",
        "autodiff, scan",
    ]
    assert lines[2].endswith("1.00")
