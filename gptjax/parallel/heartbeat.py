"""How a run of many processes ends when one of them fails, dies or hangs: all of them, in bounded
time, with one sentence.

JAX's coordination service notices a process that is gone, too, but from a thread of its own, which
aborts the process with a stack trace for a last word. So each process tells the others through the
service's store that it is alive, and ends by itself when one falls silent; what JAX notices, in
twice the time, is left for a process whose Python hangs.
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
BEATS = 10  # signs of life, at least, within the time after which a process counts as lost
# Seconds that an error of this process waits for the same one of process 0, and process 0 for those
# that ask
LINGER = 5.0
ALIVE = "gptjax/alive/"
ENDING = threading.Lock()  # whoever has it has the last word, so nobody gives it back


def tells_of_a_lost_process(error: BaseException) -> bool:
    """Whether the error is, by its words, what JAX raises when another process is gone."""
    return processes.are_many() and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def watched(prog: str, timeout: float) -> Iterator[None]:
    """End this process with a sentence once another has given no sign of life for ``timeout``
    seconds; nothing to do alone.
    """
    if not processes.are_many():
        yield
        return
    ended, seen = threading.Event(), _Seen(jax.process_count())
    _delay_abort()
    beat = threading.Thread(target=_beat, args=(prog, timeout / BEATS, seen, ended), daemon=True)
    beat.start()
    threading.Thread(target=_watch, args=(prog, timeout, seen, ended), daemon=True).start()
    try:
        yield
        ended.set()
        beat.join()  # so that it says nothing later
        processes.store().key_value_set(
            f"{ALIVE}{jax.process_index()}", "done", allow_overwrite=True
        )
    finally:
        ended.set()


class _Seen:
    """When each process was last seen to have said something new, in seconds; infinitely late once
    it is done.
    """

    def __init__(self, count: int) -> None:
        self.said = [""] * count
        self.when = [time.monotonic()] * count
        self.asked = float("inf")
        """When the store was asked for what it has not answered yet."""

    def add(self, process: int, said: str) -> None:
        if said != self.said[process]:
            self.said[process] = said
            self.when[process] = float("inf") if said == "done" else time.monotonic()


def _beat(prog: str, interval: float, seen: _Seen, ended: threading.Event) -> None:
    """Say something new, and see what the others have said, until the end."""
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


def _watch(prog: str, timeout: float, seen: _Seen, ended: threading.Event) -> None:
    """Look for a process that is silent, until the end; if process 0 is, nothing is heard of the
    others either.
    """
    interval, me = timeout / BEATS, jax.process_index()
    patience = timeout - 2 * interval
    awake = looked = time.monotonic()
    while not ended.wait(min(interval, 1.0)):
        now = time.monotonic()
        # This process was held up, and has heard of nobody meanwhile
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
                f"process {silent[0]} of {len(seen.when)} has given no sign of life for "
                f"{patience:.0f} s",
            )


def _is_gone(address: str) -> bool:
    """Whether nobody listens at HOST:PORT any more, on a machine that answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port or 0)), 1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _delay_abort() -> None:
    """Give Python some seconds to say what happened when JAX's thread aborts the process: it does
    once process 0 is gone.

    The signal's handler is libc's `sleep`. It gets the signal's number, 6, as its seconds; the
    abort goes on after them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such library here
        libc: Any = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def speaks(message: str) -> bool:
    """Whether this process has to print the error that ends it: not if process 0 ends with the same
    one.
    """
    with contextlib.suppress(Exception):  # of a store, or a backend, that is no more or never was
        if not processes.are_many():
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
def ending_together(prog: str) -> Iterator[None]:
    """With several processes, end this one at once when the block fails, with a sentence if another
    is lost.

    Otherwise it would wait at its exit for the others, and they for it.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            if tells_of_a_lost_process(error):
                _end(prog, _first_line(error))
            traceback.print_exc()
        _wait_for_those_who_ask()
        _exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _wait_for_those_who_ask() -> None:
    """Keep the store, which ends with process 0, until the others have its error, or are too
    late.
    """
    deadline = time.monotonic() + LINGER
    with contextlib.suppress(Exception):
        processes.store().key_value_try_get("gptjax/error")
        for process in range(1, jax.process_count() if processes.is_first() else 1):
            left = max(1, int((deadline - time.monotonic()) * 1000))
            processes.store().blocking_key_value_get(f"gptjax/heard/{process}", left)
        time.sleep(0.5)  # in which they end


def _end(prog: str, reason: str) -> None:
    ENDING.acquire()
    print(
        f"{prog}: error: another process was lost ({reason}): start them all again with --resume "
        "auto, to go on from the "
        "newest checkpoint",
        file=sys.stderr,
    )
    _exit(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
