"""The command that trains as planned."""

import contextlib
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from gptjax.cli.options import parse
from gptjax.config import Config, ModelConfig
from gptjax.errors import ConfigError
from gptjax.plan.topology import Topology

TRAIN = "python -m gptjax.train"


def train_command(cfg: Config, file: Path | None, topology: Topology) -> str:
    """The shell command: the config file, and the options that differ from it.

    Args:
        cfg: the planned configuration.
        file: the config file; without one, or if it has options that training does not have, the
            command has every option that differs from its default.
        topology: simulated CPUs need an environment variable.

    """
    options: list[str] = []
    model_defaults: dict[str, Any] = {
        f"model.{field.name}": field.default for field in dataclasses.fields(ModelConfig)
    }
    configured = _options(Config(cfg.model)) | model_defaults
    with contextlib.suppress(ConfigError):
        if file:
            configured = _options(parse(Config, TRAIN, "", ["--config", str(file)])[0])
            options = ["--config", str(file)]
    for name, value in _options(cfg).items():
        if value != configured[name]:
            options += [f"--{name}", _as_text(value)]
    simulated = (
        f"JAX_NUM_CPU_DEVICES={topology.size} "
        if topology.platform == "cpu" and topology.size > 1
        else ""
    )
    return f"{simulated}{TRAIN} {shlex.join(options)}"


def _options(cfg: Config) -> dict[str, Any]:
    """Every training option by its command-line name."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            options |= {
                f"{field.name}.{part.name}": getattr(value, part.name)
                for part in dataclasses.fields(value)
            }
        else:
            options[field.name] = value
    return options


def _as_text(value: Any) -> str:
    """A value in YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
