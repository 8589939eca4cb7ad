import time

from gptjax.bench import timing
from gptjax.bench.timing import Contender, Timing, time_interleaved


def test_contenders_are_interleaved_after_warmup(monkeypatch):
    monkeypatch.setattr(timing, "WARMUP", 2)
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name), {}) for name in "abc"]
    found = time_interleaved(contenders, 3)
    assert "".join(order) == "abc" * 5
    assert [len(t.seconds) for t in found] == [3, 3, 3]


def test_what_is_timed_is_the_run():
    (found,) = time_interleaved([Contender("sleep", lambda: time.sleep(0.02), {})], 3)
    assert 0.02 <= found.median < 2


def test_median_and_spread():
    found = Timing(Contender("x", lambda: None, {}), [1.0, 2.0, 5.0])
    assert found.median == 2
    assert found.spread == 2
