"""Run the parts of a benchmark, each in a process of its own with a time limit, so that one that
fails or hangs costs the others nothing.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import cli
from gptjax.files import read_text, write_whole

MAIN = "from gptjax.bench.parts import main; main()"
KEPT, SHOWN, WIDTH = 50, 8, 300  # last lines of a failed part's error; characters of each
LARGEST = 2**26  # bytes of a part's figures

Tell = Callable[[dict[str, Any]], None]


class BenchPart(NamedTuple):
    """One part of a benchmark."""

    name: str
    run: Callable[[Any, Tell], None]
    """Called with the configuration and a function that keeps figures, as soon as they are known.
    Like the configuration it is pickled."""
    seconds: float
    """Its share of the time. A part may also use what those before it have left."""
    xla_flags: str = ""
    """Added to ``XLA_FLAGS``."""


def run_parts(parts: Sequence[BenchPart], cfg: Any, keep: Tell) -> tuple[int, dict[str, Any]]:
    """Run the parts one after the other. They print their tables themselves.

    Args:
        parts: the first checks what all need: if it ends with `cli.BAD_INPUT`, no other is run.
        cfg: the configuration of all.
        keep: is called after each part with all figures so far, by part.

    Returns:
        The exit status (0, 1 if a part has failed, or `cli.BAD_INPUT`), and all figures.

    """
    began, due = time.monotonic(), 0.0
    record: dict[str, Any] = {}
    for part in parts:
        due += part.seconds
        print(f"--- {part.name}", flush=True)
        found = run_part(part, cfg, began + due - time.monotonic())
        if error := found["error"]:
            shown = (line[:WIDTH] for line in error[-SHOWN:])
            print("\n".join(shown), file=sys.stderr, flush=True)
        if not record and found["status"] == cli.BAD_INPUT:
            return cli.BAD_INPUT, record
        record[part.name] = found
        keep(record)
    return int(any(found["error"] for found in record.values())), record


def run_part(part: BenchPart, cfg: Any, limit: float) -> dict[str, Any]:
    """Run one part; returns its figures with ``seconds``, ``status`` (the exit status, None if it
    ran out of time) and ``error`` (its last lines if it failed).
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        file = Path(folder) / "figures.json"
        status, last = None, f"{part.name} was stopped after {limit:.0f} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = subprocess.run(
                [sys.executable, "-u", "-c", MAIN, str(file)],
                input=pickle.dumps((part.run, cfg)),
                stderr=said,
                env=os.environ | ({"XLA_FLAGS": flags} if flags else {}),
                timeout=limit,
            ).returncode
            last = f"{part.name} ended with exit status {status}"
        said.seek(0)
        lines = [line.rstrip() for line in said if line.strip()][-KEPT:]
        found = json.loads(read_text(file, LARGEST)) if file.exists() else {}
    # A person's mistake is one sentence, which says all
    error = [] if status == 0 else lines if status == cli.BAD_INPUT else [*lines, last]
    return found | {"seconds": time.monotonic() - began, "status": status, "error": error}


def main() -> None:
    """Run the part that stdin names, and keep its figures in the file that the first argument
    names.
    """
    kept: dict[str, Any] = {}

    def keep(figures: dict[str, Any]) -> None:
        kept.update(figures)
        with write_whole(Path(sys.argv[1])) as out:
            out.write(json.dumps(kept).encode())

    with cli.reported_errors("python -m gptjax.bench"):
        run, cfg = pickle.load(sys.stdin.buffer)
        cli.reuse_freed_memory()
        run(cfg, keep)
