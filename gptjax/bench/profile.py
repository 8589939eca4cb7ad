"""Kernel times of JAX's profiler, summed by op, or beside what each kernel takes at least."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.errors import FormatError
from gptjax.parallel.devices import Device
from gptjax.plan.kernels import Kernel, kernels, total

RUNS = 3
STREAM = "Stream #"  # start of the names of the threads that hold a GPU's kernels


class KernelRun(NamedTuple):
    """One run of a kernel."""

    module: str
    """The program's name."""
    op: str
    """The instruction's name; empty if the trace does not give it."""
    start: float
    """Seconds since some moment before all runs."""
    seconds: float


class OpTime(NamedTuple):
    """The kernels of one op, summed."""

    op: str
    seconds: float
    """In one run, summed over threads."""
    kernels: int
    """Their number in one run."""


class TracedKernel(NamedTuple):
    """An instruction as counted and as traced, each for one step."""

    counted: Kernel
    """Without any runs if only the trace has the instruction."""
    launches: float
    """0 if the trace lacks the instruction."""
    seconds: float


def profile(run: Callable[[], Any]) -> list[OpTime]:
    """Profile `RUNS` runs and list the ops, slowest first; raises as `trace` does."""
    return summed(trace(run), RUNS)


def trace(run: Callable[[], Any]) -> list[KernelRun]:
    """Profile `RUNS` runs and list their kernels.

    Raises:
        FormatError: the profiler wrote no trace in the expected format, or one without kernels.

    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(RUNS):
                run()
        found = sorted(Path(folder).rglob("perfetto_trace.json.gz"))
        if not found:
            raise FormatError("JAX's profiler wrote no perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"]
    runs = kernel_runs(events, on_gpu=jax.default_backend() == "gpu")
    if not runs:
        raise FormatError("JAX's profiler recorded no kernels")
    return runs


def kernel_runs(events: list[dict[str, Any]], on_gpu: bool) -> list[KernelRun]:
    """The kernels among the events of a trace: all events of a GPU's streams, elsewhere all events
    with an ``hlo_op``.
    """
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"].startswith(STREAM)
    }
    runs = []
    for event in events:
        args = event.get("args", {})
        # A loop's or a call's name may come before the instruction's own
        op = args.get("hlo_op", "").rpartition("::")[2]
        if event.get("ph") == "X" and ((event["pid"], event["tid"]) in streams if on_gpu else op):
            start, seconds = event["ts"] * 1e-6, event["dur"] * 1e-6
            runs.append(KernelRun(args.get("hlo_module", ""), op, start, seconds))
    return runs


def summed(runs: Iterable[KernelRun], count: int) -> list[OpTime]:
    """Sum the kernels of ``count`` runs by the op's name without its number, slowest first."""
    totals: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        totals[re.sub(r"(\.\d+)+(\.clone)?$", "", run.op) or "unnamed"].append(run.seconds)
    times = [
        OpTime(name, sum(seconds) / count, round(len(seconds) / count))
        for name, seconds in totals.items()
    ]
    return sorted(times, key=lambda t: -t.seconds)


def join(
    texts: Iterable[str], device: Device, runs: Iterable[KernelRun], steps: int
) -> list[TracedKernel]:
    """The instructions of a step's programs with their counted and their traced kernels, and those
    that only the trace has.

    Args:
        texts: the programs' HLO.
        device: whose rates give the least time of each kernel.
        runs: the trace of ``steps`` steps.
        steps: their number.

    """
    counted: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    traced: dict[tuple[str, str], list[float]] = defaultdict(list)
    for text in texts:
        module = text.split(maxsplit=2)[1].rstrip(",")
        for kernel in kernels(text, device):
            counted[module, kernel.name].append(kernel)
    for run in runs:
        traced[run.module, run.op].append(run.seconds)
    found = []
    for key in counted | traced:
        kernel = Kernel("not counted", "elsewhere", 0, 0, 0, 0, name=key[1])
        if key in counted:
            kernel = total(counted[key])
        seconds = traced.get(key, [])
        found.append(TracedKernel(kernel, len(seconds) / steps, sum(seconds) / steps))
    return found


def busy(runs: Iterable[KernelRun]) -> tuple[float, float]:
    """(seconds in which any kernel runs, seconds from the first kernel's start to the last's end)
    of one or more runs.
    """
    spans = sorted((run.start, run.start + run.seconds) for run in runs)
    running, end = 0.0, spans[0][0]
    for start, stop in spans:
        running += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return running, end - spans[0][0]
