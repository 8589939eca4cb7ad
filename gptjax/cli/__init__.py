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
import numpy as np
import yaml

from gptjax.cli.streams import drop_output, whole_output
from gptjax.errors import ConfigError, GptjaxError
from gptjax.files import read_text
from gptjax.formats import yaml_files

BAD_INPUT = 2  # exit status
INTERRUPTED = 130
BROKEN_PIPE = 141
LARGEST = 2**31 - 1  # number that an option may be: JAX counts and indexes in 32 bits
LARGEST_OF = {"seed": 2**32 - 1, "tokens": 2**53}
LARGEST_FLOAT = float(np.finfo(np.float32).max)

LONGEST = 500  # characters of a message about options
YAML = "gptjax yaml"  # a mode of jsonargparse
jsonargparse.set_loader(YAML, yaml_files.load, (yaml.YAMLError,))
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
T = TypeVar("T")


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with errors in one sentence: the key, what is wrong, and the nearest key there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse's, but for `gptjax.formats.yaml_files`' YAML."""
        super().__init__(*args, parser_mode=YAML, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, whose other errors become sentences; numbers must be finite and of a sensible size."""
        try:
            parsed = super().parse_args(*args, **kwargs)
        except (ValueError, RecursionError) as error:
            self.error(str(error), error)
        for key, value in parsed.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                require_sensible(key, number)
        return parsed

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a config file: UTF-8, `yaml_files.LARGEST` bytes at most.

        Raises:
            GptjaxError: it cannot be read, or holds something else than options.

        """
        try:
            content = read_text(path, yaml_files.LARGEST)
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        return self.parse_string(content, path, *args, **kwargs)

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration in YAML, of which the shape is checked first.

        Raises:
            ConfigError: it is not YAML, not options with their values, or has a section that is not one.

        """
        named = f"config {path}" if path else "config"
        try:
            self._check_section(named, yaml_files.load(content))
        except yaml.YAMLError as error:
            self.error(f"{named} cannot be read: {error}", error)
        return super().parse_string(content, path, *args, **kwargs)

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which keeps a full disk to itself."""
        print(message, end="", file=file or sys.stderr)

    def sections(self) -> set[str]:
        """The names that have options below them: ``train``, of ``train.steps``."""
        parts = (action.dest.split(".")[:-1] for action in self._actions)
        return {".".join(above[:n]) for above in parts for n in range(1, len(above) + 1)}

    def _check_section(self, named: str, values: Any, section: str = "") -> None:
        """Raise a ConfigError unless the values are options, and sections hold options in turn."""
        if not isinstance(values, dict):
            raise ConfigError(f"{named}{section and f': the section {section}'} must hold options, as in KEY: VALUE")
        for key, value in values.items():
            if not isinstance(key, str):
                raise ConfigError(f"{named}: the key {key!r} is not text")
            name = f"{section}.{key}" if section else key
            if name == "config":
                raise ConfigError(f"{named} names another config: give both on the command line")
            if name in self.sections():
                self._check_section(named, value, name)
            if isinstance(value, str):  # which jsonargparse takes for YAML once more, unless the option is text
                try:
                    yaml_files.load(value)
                except yaml_files.AliasError:
                    raise
                except yaml.YAMLError:
                    pass

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as `ConfigError`, which `reported_errors` prints."""
        line = self._one_sentence(message)
        raise ConfigError(line if len(line) <= LONGEST else f"{line[:LONGEST]}...") from ex

    def _one_sentence(self, message: str) -> str:
        keys = [action.dest for action in self._actions]
        unknown = (
            re.search(r"Option '(\S+)' is not accepted", message)
            or re.search(r"unrecognized arguments: --([^\s=]+)", message)
            or re.search(r"Group '(\S+)' does not accept option '(\S+)'", message)
        )
        if unknown:
            key = ".".join(unknown.groups())[:LONGEST]
            near = difflib.get_close_matches(key, keys, 1, 0.5)
            return f"unknown option {key}" + (f": did you mean {near[0]}?" if near else "; --help lists them all")
        line = " ".join(message.split())
        line = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", line)
        line = re.sub(r"<class '(\w+)'>", r"\1", line)
        line = re.sub(r'in "<\w+ string>", ', "at ", line)
        return re.sub(r"Exceeds the limit \(\d+ digits\).*", "the number has too many digits", line)


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
    for arg in argv:
        section = arg.partition("=")[0].removeprefix("--")
        if arg.startswith("--") and section in parser.sections():
            raise ConfigError(f"{section} is a section: give its options, as in --{section}.KEY VALUE, or --config FILE")
    values = vars(parser.instantiate(parser.parse_args(argv)))
    files = values.pop("config") or []
    return config_class(**values), Path(str(files[-1])) if files else None


def require_sensible(key: str, number: Any) -> None:
    """Check that the value of an option, if it is a number, is one that can be computed with.

    Raises:
        ConfigError: it is infinite, no number, or beyond all use.

    """
    if not isinstance(number, int | float):
        return
    most = LARGEST_FLOAT if isinstance(number, float) else LARGEST_OF.get(key.rpartition(".")[2], LARGEST)
    if not abs(number) <= most:  # which NaN is not either
        if isinstance(number, float):
            raise ConfigError(f"{key} must be a finite number of at most {most:.3g}, not {number:g}")
        shown = f"{number:,}" if abs(number) < 10**30 else "one of more than 30 digits"
        raise ConfigError(f"{key} must be a number of at most {most:,}, not {shown}")


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
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        if error.filename is None:
            drop_output()
        fail(f"{error.filename or 'output'} cannot be used: {error.strerror}; free space or name another folder")
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
