"""Signals as a run is told of them; faults and races of theirs are in tests/faults/test_signals.py."""

import os
import signal
import time

from gptjax.parallel.processes import Stop
from gptjax.train.metrics import Display
from gptjax.train.signals import stopping


def test_a_signal_asks_the_run_to_stop_and_handlers_are_given_back(capsys):
    stop, before = Stop(3, 10), signal.getsignal(signal.SIGTERM)
    with stopping("prog", stop, Display(10, quiet=False)):
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 30
        while not stop.received and time.monotonic() < until:
            time.sleep(0.01)
    assert stop.received == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopping after step 4, saving; Ctrl-C quits without saving" in capsys.readouterr().out


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping("prog", Stop(), Display(10, quiet=True)):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
