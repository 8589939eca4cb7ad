"""What becomes of a signal inside the process; tests/faults/test_signals.py sends real ones."""

import os
import signal
import time

import pytest

from gptjax.parallel.processes import Stop
from gptjax.train.metrics import Display
from gptjax.train.signals import stop_on_signals


def wait_for(condition):
    """Until the watching thread has done its work, or half a minute has passed."""
    until = time.monotonic() + 30
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_stops_and_prints_the_last_step(number, capsys):
    stop, before = Stop(3, 9), signal.getsignal(number)
    with stop_on_signals("train", stop, Display(9)):
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.received)
    assert stop.received == [number.name]
    assert "stopping after step 4, saving; Ctrl-C" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop(0, 9)
        with stop_on_signals("train", stop, Display(9, quiet=True)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: stop.received)
        assert stop.received == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGHUP, before)
