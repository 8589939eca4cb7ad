"""The frame that every command runs in: options, errors in one sentence, and the process's memory settings."""

import contextlib
import ctypes
import dataclasses
import difflib
import errno
import io
import itertools
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import jax
import jsonargparse

from gptjax.errors import ConfigError, GptjaxError

BAD_INPUT = 2  # exit status
INTERRUPTED = 130
BROKEN_PIPE = 141

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
T = TypeVar("T")


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with errors in one sentence: the key, what is wrong, and the nearest key there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as `ConfigError`, which `reported_errors` prints."""
        raise ConfigError(self._one_sentence(message)) from ex

    def _one_sentence(self, message: str) -> str:
        keys = [action.dest for action in self._actions]
        unknown = (
            re.search(r"Option '(\S+)' is not accepted", message)
            or re.search(r"unrecognized arguments: --([^\s=]+)", message)
            or re.search(r"Group '(\S+)' does not accept option '(\S+)'", message)
        )
        if unknown:
            key = ".".join(unknown.groups())
            near = difflib.get_close_matches(key, keys, 1, 0.5)
            return f"unknown option {key}" + (f": did you mean {near[0]}?" if near else "; --help lists them all")
        line = " ".join(message.split())
        line = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", line)
        return re.sub(r"<class '(\w+)'>", r"\1", line)


def parse(config_class: type[T], prog: str, description: str, argv: list[str] | None) -> tuple[T, Path | None]:
    """Read ``--config FILE`` and any ``--section.key value`` into a frozen dataclass; later ones override earlier ones.

    Returns:
        The configuration, and the last config file named, if any.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value that ``config_class`` refuses.

    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE [--SECTION.KEY VALUE ...] [--print_config]",
        description=textwrap.dedent(description),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(config_class, fail_untyped=True)
    switches = {f"--{field.name}" for field in dataclasses.fields(cast(Any, config_class)) if field.type is bool}
    given = sys.argv[1:] if argv is None else argv
    argv = [
        f"{arg}=true" if arg in switches and following not in ("true", "false") else arg
        for arg, following in itertools.pairwise([*given, ""])
    ]
    try:
        values = vars(parser.instantiate(parser.parse_args(argv)))
    except UnicodeDecodeError as error:
        raise ConfigError(f"a config file is not UTF-8 text: {error.reason} at byte {error.start}") from error
    files = values.pop("config") or []
    return config_class(**values), Path(str(files[-1])) if files else None


@contextlib.contextmanager
def reported_errors(
    prog: str, less: str = "lower data.batch_size", speaks: Callable[[str], bool] = lambda message: True
) -> Iterator[None]:
    """Turn errors that a person can mend into one sentence on stderr and exit status 2, without a traceback.

    SIGTERM ends the block as Ctrl-C does, so that what is half made is cleared away. ``less`` says how to take less memory; an
    error is printed only if ``speaks`` says so of it, since another process may print the same.
    """

    def fail(message: str) -> NoReturn:
        if speaks(message):
            print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except GptjaxError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"{prog}: error: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        fail(f"{error.filename or 'output'} cannot be used: {error.strerror}; free space or name another folder")
    except MemoryError:
        fail(f"out of memory: {less} or choose a smaller model")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"the device is out of memory: {less} or choose a smaller model ({error})")
    finally:
        signal.signal(signal.SIGTERM, previous)


GIVEN_UP = "Event loop is closed", "Encountered error while reading array"  # of what waits for writes, and for reads


def quiet_libraries() -> None:
    """Keep Orbax's and TensorStore's tracebacks of what failed off the screen: commands report the failure themselves.

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
    """Let stdout show a placeholder for characters that its encoding lacks, instead of failing on them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system; elsewhere do nothing.

    A training step on CPU frees and allocates the same hundreds of megabytes each time; handing them back costs a page
    fault for every 4 KiB: 93,000 of them in a gradient of 124M at B=4, T=64, none with these settings. Call before JAX
    starts its threads.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
