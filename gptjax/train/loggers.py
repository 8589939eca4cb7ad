"""TensorBoard and Weights & Biases beside ``metrics.jsonl``: the same numbers, the samples and the
configuration.

``metrics.jsonl`` stays what resuming and plotting read. These are extras, imported only where a run
asks for them; one that fails in the middle of training is left out from then on, and training goes
on.
"""

import contextlib
import html
import importlib
import os
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import yaml

from gptjax.config import LogConfig
from gptjax.errors import ConfigError
from gptjax.files import read_text

# The chart of each number: both programs group charts by what stands before the slash.
CHARTS = {
    "val_loss": "val/loss",
    "ms": "speed/ms",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
}
ID_FILE = "wandb_id"


class Logger(Protocol):
    """A place besides ``metrics.jsonl`` that a run reports to."""

    title: str

    def write(self, record: dict[str, Any]) -> None:
        """Log the record of a step, as ``MetricsFile.write`` gets it."""

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text that belongs to a step."""

    def close(self, failed: bool) -> None:
        """End the log of a run that was done or stopped, or failed."""


class TensorBoard:
    """Events in a folder, one file each time that training starts, each step on disk as soon as it
    is known.

    TensorBoard's `EventFileWriter` writes from a thread, so that a kill loses what it holds and a
    full disk shows late; this writes the same records at once.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, done: int, config: dict[str, Any]) -> None:
        """Start a file; TensorBoard drops earlier events of steps after ``done``, left by a run
        that was cut off.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text_summary = Event, Summary, text_pb
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        self._file = (
            folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        ).open("xb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=done + 1 if done else 0, session_log=SessionLog(status=SessionLog.START))
        self.text("config", yaml.safe_dump(config, sort_keys=False), done)

    def write(self, record: dict[str, Any]) -> None:
        """All numbers of a step as one event."""
        values = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in _charts(record).items()
        ]
        self._add(step=record["step"], summary=self._summary(value=values))

    def text(self, name: str, text: str, step: int) -> None:
        """The text as it is: TensorBoard renders Markdown, in which indented lines are code."""
        self._add(
            step=step,
            summary=self._text_summary(name, textwrap.indent(text, "    ", lambda _: True)),
        )

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """A run of Weights & Biases, its files under ``FOLDER/wandb``, named as the folder.

    The run's id is kept in the folder, and a resumed run goes on under it. W&B cannot take steps
    back: those that it has had already, from a run that was cut off after its last checkpoint, stay
    as they were. The environment says the rest: ``WANDB_MODE=offline`` keeps everything on disk,
    for ``wandb sync``; ``WANDB_API_KEY``, ``WANDB_TAGS``...
    """

    title = "Weights & Biases"

    def __init__(self, project: str, folder: Path, done: int, config: dict[str, Any]) -> None:
        """Start or go on with the run.

        Args:
            project: its name, or ENTITY/PROJECT.
            folder: the run's.
            done: steps done before.
            config: shown beside the charts.

        Raises:
            ConfigError: there is no login or no network.

        """
        import wandb

        kept = folder / ID_FILE
        run_id = read_text(kept, 1 << 10).strip() if done and kept.exists() else None
        entity, _, name = project.rpartition("/")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=name,
                entity=entity or None,
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=config,
                allow_val_change=True,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except Exception as error:  # its own, of several kinds, and the network's
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it, as before
            reason = str(error).rstrip(".")
            raise ConfigError(
                f"log.wandb {project} cannot start ({reason}): run `wandb login`, "
                "or set WANDB_MODE=offline to keep the log on disk"
            ) from error
        kept.write_text(self._run.id + "\n")
        self._html = wandb.Html

    def write(self, record: dict[str, Any]) -> None:
        """All numbers of a step."""
        self._log(_charts(record), record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """The text as it is, with its line ends."""
        self._log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step)

    def close(self, failed: bool) -> None:
        """Wait until all is uploaded; a second Ctrl-C leaves it."""
        self._run.finish(exit_code=int(failed))

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._run.starting_step:
            self._run.log(values, step=step)


def _charts(record: dict[str, Any]) -> dict[str, float]:
    return {
        CHARTS.get(key, f"train/{key}"): float(value)
        for key, value in record.items()
        if key != "step"
    }


class Loggers:
    """All the loggers of a run, none by default. One that fails is dropped with a warning."""

    def __init__(self, loggers: list[Logger], warn: Callable[[str], None]) -> None:
        """``warn`` is told, in one line each, which logger failed."""
        self._loggers, self._warn = loggers, warn

    def write(self, record: dict[str, Any]) -> None:
        """Log the record of a step."""
        self._each(lambda logger: logger.write(record))

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text that belongs to a step."""
        self._each(lambda logger: logger.text(name, text, step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._each(lambda logger: logger.close(failed=kind is not None))

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:  # whatever goes wrong in there, training goes on
                self._loggers.remove(logger)
                reason = " ".join(str(error).split()) or type(error).__name__
                self._warn(
                    f"{logger.title} failed and is left out from here on: {reason}; metrics.jsonl "
                    "has every step"
                )


def check_installed(cfg: LogConfig) -> None:
    """Fail early, before anything is downloaded or compiled.

    Raises:
        ConfigError: a package that ``cfg`` needs is missing.

    """
    for package, wanted in (("tensorboard", cfg.tensorboard), ("wandb", cfg.wandb)):
        try:
            if wanted:
                importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"log.{package} needs {error.name}: pip install 'gptjax[{package}]'"
            ) from error


def open_loggers(
    cfg: LogConfig, folder: Path, done: int, config: dict[str, Any], warn: Callable[[str], None]
) -> Loggers:
    """The loggers that ``cfg`` asks for, of the run in ``folder``, after ``done`` steps; none in
    any process but the first.

    Raises:
        ConfigError: Weights & Biases has no login or no network.
        OSError: the folder cannot be written.

    """
    loggers: list[Logger] = []
    if jax.process_index() != 0:
        return Loggers(loggers, warn)
    if cfg.wandb:
        loggers.append(WeightsAndBiases(cfg.wandb, folder, done, config))
    if cfg.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", done, config))
    return Loggers(loggers, warn)
