"""Errors that a person can mend. Commands print them as one sentence and exit with status 2."""

import contextlib
import os
from collections.abc import Iterator


class GptjaxError(Exception):
    """Base class of the project's errors. The message names the key or file and the fix."""


class ConfigError(GptjaxError):
    """A configuration that cannot be run."""


class FormatError(GptjaxError):
    """A file that is not what its format says it should be."""


class DataError(GptjaxError):
    """A corpus that cannot be found, made or batched."""


class CheckpointError(GptjaxError):
    """A checkpoint that cannot be written or resumed."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the path to an `OSError` from reading or writing an open file, which lacks it.

    An error that already names a file, such as the source of a copy, keeps that name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
