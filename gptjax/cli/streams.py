"""The standard streams of a command, even one that is started without them."""

import contextlib
import os
import sys
from collections.abc import Iterator

from gptjax.errors import ConfigError, DataError
from gptjax.files import read_stream


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """Flush stdout before the command ends, and keep opened files off the standard descriptors.

    Output to a closed stderr is dropped.

    Raises:
        ConfigError: stdout is closed.

    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would get this number, and the stream's output
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        raise ConfigError("standard output is closed: send it somewhere, to /dev/null say")
    try:
        yield
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def drop_output() -> None:
    """Discard unwritten stdout, so that Python does not fail on it again at exit."""
    with contextlib.suppress(OSError):  # stdout may not be a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def standard_input(largest: int) -> bytes:
    """Read all of stdin.

    Raises:
        DataError: stdin is closed.
        FormatError: it is longer than ``largest`` bytes.

    """
    if sys.stdin is None:
        raise DataError("standard input is closed")
    return read_stream(sys.stdin.buffer, "standard input", largest)


def show(text: str) -> None:
    """Write text now; on a terminal, a placeholder for the control characters that a model may well
    produce.
    """
    if sys.stdout.isatty():
        text = "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
    sys.stdout.write(text)
    sys.stdout.flush()
