"""Names and numbers that no run can have, given to every command."""

import contextlib
import dataclasses
import importlib

import pytest

from gptjax.cli.options import parse
from gptjax.config import BenchConfig, Config, EvaluateConfig, PlanConfig, VerifyConfig
from gptjax.errors import ConfigError
from tests.commands import expect_error
from tests.faults.tally import trials

NAMES = [
    "",
    " ",
    ".",
    "..",
    "a/b",
    "/tmp/a",
    "../a",
    "a/",
    "a\nb",
    "a\x1b[2J",
    "a\x00",
    "a\u202eb",
    "\ud800",
    "a" * 300,
]
MODEL = ["--model.preset", "124m"]
# To the parser of a float: infinite, or no number. To that of an int: more than any memory, or a
# person's patience, holds.
FLOATS = ["1e400", "-1e400", ".inf", "-.inf", ".nan", "1e39"]
INTS = ["1" + "0" * 23, "-1" + "0" * 23, "1" + "0" * 400, "1e23", ".inf", ".nan"]


def refused(f, *args) -> str:
    with pytest.raises(ConfigError) as error:
        f(*args)
    return str(error.value)


def test_a_name_is_that_of_one_folder(tally):
    messages = [
        refused(lambda name: parse(Config, "train", "", [*MODEL, f"--name={name}"]), name)
        for name in NAMES
    ]
    tally(
        "hostile names", len(NAMES), sum(message.startswith("name must ") for message in messages)
    )


def numbers(config_class, prefix=""):
    """The options of a configuration that take a number, each with the values that it must
    refuse.
    """
    for field in dataclasses.fields(config_class):
        kind = field.type
        if dataclasses.is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{field.name}.")
        elif kind in (float, float | None):
            yield prefix + field.name, FLOATS
        elif kind in (int, int | None):
            yield prefix + field.name, INTS


@pytest.mark.parametrize("given", ["option", "file"])
def test_every_number_of_every_configuration_is_bounded(tally, tmp_path, given):
    """One value of each, another one in a file; ``GPTJAX_FAULTS=6`` tries them all."""
    classes = {
        Config: MODEL,
        EvaluateConfig: ["--checkpoint", "nowhere", "--dataset", "nowhere"],
        PlanConfig: MODEL,
        VerifyConfig: MODEL,
        BenchConfig: MODEL,
    }
    # Most are in several
    options = {key: (cls, values) for cls in reversed(classes) for key, values in numbers(cls)}
    assert len(options) > 40
    tried, wrong = 0, []
    for place, (key, (cls, values)) in enumerate(options.items()):
        for trial in range(min(trials(1), len(values))):
            value = values[(place + trial + 3 * (given == "file")) % len(values)]
            arguments = [f"--{key}={value}"]
            if given == "file":
                *sections, name = key.split(".")
                file = tmp_path / "numbers.yaml"
                file.write_text(
                    "".join(f"{section}: {{" for section in sections)
                    + f"{name}: {value}"
                    + "}" * len(sections)
                )
                arguments = ["--config", str(file)]
            tried += 1
            message = refused(parse, cls, "prog", "", [*classes[cls], *arguments])
            if not message.removeprefix(f"config {arguments[-1]}: ").startswith(key):
                wrong.append((key, value))
    tally(
        f"numbers beyond use, as {given}: {wrong}" if wrong else "numbers beyond use",
        tried,
        tried - len(wrong),
    )


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "generate",
            [
                "num_samples",
                "max_new_tokens",
                "batch_size",
                "seed",
                "top_k",
                "temperature",
                "top_p",
                "min_p",
            ],
        ),
        ("plot", ["smooth"]),
        ("datasets", ["tokens"]),
    ],
)
def test_every_number_of_the_other_commands_is_bounded(tally, capsys, command, options):
    package = f"gptjax.{command}"
    with contextlib.suppress(ModuleNotFoundError):
        package = importlib.import_module(f"{package}.__main__").__name__
    main = importlib.import_module(package).main
    first = {"generate": ["--checkpoint", "nowhere"], "plot": ["nowhere"], "datasets": ["pydoc"]}[
        command
    ]
    for option in options:
        for value in INTS if option not in ("temperature", "top_p", "min_p") else FLOATS:
            expect_error(main, [*first, f"--{option}={value}"], option, capsys)
    tally("numbers beyond use", len(options) * 6, len(options) * 6)


def test_samples_are_refused_before_a_model_is_read(capsys):
    from gptjax.generate.__main__ import main

    expect_error(
        main, ["--checkpoint", "nowhere", "--num_samples", "1" + "0" * 11], "num_samples", capsys
    )
