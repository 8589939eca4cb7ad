"""Options: parse YAML files and the command line into the dataclasses of `gptjax.config`."""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import docstring_parser
import jsonargparse
import numpy as np
import yaml

from gptjax.cli.aliases import SHORT, advice, nearest, same_meaning
from gptjax.config import COMMANDS, Config
from gptjax.errors import ConfigError
from gptjax.files import read_text
from gptjax.formats import yaml_files

LARGEST = 2**31 - 1  # largest integer option: JAX counts and indexes in 32 bits
LARGEST_OF = {"seed": 2**32 - 1, "tokens": 2**53}
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LONGEST = 500  # characters in an error message about options
MOST_UNKNOWN = 5  # options that one error lists
WIDTH, COLUMN = 100, 29  # of the help text, and of its explanations
# Options that every command takes
FRAME = ("config", "help", "help_all", "print_config")
YAML = "gptjax yaml"  # name of the jsonargparse parser mode
jsonargparse.set_loader(YAML, yaml_files.load, (yaml.YAMLError,))
T = TypeVar("T")


class Option(NamedTuple):
    """An option, as declared in its dataclass."""

    name: str
    """Includes the section, as in ``train.steps``."""
    type: Any
    default: Any
    """`dataclasses.MISSING` if required."""
    metadata: Any
    declared_in: Any
    """The dataclass, or one that inherits from it."""

    @property
    def explanation(self) -> str:
        """The docstring below its declaration."""
        key = self.name.rpartition(".")[2]
        found = (_explanations(base).get(key) for base in self.declared_in.__mro__)
        return next(filter(None, found), "")


@functools.cache
def _explanations(declared_in: Any) -> dict[str, str]:
    """The docstring of each option that the dataclass itself declares; empty for other classes.

    Reads the source, in tens of milliseconds.
    """
    if not dataclasses.is_dataclass(declared_in):
        return {}
    return {
        param.arg_name: " ".join((param.description or "").split())
        for param in docstring_parser.parse_from_object(declared_in).params
    }


