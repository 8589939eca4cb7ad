import pytest

from gptjax.bench import report
from gptjax.bench.ceiling import Ceiling
from gptjax.bench.profile import OpTime, TracedKernel
from gptjax.bench.timing import Contender, Timing
from gptjax.plan.kernels import Kernel


def test_the_rows_of_contenders_and_their_floor(capsys):
    """100 tokens in 0.2 s, where 0.1 s is the floor and 0.05 s the data sheet's."""
    slow, fast = (
        Timing(Contender(name, print, {"compile_s": 1.5}), [s, s, 2 * s])
        for name, s in (("slow", 0.2), ("fast", 0.1))
    )
    found = report.print_timings([slow, fast], 100, Ceiling(2e9, 3e9, 4e9), 0.1, 0.05)
    first, second = found["rows"]
    assert first["tokens_per_s"] == pytest.approx(500)
    assert (first["of_floor"], first["mfu"], first["ratio"]) == pytest.approx((2, 0.25, 1))
    assert (second["of_floor"], second["mfu"], second["ratio"]) == pytest.approx((1, 0.5, 0.5))
    assert (found["floor_ms"], found["bandwidth"]) == (100, 3e9)
    head, line, _, floor = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "compile s ms spread tokens/s MFU / floor ratio"
    assert " ".join(line.split()) == "slow 1.5 200.0 100% 500 25.0% 2.00 1.00"
    assert (
        floor
        == "floor                    100.0 ms at 2 GFLOP/s, 3.0 GB/s, 4.0 GB/s where only read"
    )


def test_a_profile_says_where_most_time_goes():
    times = [OpTime(f"op{n}", 1.0 / (n + 1), 2) for n in range(20)]
    lines = report.profile_table(times).splitlines()
    assert lines[1].split() == ["op0", "1000.0", "27.8%", "2"]
    assert lines[-1].startswith("8 more")
    assert len(lines) == 1 + report.OPS + 1


def test_traced_kernels_stand_beside_what_they_take_at_least(capsys):
    """Two copies of at least 1 ms each that take 3 ms together, one that is not traced, a product
    of two kernels, and 0.5 ms of what is not counted.
    """

    def counted(kind, source, seconds, times=1):
        return Kernel(kind, source, times, 0.0, 0.0, 0.0, seconds)

    found = [
        TracedKernel(counted("copy", "a.py:1", 1e-3), 1, 1.25e-3),
        TracedKernel(counted("copy", "b.py:2", 1e-3), 1, 1.75e-3),
        TracedKernel(counted("copy", "a.py:1", 4e-3), 0, 0.0),
        TracedKernel(counted("product", "b.py:2", 5e-3), 2, 6e-3),
        TracedKernel(counted("not counted", "elsewhere", 0, times=0), 1, 0.5e-3),
    ]
    record = report.print_traced("manual", found)
    names = ("name", "kernels", "launches", "least_ms", "traced_ms", "ratio")
    rows = [[row.get(name) for name in names] for row in record["kind"]]
    assert rows == [
        ["in all", 4, 5, pytest.approx(11), pytest.approx(9.5), pytest.approx(9.5 / 11)],
        ["product", 1, 2, pytest.approx(5), pytest.approx(6), pytest.approx(1.2)],
        ["copy", 2, 2, pytest.approx(2), pytest.approx(3), pytest.approx(1.5)],
        ["not counted", 0, 1, 0, pytest.approx(0.5), None],
        ["not in the trace", 1, 0, pytest.approx(4), 0, None],
    ]
    by_source = {row["name"]: row["traced_ms"] for row in record["source"]}
    assert by_source["b.py:2"] == pytest.approx(7.75)
    assert record["instructions"][3]["launches"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["product", "1", "2", "5.00", "6.00", "1.20"]
