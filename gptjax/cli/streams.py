"""The standard streams of a command, also of one that is started without them."""

import contextlib
import os
import sys
from collections.abc import Iterator

from gptjax.errors import ConfigError, DataError
from gptjax.files import read_stream


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """Write what is printed before the command ends, and let no file take the place of a standard
    stream.

    A closed stdin is not read, and of a closed stderr nothing is seen.

    Raises:
        ConfigError: stdout is closed.

    """
    for number in range(3):
        try:
            os.fstat(number)
        # The next file opened would be taken for the stream by what writes to its number
        except OSError:
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
    """Send what is left of stdout nowhere, so that Python does not fail on it once more as it ends."""
    with contextlib.suppress(OSError):  # of a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def standard_input(largest: int) -> bytes:
    """All of stdin.

    Raises:
        DataError: it is closed.
        FormatError: it is longer than ``largest`` bytes.

    """
    if sys.stdin is None:
        raise DataError("standard input is closed")
    return read_stream(sys.stdin.buffer, "standard input", largest)
