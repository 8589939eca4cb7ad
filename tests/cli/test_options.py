import dataclasses
import importlib
import re
from typing import ClassVar

import pytest

from gptjax.cli.options import WIDTH, Parser, covers, last_value, options_of, parse
from gptjax.config import (
    COMMANDS,
    BenchConfig,
    Config,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    PlanConfig,
    VerifyConfig,
)
from gptjax.errors import ConfigError

SCREENS = 100  # lines: two screens


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section.

    Attributes are documented below them.
    """

    size: int = 3
    """How large."""
    loud: bool = False
    """Whether it is heard."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    """The section."""
    rate: float = 0.5
    """How fast."""
    fast: bool = True
    """Whether it is fast at all."""


@dataclasses.dataclass(frozen=True)
class Narrow(Options):
    """Reads the section, and what it declares itself."""

    READS: ClassVar = ("inner",)
    COMMON: ClassVar = ("inner.size",)

    own: str = "x"
    """Its own."""


def given(*args: str):
    return parse(Options, "python -m gptjax.prog", "What it does.", list(args))


def refused(config_class, *args: str, prog: str = "python -m gptjax.prog") -> str:
    with pytest.raises(ConfigError) as error:
        parse(config_class, prog, "", list(args))
    return str(error.value)


def test_defaults_then_file_then_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("inner: {size: 7}\nrate: 1e-3\n")
    assert given() == (Options(), None)
    assert given("--config", str(path)) == (Options(Inner(7), 1e-3), path)
    assert given("--config", str(path), "--inner.size", "9")[0] == Options(Inner(9), 1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--inner.sice", "3"], "unknown option inner.sice: did you mean inner.size?"),
        (["--zzz=3"], "unknown option zzz; --help_all lists them all"),
        (
            ["--inner.sice", "3", "--zzz"],
            "unknown option inner.sice: did you mean inner.size?; unknown option zzz; --help_all "
            "lists them all",
        ),
        (["--config", "no.yaml"], "config no.yaml does not exist"),
        (
            ["--config=config/debug"],
            "config config/debug does not exist: did you mean configs/debug.yaml?",
        ),
        (["--inner.size", "big"], "inner.size: Expected an int. Got value: big"),
        (
            ["--inner", "3"],
            "inner is a section: give its options, as in --inner.KEY VALUE, or --config FILE",
        ),
        (
            ["x.yaml"],
            "unexpected argument x.yaml: options begin with --, as in --config FILE.yaml "
            "or --rate VALUE",
        ),
    ],
)
def test_mistakes_in_one_sentence(args, message):
    assert refused(Options, *args).startswith(message)


@pytest.mark.parametrize("flag", ["fast", "inner.loud"])
def test_a_boolean_is_a_flag_at_every_depth(flag):
    def value(*args):
        found = given(*args)[0]
        return found.fast if flag == "fast" else found.inner.loud

    for args in (
        [f"--{flag}"],
        [f"--{flag}", "true"],
        [f"--{flag}=true"],
        [f"--{flag}", "--rate", "1"],
    ):
        assert value(*args) is True, args
    for args in ([f"--{flag}", "false"], [f"--{flag}=false"], [f"--{flag}", "False"]):
        assert value(*args) is False, args


def test_the_flags_of_training():
    model = ["--model.preset", "124m"]
    cfg = parse(
        Config, "train", "", [*model, "--log.tensorboard", "--distributed.detect", "false"]
    )[0]
    assert cfg.log.tensorboard
    assert not cfg.distributed.detect
    assert not parse(Config, "train", "", [*model, "--log.tensorboard", "false"])[0].log.tensorboard


@pytest.mark.parametrize("args", [["--tokenizer", "byte"], ["--tokenizer=byte"]])
def test_the_tokenizer_of_training_has_a_short_name(args):
    """Other commands have an option of that name."""
    cfg, _ = parse(Config, "train", "", ["--model.preset", "124m", *args])
    assert cfg.data.tokenizer == "byte"
    cfg, _ = parse(EvaluateConfig, "evaluate", "", ["--checkpoint", "x", "--text", "y", *args])
    assert cfg.tokenizer == "byte"
    assert refused(Narrow, *args).startswith("prog does not read data.tokenizer")


def test_the_last_value_of_an_option_counts():
    args = ["--config", "a", "--rate", "1", "--config=b", "c"]
    assert last_value(args, "--config") == "b"
    assert last_value([*args, "--config"], "--config") == ""
    assert last_value(args, "--resume") == ""


# --- What a command reads ---


def test_an_option_that_is_not_read_is_an_error_only_on_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("rate: 2\ninner: {size: 4}\n")
    # No command has it
    assert refused(Narrow, "--rate", "2") == "unknown option rate; --help_all lists them all"
    assert parse(Narrow, "prog", "", ["--config", str(path)])[0] == Narrow(Inner(4), 2.0)


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        (
            "generate",
            ["--train.steps", "5"],
            "generate does not read train.steps, an option of train",
        ),
        (
            "generate",
            ["--data.batch_size=5"],
            "generate does not read data.batch_size: did you mean batch_size?",
        ),
        ("verify", ["--train.steps", "5"], "verify does not read train.steps, an option of train"),
        (
            "verify",
            ["--model.dtype", "float32"],
            "verify does not read model.dtype: did you mean dtype?",
        ),
        ("verify", ["--lr", "1"], "verify does not read optim.learning_rate, an option of train"),
        ("plan", ["--log.tensorboard"], "plan does not read log.tensorboard, an option of train"),
        ("bench", ["--runs", "x"], "bench does not read runs, an option of train"),
        ("train", ["--topology", "h100:8"], "train does not read topology, an option of plan"),
        (
            "train",
            ["--batch_size", "8"],
            "unknown option batch_size: did you mean data.batch_size?",
        ),
    ],
)
def test_the_commands_refuse_what_they_do_not_read(command, args, message):
    assert refused(COMMANDS[command], *args, prog=f"python -m gptjax.{command}") == message


@pytest.mark.parametrize("config_class", [VerifyConfig, PlanConfig, BenchConfig])
def test_every_command_takes_the_file_of_a_training_run(config_class, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {preset: 124m}\ntrain: {steps: 7}\nlog: {tensorboard: true}\nruns: elsewhere\n"
    )
    assert parse(config_class, "prog", "", ["--config", str(path)])[0].train.steps == 7


def test_a_command_without_sections_leaves_those_of_a_file_alone(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {preset: 124m}\ndata: {batch_size: 4}\nseed: 5\nruns: elsewhere\n")
    assert (
        parse(GenerateConfig, "prog", "", ["--config", str(path), "--checkpoint", "m"])[0].seed == 5
    )
    needed = ["--checkpoint", "m", "--dataset", "d"]
    assert parse(EvaluateConfig, "prog", "", ["--config", str(path), *needed])[0] == EvaluateConfig(
        "m", "d"
    )
    path.write_text("model: {presett: 124m}\n")
    assert "did you mean" in refused(EvaluateConfig, "--config", str(path), *needed)


def test_a_config_file_may_hold_options_of_other_commands(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {preset: 124m}\ntopology: h100:8\n")
    assert parse(Config, "train", "", ["--config", str(path)])[0] == Config(
        ModelConfig(preset="124m")
    )
    path.write_text("model: {preset: 124m}\nbatch_size: 64\n")
    assert (
        refused(Config, "--config", str(path))
        == f"config {path}: unknown option batch_size: did you mean data.batch_size?"
    )


def test_what_is_declared_as_read_or_common_exists():
    for config_class in {Config, VerifyConfig, PlanConfig, BenchConfig}:
        names = [option.name for option in options_of(config_class)]
        for declared in (*getattr(config_class, "READS", ()), *config_class.COMMON):
            assert any(covers((declared,), name) for name in names), (
                f"{config_class.__name__}: {declared}"
            )


# --- Help ---


def help_of(command: str, capsys, flag: str = "--help") -> str:
    room, *rest = command.split()
    main = importlib.import_module(f"gptjax.{room}.__main__").main
    with pytest.raises(SystemExit) as stop:
        main([*rest, flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_two_screens_and_explains_what_the_command_reads(command, capsys):
    short, whole = help_of(command, capsys), help_of(command, capsys, "--help_all")
    assert len(short.splitlines()) <= SCREENS
    assert max(map(len, whole.splitlines())) <= WIDTH
    parser = Parser(COMMANDS[command], command, "")
    for text, shown in ((short, parser.common), (whole, parser.read)):
        explained = set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE)) - {
            "config",
            "print_config",
            "help_all",
        }
        assert explained == {
            name for name in shown if not parser.options[name].metadata.get("positional")
        }
    hidden = len(parser.read) - len(parser.common)
    assert (f"Explain {hidden} more options." if hidden else "Explain every option.") in short


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    for option in options_of(COMMANDS[command]):
        assert len(option.explanation) > 5, option.name


def test_help_tells_defaults_choices_and_places():
    text = Parser(Options, "python -m gptjax.prog", "Does\nthis.\n\nAnd ``that``.").format_help()
    assert text.startswith(
        "usage: python -m gptjax.prog [--config FILE] [--OPTION VALUE ...]\n\nDoes this.\n\nAnd "
        "that.\n"
    )
    assert "  --rate X                   How fast (default 0.5).\n" in text
    assert "  --inner.loud               Whether it is heard.\n" in text
    assert "(on by default; --fast false turns it off)." in " ".join(text.split())
    parser = Parser(COMMANDS["convert"], "convert", "")
    assert parser.format_help().startswith("usage: convert SOURCE [DESTINATION] [--config FILE]")
    assert "one of 124m, 350m, 774m, 1558m" in " ".join(
        Parser(Config, "train", "").format_help().split()
    )


def test_what_is_narrow_shows_its_own_and_the_common():
    parser = Parser(Narrow, "prog", "")
    assert parser.read == ["own", "inner.size", "inner.loud"]
    assert parser.common == ["own", "inner.size"]
    assert "Explain 1 more options." in parser.format_help()
