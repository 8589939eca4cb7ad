"""Signals that stop a run: the first saves a checkpoint, a second Ctrl-C exits at once."""

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
PATIENCE = 1.0  # seconds to wait for the display to release the terminal


@contextlib.contextmanager
def stop_on_signals(prog: str, stop: Stop, display: Display) -> Iterator[None]:
    """Within the block, pass Ctrl-C, SIGTERM and SIGHUP to ``stop`` and print at which step
    training will stop.

    A second Ctrl-C ends the process at once, without Python's finalization, during which threads of
    JAX and Orbax could crash. A checkpoint that is being saved then keeps its temporary name and is
    ignored.

    Python runs signal handlers only between bytecodes, so none runs while a step is computed. A
    thread therefore reads the signals from a wakeup pipe. A signal that is ignored from the start,
    such as SIGHUP under ``nohup``, stays ignored.
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
            _with_timeout(
                PATIENCE,
                display.print,
                f"stopping after step {last}, saving; Ctrl-C{again} quits without saving",
            )
        elif name == "SIGINT":
            _with_timeout(PATIENCE, display.close)
            with contextlib.suppress(OSError, AttributeError):
                print(f"{prog}: error: interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)


def _with_timeout(seconds: float, f: Callable[..., None], *args: Any) -> None:
    """Call ``f(*args)`` and wait for it at most ``seconds``: it may block if nothing reads the
    output.
    """
    thread = threading.Thread(target=f, args=args, daemon=True)
    thread.start()
    thread.join(seconds)
