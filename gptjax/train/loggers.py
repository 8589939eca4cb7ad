"""TensorBoard and Weights & Biases loggers: a run's metrics, samples and configuration.

Resuming and plotting read ``metrics.jsonl`` alone. These loggers are extras, imported only if a run
asks for them. One that fails during training is dropped, and training goes on.
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

# Chart names; both programs group charts by the part before the slash.
CHARTS = {
    "val_loss": "val/loss",
    "ms": "speed/ms",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
}
ID_FILE = "wandb_id"


class Logger(Protocol):
    """A logger that gets a run's metrics in addition to ``metrics.jsonl``."""

    title: str

    def write(self, record: dict[str, Any]) -> None:
        """Log the record of a step, the same that ``MetricsFile.write`` gets."""

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text that belongs to a step."""

    def close(self, failed: bool) -> None:
        """End the log; ``failed`` if the run ended with an error."""


class TensorBoard:
    """Event files in a folder, a new one each time training starts, flushed at every step.

    TensorBoard's own `EventFileWriter` writes from a thread, which loses events when the process is
    killed and reports a full disk late.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, done: int, config: dict[str, Any]) -> None:
        """Start a file; TensorBoard then drops earlier events of steps after ``done``, which an
        interrupted run left.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text_summary = Event, Summary, text_pb
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in order of their names
        self._file = (
            folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        ).open("xb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=done + 1 if done else 0, session_log=SessionLog(status=SessionLog.START))
        self.text("config", yaml.safe_dump(config, sort_keys=False), done)

    def write(self, record: dict[str, Any]) -> None:
        """Log all numbers of a step as one event."""
        values = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in _charts(record).items()
        ]
        self._add(step=record["step"], summary=self._summary(value=values))

    def text(self, name: str, text: str, step: int) -> None:
        """Log the text, indented so that TensorBoard's Markdown shows it unchanged."""
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
    """A Weights & Biases run, named after the run's folder, with its files under ``FOLDER/wandb``.

    The folder keeps the run's id, under which a resumed run continues. W&B cannot replace logged
    steps: those that an interrupted run logged after its last checkpoint stay as they were.
    Environment variables configure the rest: ``WANDB_MODE=offline`` keeps everything on disk, for
    ``wandb sync``; ``WANDB_API_KEY``, ``WANDB_TAGS``...
    """

    title = "Weights & Biases"

    def __init__(self, project: str, folder: Path, done: int, config: dict[str, Any]) -> None:
        """Start or continue the W&B run.

        Args:
            project: PROJECT or ENTITY/PROJECT.
            folder: the run's folder.
            done: steps done before.
            config: shown next to the charts.

        Raises:
            ConfigError: W&B is not logged in or the network is down.

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
        except Exception as error:  # W&B and the network raise many kinds
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if empty
            reason = str(error).rstrip(".")
            raise ConfigError(
                f"log.wandb {project} cannot start ({reason}): run `wandb login`, "
                "or set WANDB_MODE=offline to keep the log on disk"
            ) from error
        kept.write_text(self._run.id + "\n")
        self._html = wandb.Html

    def write(self, record: dict[str, Any]) -> None:
        """Log all numbers of a step."""
        self._log(_charts(record), record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """Log the text with its line breaks."""
        self._log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step)

    def close(self, failed: bool) -> None:
        """Wait until everything is uploaded; a second Ctrl-C ends the wait."""
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
    """The loggers of a run, none by default. One that fails is dropped with a warning."""

    def __init__(self, loggers: list[Logger], warn: Callable[[str], None]) -> None:
        """Take the loggers; ``warn`` gets one line about each that fails."""
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
            except Exception as error:  # a logger's failure must not stop training
                self._loggers.remove(logger)
                reason = " ".join(str(error).split()) or type(error).__name__
                self._warn(
                    f"{logger.title} failed and is no longer used: {reason}; metrics.jsonl has "
                    "every step"
                )


def check_installed(cfg: LogConfig) -> None:
    """Check, before anything is downloaded or compiled, that the packages of ``cfg`` are installed.

    Raises:
        ConfigError: a package is missing.

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
    """Open the loggers of ``cfg`` for the run in ``folder`` after ``done`` steps; processes other
    than the first have none.

    Raises:
        ConfigError: Weights & Biases is not logged in or the network is down.
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
