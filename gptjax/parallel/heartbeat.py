"""Heartbeats: if one process fails, dies or hangs, all end within a bounded time and with a
one-line error.

JAX's coordination service detects a lost process, too, but its thread then aborts the others with a
stack trace. So each process writes heartbeats to the service's store and exits when another's stop.
JAX's own detection, with twice the timeout, remains as a fallback for a process whose Python hangs.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from gptjax.parallel import processes

SIGNS = (
    "Gloo",
    "NCCL",
    "coordination service",
    "UNAVAILABLE",
    "Connection closed",
    "Connection reset",
    "heartbeat",
    "barrier",
)
BEATS = 10  # heartbeats, at least, within the timeout
# Seconds for which a failing process waits for process 0's error, and process 0 for its readers
LINGER = 5.0
ALIVE = "gptjax/alive/"
ENDING = threading.Lock()  # never released: only its first owner prints the reason and exits


def is_lost_process_error(error: BaseException) -> bool:
    """Whether the message is one that JAX raises when another process is lost."""
    return processes.is_distributed() and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def watched(prog: str, timeout: float) -> Iterator[None]:
    """Within the block, exit with an error once another process has sent no heartbeat for
    ``timeout`` seconds; a no-op in a single process.
    """
    if not processes.is_distributed():
        yield
        return
    ended, seen = threading.Event(), _LastBeats(jax.process_count())
    _delay_abort()
    beat = threading.Thread(target=_beat, args=(prog, timeout / BEATS, seen, ended), daemon=True)
    beat.start()
    threading.Thread(target=_watch, args=(prog, timeout, seen, ended), daemon=True).start()
    try:
        yield
        ended.set()
        beat.join()  # so that no heartbeat overwrites "done"
        processes.store().key_value_set(
            f"{ALIVE}{jax.process_index()}", "done", allow_overwrite=True
        )
    finally:
        ended.set()


class _LastBeats:
    """The last heartbeat of each process and the time at which it was seen, which is infinite once
    the process is done.
    """

    def __init__(self, count: int) -> None:
        self.said = [""] * count
        self.when = [time.monotonic()] * count
        self.asked = float("inf")
        """Time of the pending request to the store; infinite if there is none."""

    def add(self, process: int, said: str) -> None:
        if said != self.said[process]:
            self.said[process] = said
            self.when[process] = float("inf") if said == "done" else time.monotonic()


def _beat(prog: str, interval: float, seen: _LastBeats, ended: threading.Event) -> None:
    """Send heartbeats and read those of the others, until ``ended`` is set."""
    store, beats = processes.store(), 0
    while not ended.wait(min(interval, 1.0)):
        beats, seen.asked = beats + 1, time.monotonic()
        try:
            store.key_value_set(f"{ALIVE}{jax.process_index()}", str(beats), allow_overwrite=True)
            for key, said in store.key_value_dir_get(ALIVE):
                seen.add(int(key.removeprefix(ALIVE)), said)
        except Exception as error:
            if not ended.is_set():
                _end(prog, f"process 0 cannot be reached: {_first_line(error)}")
        seen.asked = float("inf")


def _watch(prog: str, timeout: float, seen: _LastBeats, ended: threading.Event) -> None:
    """Look for a silent process, until ``ended`` is set. If it is process 0, the store does not
    answer at all.
    """
    interval, me = timeout / BEATS, jax.process_index()
    patience = timeout - 2 * interval
    awake = looked = time.monotonic()
    while not ended.wait(min(interval, 1.0)):
        now = time.monotonic()
        # This process itself was suspended and has read no heartbeats meanwhile.
        if now - looked > interval + 1:
            awake = now
        looked = now
        silent = [
            i for i, when in enumerate(seen.when) if now - max(when, awake) > patience and i != me
        ]
        if ended.is_set():
            return
        if now - seen.asked > 1 and _is_gone(
            jax._src.distributed.global_state.coordinator_address or ""
        ):
            _end(prog, "process 0 is gone")
        if silent:
            _end(
                prog,
                f"process {silent[0]} of {len(seen.when)} has sent no heartbeat for "
                f"{patience:.0f} s",
            )


def _is_gone(address: str) -> bool:
    """Whether the machine answers but nothing listens at HOST:PORT any more."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port or 0)), 1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _delay_abort() -> None:
    """Delay the abort of JAX's thread, which follows the loss of process 0, so that Python can
    print the reason.

    libc's `sleep` becomes the handler of SIGABRT. It is called with the signal's number, so it
    sleeps for 6 seconds before the abort continues.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no such library
        libc: Any = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def should_report(message: str) -> bool:
    """True unless process 0 reports the same error."""
    with contextlib.suppress(Exception):  # the store or the backend may be gone or not started
        if not processes.is_distributed():
            return True
        store = processes.store()
        if processes.is_first():
            store.key_value_set("gptjax/error", message)
            return True
        first = store.blocking_key_value_get("gptjax/error", int(LINGER * 1000))
        store.key_value_set(f"gptjax/heard/{jax.process_index()}", "", allow_overwrite=True)
        return message not in (first, f"{processes.FIRST_FAILED}{first}")
    return True


@contextlib.contextmanager
def exit_together(prog: str) -> Iterator[None]:
    """If the block fails in one of several processes, exit at once, with a one-line error if
    another process is lost.

    A normal exit would wait for the others, and they for this one.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            if is_lost_process_error(error):
                _end(prog, _first_line(error))
            traceback.print_exc()
        _wait_for_readers()
        _exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _wait_for_readers() -> None:
    """Keep process 0, and so the store, alive until the others have read its error, for at most
    `LINGER` seconds.
    """
    deadline = time.monotonic() + LINGER
    with contextlib.suppress(Exception):
        processes.store().key_value_try_get("gptjax/error")
        for process in range(1, jax.process_count() if processes.is_first() else 1):
            left = max(1, int((deadline - time.monotonic()) * 1000))
            processes.store().blocking_key_value_get(f"gptjax/heard/{process}", left)
        time.sleep(0.5)  # time for them to end


def _end(prog: str, reason: str) -> None:
    ENDING.acquire()
    print(
        f"{prog}: error: another process was lost ({reason}): start them all again with --resume "
        "auto, to continue from the newest checkpoint",
        file=sys.stderr,
    )
    _exit(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
