"""Kernel times of JAX's profiler, summed by op."""

import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.errors import FormatError

RUNS = 3


class OpTime(NamedTuple):
    """The kernels of one op, summed."""

    op: str
    seconds: float
    """In one run, summed over threads."""
    kernels: int
    """Their number in one run."""


def profile(run: Callable[[], Any]) -> list[OpTime]:
    """Profile `RUNS` runs and list the ops, slowest first.

    Raises:
        FormatError: the profiler wrote no trace in the expected format.

    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(RUNS):
                run()
        found = sorted(Path(folder).rglob("perfetto_trace.json.gz"))
        if not found:
            raise FormatError("JAX's profiler wrote no perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"]
    return summed(events, RUNS)


def summed(events: list[dict[str, Any]], runs: int) -> list[OpTime]:
    """Sum the durations of kernels, the events with an ``hlo_op``, by the op's name without its
    number.
    """
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        op = event.get("args", {}).get("hlo_op")
        if op and event.get("ph") == "X":
            name = re.sub(r"(\.\d+)+(\.clone)?$", "", op)
            seconds, count = totals.get(name, (0.0, 0))
            totals[name] = seconds + event["dur"] * 1e-6, count + 1
    times = [
        OpTime(name, seconds / runs, round(count / runs))
        for name, (seconds, count) in totals.items()
    ]
    return sorted(times, key=lambda t: -t.seconds)
