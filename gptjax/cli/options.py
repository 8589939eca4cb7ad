"""Options: a frozen dataclass of `gptjax.config`, read from a YAML file and the command line, and
explained by ``--help``.
"""

import argparse
import dataclasses
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import docstring_parser
import jsonargparse
import numpy as np
import yaml

from gptjax.cli.aliases import advice, nearest, same_meaning
from gptjax.config import COMMANDS, Config
from gptjax.errors import ConfigError
from gptjax.files import read_text
from gptjax.formats import yaml_files

LARGEST = 2**31 - 1  # number that an option may be: JAX counts and indexes in 32 bits
LARGEST_OF = {"seed": 2**32 - 1, "tokens": 2**53}
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LONGEST = 500  # characters of a message about options
WIDTH, COLUMN = 100, 29  # of help, and of where its explanations begin
# What every command takes beside its options
FRAME = ("config", "help", "help_all", "print_config")
YAML = "gptjax yaml"  # a mode of jsonargparse
jsonargparse.set_loader(YAML, yaml_files.load, (yaml.YAMLError,))
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
T = TypeVar("T")


class Option(NamedTuple):
    """An option as its dataclass declares it."""

    name: str
    """With its section, as in ``train.steps``."""
    type: Any
    default: Any
    """`dataclasses.MISSING` where it has to be given."""
    explanation: str
    metadata: Any


def options_of(config_class: Any, section: str = "") -> Iterator[Option]:
    """Every option of a dataclass: its own first, then those that it inherits, then those of its
    sections.
    """
    explanations = {
        param.arg_name: " ".join((param.description or "").split())
        for base in reversed(config_class.__mro__)
        if dataclasses.is_dataclass(base)
        for param in docstring_parser.parse_from_object(base).params
    }
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
            yield Option(
                name, field.type, default, explanations.get(field.name, ""), field.metadata
            )


