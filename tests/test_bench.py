import re

from gptjax import bench
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


def test_bench_prints_a_row_for_each_way_to_compute_the_step(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    assert bench.main(TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.split(r"  +", line)[0] for line in lines[2:]]
    assert names == ["manual, unroll", "manual, scan", "autodiff, unroll", "autodiff, scan"]
    assert lines[2].endswith("1.00")
