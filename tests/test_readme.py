"""The READMEs say what is so: commands parse, code runs, files and links exist."""

import itertools
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import gptjax
from gptjax.cli.options import Parser
from gptjax.config import COMMANDS
from gptjax.errors import ConfigError
from tests.conftest import ROOT

READMES = sorted([ROOT / "README.md", *ROOT.glob("gptjax/*/README.md"), *ROOT.glob("*/README.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"\.\.\.|\\$|  #.*")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[tuple[str, str]]:
    """Each command of the package in a README, with the line that follows it."""
    text = re.sub(r" *\\\n *", " ", text)
    found = []
    for language, block in FENCED.findall(text):
        lines = [*block.splitlines(), ""] if language != "python" else []
        for line, following in itertools.pairwise(lines):
            found += [
                (c, following) for c in re.findall(r"python -m (gptjax\.\w+(?= |$)[^\n|']*)", line)
            ]
    prose = FENCED.sub("", text)
    return found + [(c, "") for c in re.findall(r"`python -m (gptjax\.\w+[^`]*)`", prose)]


@pytest.fixture(scope="module")
def parsers():
    """A parser for each command, made once."""
    made: dict = {}

    def parser_of(name: str) -> Parser:
        if name not in made:
            made[name] = Parser(COMMANDS[name], f"python -m gptjax.{name}", "")
        return made[name]

    return parser_of


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_command_parses(path, parsers, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, following in commands(path.read_text()):
        name, *argv = shlex.split(PLACEHOLDER.sub("", command).strip())
        name = name.removeprefix("gptjax.")
        if name not in COMMANDS and argv:  # of the tokenizers
            name = f"{name} {argv.pop(0)}"
        if not argv or name == "NAME":
            assert name == "NAME" or any(known.startswith(name) for known in COMMANDS), command
            continue
        if name in ("train", "explore") and "--config" not in argv:  # the run's own
            argv = ["--config", "configs/debug.yaml", *argv]
        # These have dimensions of their own
        if name in ("bench", "verify") and {"--checkpoint", "gpu"} & set(argv):
            argv = ["--model.preset", "124m", *argv]
        parser, message = parsers(name), ""
        try:
            parser.instantiate(parser.parse_args(argv))
        except ConfigError as error:
            message = str(error)
        assert following.endswith(f"error: {message}" if message else ""), command


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_link_and_picture_is_there(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_s_code_is_the_package_s_or_runs(capsys):
    text = (ROOT / "README.md").read_text()
    shown, helped, example = (
        code for language, code in FENCED.findall(text) if language == "python"
    )
    assert shown in (ROOT / "gptjax" / "ops" / "norm.py").read_text()
    opening = textwrap.dedent(gptjax.__doc__.split("\n\n")[1])
    assert [line for line in helped.splitlines() if line] == opening.splitlines()
    exec(example, {})
    assert capsys.readouterr().out.splitlines()[-1].rpartition(" to ")[0] in example


def test_the_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 230
    assert len(re.findall(r"!\[[^\]]{20,}\]\(notebooks/images/", text)) == 3
