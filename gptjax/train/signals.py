"""Signals that stop a run: the first one after a checkpoint, a second Ctrl-C at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.cli import INTERRUPTED
from gptjax.parallel.processes import Stop
from gptjax.train.metrics import Display

STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
PATIENCE = 1.0  # seconds for the display to let go of the terminal


@contextlib.contextmanager
def stopping(prog: str, stop: Stop, display: Display) -> Iterator[None]:
    """Until the block ends, tell ``stop`` of Ctrl-C, SIGTERM and SIGHUP, and the person when
    training will stop.

    A Ctrl-C after that ends the process: without Python's finalization, which would take JAX's and
    Orbax's threads by surprise. What was being saved keeps its temporary name, and does not count.

    Python runs its handlers between two of its own instructions, of which there are none while a
    step is computed. So a thread handles what arrives, which is told through a pipe. A signal that
    this process was started to ignore, as SIGHUP by ``nohup``, stays ignored.
    """
    arriving, arrived = os.pipe()
    os.set_blocking(arrived, False)
    watcher = threading.Thread(target=_watch, args=(prog, arriving, stop, display), daemon=True)
    previous = {
        number: signal.getsignal(number)
        for number in STOPPING
        if signal.getsignal(number) != signal.SIG_IGN
    }
    wakeup = signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)
    for number in previous:
        signal.signal(number, lambda *_: None)
    watcher.start()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(arrived)
        watcher.join()
        os.close(arriving)


def _watch(prog: str, arriving: int, stop: Stop, display: Display) -> None:
    while number := os.read(arriving, 1):
        if number[0] not in STOPPING:
            continue
        asked_before = bool(stop.received)
        name = signal.Signals(number[0]).name
        last = stop.receive(name)
        if not asked_before:
            again = " again" if name == "SIGINT" else ""
            _within(
                PATIENCE,
                display.print,
                f"stopping after step {last}, saving; Ctrl-C{again} quits without saving",
            )
        elif name == "SIGINT":
            _within(PATIENCE, display.close)
            with contextlib.suppress(OSError, AttributeError):
                print(f"{prog}: error: interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)


def _within(seconds: float, f: Callable[..., None], *args: Any) -> None:
    """``f(*args)``, but go on after so many seconds: whoever reads the output may have stopped
    to.
    """
    thread = threading.Thread(target=f, args=args, daemon=True)
    thread.start()
    thread.join(seconds)
