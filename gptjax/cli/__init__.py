"""The frame that every command runs in: errors in one sentence, and the process's memory settings."""

import contextlib
import ctypes
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from gptjax.cli.streams import drop_output, whole_output
from gptjax.errors import GptjaxError

BAD_INPUT = 2  # exit status
INTERRUPTED = 130
BROKEN_PIPE = 141


@contextlib.contextmanager
def reported_errors(
    prog: str,
    less: str = "lower data.batch_size",
    speaks: Callable[[str], bool] = lambda message: True,
) -> Iterator[None]:
    """Turn errors that a person can mend into one sentence on stderr and exit status 2, without a
    traceback.

    SIGTERM ends the block as Ctrl-C does, so that what is half made is cleared away. ``less`` says
    how to take less memory; an error is printed only if ``speaks`` says so of it, since another
    process may print the same.
    """

    def fail(message: str) -> NoReturn:
        if speaks(message):
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
    except BrokenPipeError:  # whoever read the output has seen enough
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
            f"{error.filename or 'output'} cannot be used: {error.strerror}; free space or name another folder"
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


# Of what waits for writes, and for reads
GIVEN_UP = "Event loop is closed", "Encountered error while reading array"


def quiet_libraries() -> None:
    """Keep Orbax's and TensorStore's tracebacks of what failed off the screen: commands report the
    failure themselves.

    Of a damaged checkpoint there is one for every array, of some kilobytes each.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(GIVEN_UP):
            show(unraisable)

    sys.unraisablehook = hook


def replace_unprintable() -> None:
    """Let stdout show a placeholder for characters that its encoding lacks, instead of failing on
    them.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system; elsewhere do nothing.

    A training step on CPU frees and allocates the same hundreds of megabytes each time; handing
    them back costs a page fault for every 4 KiB: 93,000 of them in a gradient of 124M at B=4, T=64,
    none with these settings. Call before JAX starts its threads.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