def options_of(config_class: Any, section: str = "") -> Iterator[Option]:
    """Every option of a dataclass: its own, then inherited ones, then those of its sections."""
    bases = [base for base in config_class.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    fields = sorted(
        dataclasses.fields(config_class),
        key=lambda field: (dataclasses.is_dataclass(field.type), field.name in inherited),
    )
    for field in fields:
        name = f"{section}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from options_of(field.type, f"{name}.")
        else:
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            yield Option(name, field.type, default, field.metadata, config_class)


def covers(names: tuple[str, ...], option: str) -> bool:
    """Whether ``names`` contains an option or its section."""
    return option in names or option.partition(".")[0] in names


class Parser(jsonargparse.ArgumentParser):
    """A jsonargparse parser with a short ``--help`` and one-sentence errors."""

    def __init__(self, config_class: Any, prog: str, description: str) -> None:
        """Build a parser for ``config_class``.

        ``READS`` of the class lists the options that its command reads, ``COMMON`` those that
        ``--help`` explains. Options that the class itself declares are always in both.
        """
        super().__init__(prog=prog, description=description, parser_mode=YAML)
        self.command = prog.rpartition(".")[2]
        self.options = {option.name: option for option in options_of(config_class)}
        own = tuple(config_class.__annotations__) if "READS" in vars(config_class) else ()
        self.read = [
            name
            for name in self.options
            if covers((*getattr(config_class, "READS", self.options), *own), name)
        ]
        self.common = [
            name
            for name in self.read
            if covers((*getattr(config_class, "COMMON", self.read), *own), name)
        ]
        self.shows_all = False
        self.add_argument("--config", action="config", help="YAML file with any of the options.")
        self.add_argument(
            "--help_all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="Explain every option.",
        )
        placed = [name for name, option in self.options.items() if option.metadata]
        self.add_class_arguments(config_class, fail_untyped=True, skip=set(placed))
        for name in placed:
            self._add_list_or_positional(self.options[name])

    def _add_list_or_positional(self, option: Option) -> None:
        """Add an option with several values, or a positional argument."""
        count, is_positional = option.metadata.get("nargs"), _is_positional(option)
        is_required = option.default is dataclasses.MISSING
        settings: dict[str, Any] = {"nargs": count} if count else {}
        if not is_required:
            settings["default"] = option.default
        if not is_positional and is_required:
            settings["required"] = True
        kind = get_args(option.type)[0] if get_origin(option.type) is list else option.type
        self.add_argument(
            option.name if is_positional else f"--{option.name}", type=kind, **settings
        )

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does, but reject numbers that are not finite or are absurdly large,
        and turn every error into a sentence.
        """
        given = self._in_full(sys.argv[1:] if args is None else args)
        _check_config_files(given)
        self._check_names(given)
        try:
            parsed = super().parse_args(given, *rest, **kwargs)
        except (ValueError, RecursionError) as error:
            self.error(str(error), error)
        for key, value in parsed.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                require_sensible(key, number)
        return parsed

    def _in_full(self, args: list[str]) -> list[str]:
        """Replace short names by full ones, and ``--flag`` by ``--flag=true``, unless its value
        follows.
        """
        short = {f"--{name}": f"--{full}" for name, full in SHORT.items() if full in self.read}
        switches = {f"--{name}" for name, option in self.options.items() if option.type is bool}
        full = []
        for arg, following in itertools.pairwise([*args, ""]):
            name, *value = arg.split("=", 1)
            if name in short and name.removeprefix("--") not in self.options:
                name = short[name]
            if name in switches and not value and following.lower() not in ("true", "false"):
                value = ["true"]
            full.append("=".join([name, *value]))
        return full

    def _check_names(self, args: list[str]) -> None:
        """Raise a ConfigError for the options that the command does not read."""
        unknown = []
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            name = arg.removeprefix("--").partition("=")[0]
            if not arg.startswith("--") or " " in name or name in self.read or name in FRAME:
                continue
            if name in self.sections():
                raise ConfigError(
                    f"{name} is a section: give its options, as in --{name}.KEY VALUE, "
                    "or --config FILE"
                )
            unknown.append(self._unknown(name))
        if unknown:
            raise ConfigError("; ".join(unknown[:MOST_UNKNOWN]))

    def _unknown(self, name: str, others: Iterable[str] = ()) -> str:
        """The error for an unknown option. It suggests an option that the command reads, or one of
        ``others``.
        """
        name = name[:LONGEST]
        same = same_meaning(name, self.read)
        meant = same or same_meaning(name, list(SHARED)) or name
        elsewhere = _command_of(name) or (_command_of(meant) if not same else None)
        if elsewhere and not (same and "." not in name):
            return f"{self.command} does not read {name if same else meant}" + (
                f": did you mean {same}?" if same else f", an option of {elsewhere}"
            )
        if instead := advice(name):
            return f"unknown option {name}: {instead}"
        near = same or nearest(name, [*self.read, *self.sections(), *others])
        return f"unknown option {name}" + (
            f": did you mean {near}?" if near else "; --help_all lists them all"
        )

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a config file: UTF-8, `yaml_files.LARGEST` bytes at most.

        Raises:
            GptjaxError: it cannot be read, or does not hold options.

        """
        try:
            content = read_text(path, yaml_files.LARGEST)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"config {path} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        return self.parse_string(content, path, *args, **kwargs)

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration in YAML after checking its structure.

        It may hold training options whichever command reads it, so one file serves all commands.

        Raises:
            ConfigError: it is not YAML, not a mapping of options, or a section is not a mapping.

        """
        named = f"config {path}" if path else "config"
        try:
            values = yaml_files.load(content)
            self._check_section(named, values)
        except yaml.YAMLError as error:
            self.error(f"{named} cannot be read: {error}; look at the line above, too", error)
        top_level = {name.partition(".")[0] for name in self.options}
        if any(key not in top_level for key in values):
            content = yaml.safe_dump(
                {key: value for key, value in values.items() if key in top_level}
            )
        try:
            return super().parse_string(content, path, *args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{named}: {error}") from error

    def sections(self) -> set[str]:
        """The names of all sections, such as ``train``."""
        return {name.partition(".")[0] for name in self.options if "." in name}

    def _check_section(self, named: str, values: Any, section: str = "") -> None:
        """Raise a ConfigError unless the values are options or sections of options."""
        if not isinstance(values, dict):
            raise ConfigError(
                f"{named}{section and f': the section {section}'} "
                "must hold options, as in KEY: VALUE"
            )
        for key, value in values.items():
            if not isinstance(key, str):
                raise ConfigError(f"{named}: the key {key!r} is not text")
            name = f"{section}.{key}" if section else key
            if name == "config":
                raise ConfigError(f"{named} names another config: give both on the command line")
            if name in self.sections() | SHARED_SECTIONS:
                self._check_section(named, value, name)
            elif name not in self.options and not self._is_ignored(name):
                raise ConfigError(f"{named}: {self._unknown(name, SHARED)}")
            # jsonargparse parses it as YAML again, unless the option is text
            if isinstance(value, str):
                try:
                    yaml_files.load(value)
                except yaml_files.AliasError:
                    raise
                except yaml.YAMLError:
                    pass

    def _is_ignored(self, name: str) -> bool:
        """Whether an option in a file concerns other commands only."""
        return name in SHARED or (
            _command_of(name) is not None and same_meaning(name, list(self.options)) is None
        )

    def format_help(self, formatter: Any = None) -> str:
        """A line or two for each option that the command reads: the common ones, or all."""
        shown = self.read if self.shows_all else self.common
        places = [_place(option) for option in self.options.values() if _is_positional(option)]
        usage = " ".join(
            [f"usage: {self.prog}", *places, "[--config FILE]", "[--OPTION VALUE ...]"]
        )
        parts = [usage, "", described(self.description or "")]
        section = None
        for name in shown:
            above = name.rpartition(".")[0]
            if above != section:
                parts += ["", f"{above}:" if above else "options:"]
            section = above
            parts.append(_entry(self.options[name]))
        parts += ["", "every command:"]
        parts.append(
            _columns(
                "--config FILE",
                "Read options from a YAML file; those on the command line come after it.",
            )
        )
        parts.append(
            _columns("--print_config", "Print every option with its value, as YAML, and end.")
        )
        more = len(self.read) - len(shown)
        parts.append(
            _columns(
                "--help_all", f"Explain {more} more options." if more else "Explain every option."
            )
        )
        return "\n".join(parts) + "\n"

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print as argparse does, but let a full disk raise."""
        print(message, end="", file=file or sys.stderr)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as `ConfigError`, which `gptjax.cli.reported_errors` prints."""
        line = self._one_sentence(message)
        raise ConfigError(line if len(line) <= LONGEST else f"{line[:LONGEST]}...") from ex

    def _one_sentence(self, message: str) -> str:
        line = " ".join(message.split())
        line = re.sub(
            r"^unrecognized arguments: (.*)",
            r"unexpected argument \1: options begin with --, as in --config FILE.yaml or "
            f"--{next(iter(self.common))} VALUE",
            line,
        )
        line = re.sub(r"^the following arguments are required: (.*)", r"give --\1", line)
        line = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", line)
        line = re.sub(r"<class '(\w+)'>", r"\1", line).replace("Expected a int", "Expected an int")
        line = re.sub(r'in "<\w+ string>", ', "at ", line)
        return re.sub(r"Exceeds the limit \(\d+ digits\).*", "the number has too many digits", line)


class _HelpAll(argparse.Action):
    """Print the help of every option and exit."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def _check_config_files(args: Sequence[str]) -> None:
    """Raise a ConfigError for a config file that does not exist; it suggests one of that name."""
    for argument, following in itertools.pairwise([*args, ""]):
        name, _, value = argument.partition("=")
        path = Path(value or following)
        # It may also be the content itself
        if name == "--config" and re.fullmatch(r"[\w./~-]+", str(path)) and not path.exists():
            near = Path("configs") / f"{path.name.removesuffix('.yaml')}.yaml"
            hint = f": did you mean {near}?" if near.exists() else ""
            raise ConfigError(f"config {path} does not exist{hint}")


SHARED = {option.name for option in options_of(Config)}
SHARED_SECTIONS = {name.partition(".")[0] for name in SHARED if "." in name}


def _command_of(name: str) -> str | None:
    """The first command with this option; None if none has it."""
    return next(
        (
            command
            for command, cls in COMMANDS.items()
            if any(name == option.name for option in options_of(cls))
        ),
        None,
    )


def described(text: str) -> str:
    """A docstring without markup, its paragraphs wrapped to the width of the help text."""
    paragraphs = textwrap.dedent(text).replace("``", "").replace("`", "").strip().split("\n\n")
    return "\n\n".join(
        textwrap.fill(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def _entry(option: Option) -> str:
    """An option with its explanation, choices and default."""
    kind = option.type
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    metavar = {bool: "", int: "N", float: "X"}.get(kind, "NAME" if choices else "TEXT")
    metavar += " ..." * (get_origin(kind) is list)
    notes = []
    if not all(
        re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", option.explanation) for choice in choices
    ):
        notes.append(f"one of {', '.join(choices)}")
    if option.default is dataclasses.MISSING:
        notes += [] if _is_positional(option) else ["required"]
    elif option.default is True:
        notes.append(f"on by default; --{option.name} false turns it off")
    elif (
        option.default not in (None, "", [])
        and kind is not bool
        and "by default" not in option.explanation.lower()
    ):
        notes.append(f"default {_plain(option.default)}")
    note = f" ({'; '.join(notes)})" if notes else ""
    left = _place(option) if _is_positional(option) else f"--{option.name} {metavar}".rstrip()
    return _columns(left, option.explanation.rstrip(".").replace("`", "") + note + ".")


def _plain(value: Any) -> str:
    """A default value in its shortest form."""
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def _is_positional(option: Option) -> bool:
    return option.metadata.get("positional", False)


def _place(option: Option) -> str:
    """A positional argument as shown in the usage line."""
    name = option.name.upper() + " ..." * (option.metadata.get("nargs") in ("+", "*"))
    return name if option.default is dataclasses.MISSING else f"[{name}]"


def _columns(left: str, right: str) -> str:
    return textwrap.fill(
        right,
        WIDTH,
        initial_indent=f"  {left}  ".ljust(COLUMN),
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
    )


def parse(
    config_class: type[T], prog: str, description: str, argv: list[str] | None
) -> tuple[T, Path | None]:
    """Read ``--config FILE`` and any ``--section.key value`` into a frozen dataclass; later ones
    override earlier ones.

    Returns:
        The configuration, and the last config file named, if any.

    Raises:
        ConfigError: an option is unknown or not read by the command, or a value has the wrong type
            or is rejected by ``config_class``.

    """
    parser = Parser(config_class, prog, description)
    values = vars(parser.instantiate(parser.parse_args(argv)))
    files = values.pop("config") or []
    return config_class(**values), Path(str(files[-1])) if files else None


def last_value(argv: Sequence[str], option: str) -> str:
    """What a command line gives for an option, such as ``--config``; the last counts. Empty if it
    does not name the option.
    """
    values = [
        value or following
        for argument, following in itertools.pairwise([*argv, ""])
        for name, _, value in [argument.partition("=")]
        if name == option
    ]
    return values[-1] if values else ""


def require_sensible(key: str, number: Any) -> None:
    """Check that a numeric option is finite and within bounds; other values pass.

    Raises:
        ConfigError: it is infinite, NaN or too large.

    """
    if not isinstance(number, int | float):
        return
    most = (
        LARGEST_FLOAT
        if isinstance(number, float)
        else LARGEST_OF.get(key.rpartition(".")[2], LARGEST)
    )
    if not abs(number) <= most:  # False for NaN, too
        if isinstance(number, float):
            raise ConfigError(
                f"{key} must be a finite number of at most {most:.3g}, not {number:g}"
            )
        shown = f"{number:,}" if abs(number) < 10**30 else "one of more than 30 digits"
        raise ConfigError(f"{key} must be a number of at most {most:,}, not {shown}")