def covers(names: tuple[str, ...], option: str) -> bool:
    """Whether an option is among ``names``, or in a section that is."""
    return option in names or option.partition(".")[0] in names


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser of a configuration, with a short ``--help`` and errors in one sentence."""

    def __init__(self, config_class: Any, prog: str, description: str) -> None:
        """A parser of ``config_class``.

        The class may say in ``READS`` what its command reads, and in ``COMMON`` what ``--help``
        explains; what it declares itself is read and explained in any case.
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
        """Add an option that takes several words, or an argument that is known by its place."""
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
        """As jsonargparse's, whose other errors become sentences; numbers must be finite and of a
        sensible size.
        """
        given = self._with_switches(sys.argv[1:] if args is None else args)
        self._check_names(given)
        try:
            parsed = super().parse_args(given, *rest, **kwargs)
        except (ValueError, RecursionError) as error:
            self.error(str(error), error)
        for key, value in parsed.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                require_sensible(key, number)
        return parsed

    def _with_switches(self, args: list[str]) -> list[str]:
        """The arguments with ``--flag`` as ``--flag=true``, unless its value follows."""
        switches = {f"--{name}" for name, option in self.options.items() if option.type is bool}
        return [
            f"{arg}=true" if arg in switches and following.lower() not in ("true", "false") else arg
            for arg, following in itertools.pairwise([*args, ""])
        ]

    def _check_names(self, args: list[str]) -> None:
        """Raise a ConfigError for the first option that the command does not read."""
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            name = arg.removeprefix("--").partition("=")[0]
            if not arg.startswith("--") or " " in name or name in self.read or name in FRAME:
                continue
            if name in self.sections():
                raise ConfigError(
                    f"{name} is a section: give its options, as in --{name}.KEY VALUE, or --config FILE"
                )
            raise ConfigError(self._unknown(name))

    def _unknown(self, name: str, others: Iterable[str] = ()) -> str:
        """Why the command takes no such option, and what to give in its place: one that it reads,
        or one of ``others``.
        """
        name = name[:LONGEST]
        same = same_meaning(name, self.read)
        meant = same or same_meaning(name, list(SHARED)) or name
        elsewhere = _command_of(name) or (_command_of(meant) if not same else None)
        if elsewhere and not (same and "." not in name):
            return f"{self.command} does not read {name if same else meant}" + (
                f": did you mean {same}?" if same else f", an option of {elsewhere}"
            )
        if said := advice(name):
            return f"unknown option {name}: {said}"
        near = same or nearest(name, [*self.read, *self.sections(), *others])
        return f"unknown option {name}" + (
            f": did you mean {near}?" if near else "; --help_all lists them all"
        )

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a config file: UTF-8, `yaml_files.LARGEST` bytes at most.

        Raises:
            GptjaxError: it cannot be read, or holds something else than options.

        """
        try:
            content = read_text(path, yaml_files.LARGEST)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"config {path} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        return self.parse_string(content, path, *args, **kwargs)

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration in YAML, of which the shape is checked first.

        The options of training may be in it, whichever command reads it: a file can serve them all.

        Raises:
            ConfigError: it is not YAML, not options with their values, or has a section that is not
                one.

        """
        named = f"config {path}" if path else "config"
        try:
            values = yaml_files.load(content)
            self._check_section(named, values)
        except yaml.YAMLError as error:
            self.error(f"{named} cannot be read: {error}", error)
        top_level = {name.partition(".")[0] for name in self.options}
        if any(key not in top_level for key in values):
            content = yaml.safe_dump(
                {key: value for key, value in values.items() if key in top_level}
            )
        return super().parse_string(content, path, *args, **kwargs)

    def sections(self) -> set[str]:
        """The names that have options below them: ``train``, of ``train.steps``."""
        return {name.partition(".")[0] for name in self.options if "." in name}

    def _check_section(self, named: str, values: Any, section: str = "") -> None:
        """Raise a ConfigError unless the values are options, and sections hold options in turn."""
        if not isinstance(values, dict):
            raise ConfigError(
                f"{named}{section and f': the section {section}'} must hold options, as in KEY: VALUE"
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
                raise ConfigError(self._unknown(name, SHARED))
            # Which jsonargparse takes for YAML once more, unless the option is text
            if isinstance(value, str):
                try:
                    yaml_files.load(value)
                except yaml_files.AliasError:
                    raise
                except yaml.YAMLError:
                    pass

    def _is_ignored(self, name: str) -> bool:
        """Whether an option in a file is only there for other commands."""
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
        """As argparse's, which keeps a full disk to itself."""
        print(message, end="", file=file or sys.stderr)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as `ConfigError`, which `gptjax.cli.reported_errors` prints."""
        line = self._one_sentence(message)
        raise ConfigError(line if len(line) <= LONGEST else f"{line[:LONGEST]}...") from ex

    def _one_sentence(self, message: str) -> str:
        line = " ".join(message.split())
        line = re.sub(
            r"^unrecognized arguments: (.*)",
            r"unexpected argument \1: options begin with --, as in --config FILE",
            line,
        )
        line = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", line)
        line = re.sub(r"<class '(\w+)'>", r"\1", line)
        line = re.sub(r'in "<\w+ string>", ', "at ", line)
        return re.sub(r"Exceeds the limit \(\d+ digits\).*", "the number has too many digits", line)


class _HelpAll(argparse.Action):
    """Print the help of every option, and end."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


SHARED = {option.name for option in options_of(Config)}
SHARED_SECTIONS = {name.partition(".")[0] for name in SHARED if "." in name}


def _command_of(name: str) -> str | None:
    """The first command that has this option."""
    return next(
        (
            command
            for command, cls in COMMANDS.items()
            if any(name == option.name for option in options_of(cls))
        ),
        None,
    )


def described(text: str) -> str:
    """A docstring's paragraphs, filled to the width of help, without its markup."""
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
    """A default in as few characters as tell it."""
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def _is_positional(option: Option) -> bool:
    return option.metadata.get("positional", False)


def _place(option: Option) -> str:
    """A positional argument as usage lines have it."""
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
        ConfigError: an option that is unknown, or that the command does not read, a wrong type, or
            a value that ``config_class`` refuses.

    """
    parser = Parser(config_class, prog, description)
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
    most = (
        LARGEST_FLOAT
        if isinstance(number, float)
        else LARGEST_OF.get(key.rpartition(".")[2], LARGEST)
    )
    if not abs(number) <= most:  # which NaN is not either
        if isinstance(number, float):
            raise ConfigError(
                f"{key} must be a finite number of at most {most:.3g}, not {number:g}"
            )
        shown = f"{number:,}" if abs(number) < 10**30 else "one of more than 30 digits"
        raise ConfigError(f"{key} must be a number of at most {most:,}, not {shown}")
