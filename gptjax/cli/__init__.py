"""The frame of every command: one-sentence errors and process-wide settings."""

import contextlib
import ctypes
import errno
import functools
import gc
import io
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

from gptjax.cli.streams import drop_output, whole_output
from gptjax.errors import GptjaxError
from gptjax.files import read_text

BAD_INPUT = 2  # exit status
INTERRUPTED = 130
BROKEN_PIPE = 141

Part = TypeVar("Part")


@contextlib.contextmanager
def reported_errors(
    prog: str,
    less: str = "lower data.batch_size",
    should_report: Callable[[str], bool] = lambda message: True,
) -> Iterator[None]:
    """Print errors that a person can mend as one sentence on stderr and exit with status 2.

    SIGTERM ends the block as Ctrl-C does, so that partial files are cleaned up.

    Args:
        prog: the command's name, printed before the error.
        less: how to use less memory, for out-of-memory errors.
        should_report: whether to print a message; False where another process prints the same.

    """

    def fail(message: str) -> NoReturn:
        if should_report(message):
            print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with whole_output():
            yield
    except GptjaxError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"{prog}: error: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader has closed the pipe
        drop_output()
        raise SystemExit(BROKEN_PIPE) from None
    except OSError as error:
        if error.filename is None and _is_in_removed_folder():
            fail("the current folder has been removed: change to one that is there")
        if error.filename is None and error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            raise
        if error.filename is None:
            drop_output()
        fail(
            f"{error.filename or 'output'} cannot be used: {error.strerror}; "
            "free space or name another folder"
        )
    except MemoryError:
        fail(f"out of memory: {less} or choose a smaller model")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"the device is out of memory: {less} or choose a smaller model ({error})")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_in_removed_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


# Start of the messages of abandoned writes and reads
GIVEN_UP = "Event loop is closed", "Encountered error while reading array"


def quiet_libraries() -> None:
    """Silence the tracebacks of Orbax and TensorStore; commands report the failure themselves.

    A damaged checkpoint would print one for every array, several kilobytes each.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(GIVEN_UP):
            show(unraisable)

    sys.unraisablehook = hook


def replace_unprintable() -> None:
    """Print a placeholder for characters that stdout's encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def peak_memory() -> int:
    """The most memory that this process has held, in bytes.

    Linux's ``ru_maxrss`` counts the parent's at the time of the start, too.
    """
    with contextlib.suppress(OSError, GptjaxError, StopIteration):
        lines = read_text("/proc/self/status", 1 << 16).splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def look_for_cycles_less_often() -> None:
    """Let Python look for garbage in cycles after more new objects than by default.

    Reading a vocabulary and tracing a program make hundreds of thousands, and all of them stay.
    """
    gc.set_threshold(50_000)


def reuse_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system; a no-op elsewhere.

    A training step on CPU frees and allocates the same hundreds of megabytes each time; returning
    them costs a page fault for every 4 KiB: 93,000 in a gradient of 124M at B=4, T=64, none with
    these settings. Call before JAX starts its threads.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return the memory that is free at this moment to the system; a no-op without glibc. Call
    after a model is loaded: reading SmolLM2's vocabulary leaves 31 MB.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)


def returning_startup_memory(parts: Iterable[Part], forget: bool) -> Iterator[Part]:
    """Yield the parts of an output unchanged. After the second, when every program has run, return
    to the system what only the start needed.

    That is freed memory and the libraries' code (`return_library_pages`); with ``forget`` also what
    JAX traced (`forget_traces`), and its programs but those of a
    `gptjax.xla.lasting_jit.LastingJit`. What of these is needed again is compiled again, which
    takes a tenth of a second in a chat.
    """
    for number, part in enumerate(parts):
        yield part
        if number == 1 and forget:
            forget_traces()
        if number in (1, 2):  # again, as what follows a part may have been compiled again
            return_library_pages()
            return_freed_memory()


@functools.cache
def forget_traces() -> None:
    """Make JAX forget what it traced and compiled so far, once in this process."""
    jax.clear_caches()


def return_library_pages() -> None:
    """Drop the clean pages of mapped files; a no-op elsewhere than on Linux.

    The system keeps them in its cache, from which those that are used again come back. Most belong
    to JAX's compiler, which decoding does not use.
    """
    MADV_DONTNEED = 4
    with contextlib.suppress(OSError, GptjaxError, UnicodeDecodeError, AttributeError):
        libc: Any = ctypes.CDLL("libc.so.6")
        for begin, end in clean_mappings(read_text("/proc/self/smaps", 1 << 24)):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """(begin, end) of each mapping of a file that cannot be written and of which the process has
    no page of its own, as relocated code has.

    Args:
        smaps: the text of ``/proc/PID/smaps``.

    """
    found = re.finditer(
        r"^(\w+)-(\w+) r-.. \w+ \w+:\w+ [1-9]\d* .*\n(?:(?!Anonymous)\w+:.*\n)*Anonymous: +0 kB",
        smaps,
        re.MULTILINE,
    )
    return [(int(match[1], 16), int(match[2], 16)) for match in found]
