"""A run's metrics: one JSON object per step in a file, and lines or a progress bar on screen."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from gptjax.errors import FormatError, naming
from gptjax.files import open_file
from gptjax.parallel.devices import device_of
from gptjax.train.optimizer import StepMetrics

LONGEST_LINE = 1 << 16  # bytes; a record takes a few hundred


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The device's peak FLOP/s for model FLOPs utilisation; None if unknown."""
    if dtype != "bfloat16":
        return None
    device = device_of(device_kind)
    return device.flops if device else None


class MetricsFile:
    """``metrics.jsonl``: one JSON object per step, each flushed at once."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for appending, and drop records of steps after ``last_step``, which an interrupted
        run left.
        """
        if path.exists():
            partial = path.with_name(path.name + ".partial")
            with naming(path), open_file(path) as file, partial.open("wb") as kept:
                kept.writelines(
                    line.rstrip(b"\r\n") + b"\n"
                    for line in _lines(file)
                    if _step_of(line) <= last_step
                )
            partial.replace(path)
        self.path = path
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a number that is not finite becomes null.

        Raises:
            OSError: the disk is full; the error names the file.

        """
        with naming(self.path):
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in record.items()
            }
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoMetrics:
    """Stands in for `MetricsFile` in all processes but the first."""

    def write(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """The lines of a file; one longer than any record is split, so that it does not fill memory."""
    return iter(lambda: file.readline(LONGEST_LINE), b"")


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # drop a truncated line, too


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, ordered by step; of several for one step, the last.

    A truncated last line is skipped: a run may be writing it.

    Raises:
        FormatError: another line is not the record of a step.
        OSError: the file cannot be read.

    """
    records = {}
    with open_file(path) as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                record = json.loads(line)
                if not all(
                    value is None or isinstance(value, int | float) for value in record.values()
                ):
                    raise TypeError
                records[int(record["step"])] = record
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
                if (records or line[:1] == b"{") and not line.endswith(b"\n"):
                    break
                raise FormatError(
                    f"{path} is damaged: line {number} is not the record of a step, as in "
                    '{"step": 1, "loss": 10.8}; remove that line'
                ) from error
    return [records[step] for step in sorted(records)]


class Meter:
    """Turns the scalars of a step, still on the device, into its record, once the step is done."""

    def __init__(self, tokens: int, flops: float, peak: float | None) -> None:
        """Take the tokens and FLOPs of one step, and the device's peak FLOP/s if known."""
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.nonfinite = 0
        self.restart()

    def restart(self) -> None:
        """Start timing the next step now, so that work since the last step does not count."""
        self._clock = time.perf_counter()

    def record(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        """The record of a step; waits until the step is done. Afterwards `nonfinite` is the number
        of consecutive skipped updates, up to this step.
        """
        loss, norm, learning_rate, finite = (x.item() for x in jax.device_get(metrics))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        record = {"step": step, "loss": loss, "grad_norm": norm, "lr": learning_rate}
        record |= {"ms": seconds * 1e3, "tokens_per_s": self.tokens / seconds}
        if self.peak:
            record["mfu"] = self.flops / seconds / self.peak
        if not finite:
            record["skipped"] = True
        self.nonfinite = 0 if finite else self.nonfinite + 1
        return record


class ResilientOutput:
    """Standard output that may fail, for example a pipe that is closed: output is then discarded,
    and training goes on.
    """

    def __init__(self) -> None:
        """Wrap stdout; a closed one discards everything."""
        self._stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write the text, or discard it."""
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._surviving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"the output can no longer be written ({error.strerror}); training goes on\n"
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            try:
                os.write(2, told.encode())
            except OSError:
                os.dup2(nowhere, 2)
            os.close(nowhere)


class Display:
    """A progress bar at the foot of a terminal, or plain lines when the output is piped."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        """Prepare a display, which draws nothing before `running`, and never if ``quiet``."""
        self.steps = steps
        self.console = Console(
            file=cast(IO[str], ResilientOutput()),
            highlight=False,
            soft_wrap=True,
            emoji=False,
            quiet=quiet,
        )
        bar = Progress(*self.bar_columns(), console=self.console, transient=True)
        self.bar = bar if self.console.is_terminal else None

    @staticmethod
    def bar_columns() -> tuple[ProgressColumn, ...]:
        """The steps, the bar, tokens a second and the time left, in 80 columns."""
        return (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=28),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )

    @contextlib.contextmanager
    def running(self, done: int) -> Iterator[None]:
        """Show the bar for the block, starting at ``done`` steps; no-op without a terminal."""
        if not self.bar:
            yield
            return
        self.task = self.bar.add_task("", total=self.steps, completed=done)
        with self.bar:
            yield

    def close(self) -> None:
        """Remove the bar and release the terminal."""
        if self.bar:
            self.bar.stop()

    def print(self, text: str) -> None:
        """Print lines above the bar; control characters, which a model may produce, are
        replaced.
        """
        safe = "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
        self.console.print(safe, markup=False)
        self.console.file.flush()

    def step(self, record: dict[str, Any], line: bool) -> None:
        """Report one step: advance the bar, and print a line if ``line``."""
        if self.bar:
            rate = f"{record['tokens_per_s']:,.0f} tok/s"
            self.bar.update(self.task, completed=record["step"], description=rate)
        if line:
            self.print(f"{self.label(record['step'])} | {format_step(record)}")

    def label(self, step: int) -> str:
        """``step   7/100``."""
        return f"step {step:{len(str(self.steps))}}/{self.steps}"


def format_step(record: dict[str, Any]) -> str:
    """``loss 4.1234 | norm 1.02 | lr 6.00e-04 | 612.3 ms | 418 tok/s``, with MFU and validation
    loss if measured.
    """
    parts = [
        f"loss {record['loss']:.4f}",
        f"norm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.2e}",
        f"{record['ms']:.1f} ms",
        f"{record['tokens_per_s']:,.0f} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "val_loss" in record:
        parts.append(f"val loss {record['val_loss']:.4f}")
    if "gradient_error" in record:
        parts.append(f"gradient error {record['gradient_error']:.1e}")
    if "skipped" in record:
        parts.append("not finite: update skipped")
    return " | ".join(parts)


def human_bytes(n: float) -> str:
    """1536 -> ``1.536 KB``, in powers of 1000."""
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"
