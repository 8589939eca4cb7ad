"""All that can be measured of training on one device, to check what was counted without it."""

import dataclasses
import operator
import os
from functools import partial
from typing import Any

import jax

from gptjax.bench import ceiling, steps, torch_peer
from gptjax.bench.parts import BenchPart, Tell
from gptjax.bench.profile import RUNS, busy, join, trace
from gptjax.bench.program import BACKWARDS
from gptjax.bench.report import figures, print_timings, print_traced, table
from gptjax.bench.timing import Contender, time_interleaved
from gptjax.config import Backward, BenchConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.parallel.devices import device_of
from gptjax.plan.kernels import REACHED, kernels, summed, total
from gptjax.train.metrics import human_bytes
from gptjax.xla.backend import platform_name, start_jax

# The work that README's figures of an H100 are of
DEFAULTS = (
    *("--model.preset", "124m", "--model.vocab_size", "50257"),
    *("--model.dtype", "bfloat16", "--model.attention", "cudnn"),
    *("--data.batch_size", "16", "--data.seq_len", "1024"),
)
DECODE_ROUNDS = 3


def open_device(cfg: BenchConfig) -> tuple[ModelConfig, int]:
    """Start JAX; returns the model as this device computes it, and the tokens of a step.

    Raises:
        ConfigError: JAX cannot start, or the model does not fit the device or the sequence.

    """
    start_jax(cfg.model.dtype)
    model = cfg.model.resolve(platform_name(), cfg.data.seq_len)
    return model, cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len


def one_step(cfg: BenchConfig, backward: Backward) -> Contender:
    """The training step, compiled for this device."""
    train = dataclasses.replace(cfg.train, backward=backward)
    return next(steps.step_contenders(dataclasses.replace(cfg, train=train), compare=False))


def measure_device(cfg: BenchConfig, tell: Tell) -> None:
    """Print what the device is, and its rates beside the data sheet's."""
    model, tokens = open_device(cfg)
    kind = jax.devices()[0].device_kind
    print(
        f"{platform_name()} ({kind}), {os.cpu_count()} cores, jax {jax.__version__}, "
        f"{model.dtype}, attention {model.attention}, layers {model.layers}, {tokens:,} tokens"
    )
    best, sheet = ceiling.measure(model, tokens // cfg.optim.accumulate), device_of(kind)
    for what, rate, unit, known in (
        ("products", best.flops / 1e12, "TFLOP/s", sheet and sheet.flops / 1e12),
        ("memory", best.bandwidth / 1e9, "GB/s", sheet and sheet.bandwidth / 1e9),
    ):
        share = f"{rate / known:.0%} of the data sheet's" if known else "no data sheet known"
        print(f"{what:<24} {rate:,.1f} {unit} measured, {share}")
    print(f"{'counted with':<24} {REACHED:.0%} of the products' rate and all of the memory's")
    tell({"kind": kind, "jax": jax.__version__, "tokens": tokens} | best._asdict())


def measure_step(cfg: BenchConfig, tell: Tell, backward: Backward) -> None:
    """Compile the step, count its kernels, time it, and compare its memory with the plan's."""
    model, tokens = open_device(cfg)
    device = ceiling.device_rates(model, tokens // cfg.optim.accumulate)
    contender = one_step(cfg, backward)
    found = [k for p in contender.programs for k in kernels(p.as_text() or "", device)]
    whole = total(found)
    row: dict[str, Any] = {"name": contender.name, "programs": len(contender.programs)}
    row |= contender.facts | {
        "kernels": whole.times,
        "nbytes": whole.read + whole.written,
        "flops": whole.flops,
        "least_ms": whole.seconds * 1e3,
    }
    print(table([row]))
    print(f"{'at best':<24} {tokens / whole.seconds:,.0f} tokens/s")
    kinds = summed(found, operator.attrgetter("kind"))
    tell({"counted": row, "kinds": {name: kind._asdict() for name, kind in kinds.items()}})

    (timing,) = time_interleaved([contender], cfg.rounds)
    ideal = ceiling.peak_seconds(model, tokens, cfg.data.seq_len)
    # Before anything else allocates
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    timed = figures(timing, timing, tokens, None, ideal)
    print(table([timed]))
    planned = contender.facts["total_bytes"]
    reported = f"{human_bytes(peak)}, {peak / planned:.2f} of that" if peak else "not reported"
    print(f"{'memory':<24} {human_bytes(planned)} planned; peak {reported}")
    tell({"timed": timed, "planned_bytes": planned, "peak_bytes": peak})


def trace_step(cfg: BenchConfig, tell: Tell) -> None:
    """Print the profiler's kernel times beside the least times, and the share of time without any
    kernel, for each backward.
    """
    model, tokens = open_device(cfg)
    device = ceiling.device_rates(model, tokens // cfg.optim.accumulate)
    for backward in BACKWARDS:
        contender = one_step(cfg, backward)
        (timing,) = time_interleaved([contender], cfg.rounds)
        runs = trace(contender.run)
        texts = [program.as_text() or "" for program in contender.programs]
        record = print_traced(backward, join(texts, device, runs, RUNS))
        running, span = (seconds * 1e3 / RUNS for seconds in busy(runs))
        print(
            f"{'without a kernel':<24} {1 - running / span:.1%} of {span:.2f} ms a step; "
            f"{timing.median * 1e3:.2f} ms without the profiler"
        )
        times = {"busy_ms": running, "span_ms": span, "untraced_ms": timing.median * 1e3}
        tell({backward: record | times})


def measure_decoding(cfg: BenchConfig, tell: Tell) -> None:
    """Time decoding at batch 1, beside the floor of reading the weights."""
    model, _ = open_device(cfg)
    found = list(steps.decode_contenders(cfg, ("as_stored", "bfloat16")))
    timings = time_interleaved(found, min(cfg.rounds, DECODE_ROUNDS))
    best = ceiling.measure(model, cfg.data.batch_size * cfg.data.seq_len)
    floor = steps.NEW_TOKENS * ceiling.decode_floor(model, best)
    tell(print_timings(timings, steps.NEW_TOKENS, best, floor, None))


def measure_torch(cfg: BenchConfig, tell: Tell) -> None:
    """Time the same step by ``torch.compile``, if PyTorch and transformers are installed."""
    precision = "float32" if cfg.model.dtype == "float32" else "bfloat16"
    try:
        found = list(torch_peer.step_contenders(cfg, ("compile",), (precision,)))
    except ConfigError as error:
        print(f"skipped: {error}")
        return
    (timing,) = time_interleaved(found, cfg.rounds)
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    timed = figures(timing, timing, tokens, None, None)
    print(table([timed]))
    tell({"timed": timed})


# Seconds add up to less than 8 minutes. A trace names no instruction of a kernel that runs in a
# CUDA graph (XLA's command buffers).
PARTS = (
    BenchPart("device", measure_device, 40),
    *(BenchPart(way, partial(measure_step, backward=way), 80) for way in BACKWARDS),
    BenchPart("profile", trace_step, 105, "--xla_gpu_enable_command_buffer="),
    BenchPart("decode", measure_decoding, 75),
    BenchPart("torch", measure_torch, 80),
)


def print_summary(record: dict[str, Any]) -> None:
    """Print the rows of all steps that were timed, which do the same work, beside the first."""
    rows = [found["timed"] for found in record.values() if "timed" in found]
    for row in rows:
        row["ratio"] = row["ms"] / rows[0]["ms"]
        if "mfu" in rows[0]:
            row["mfu"] = rows[0]["mfu"] / row["ratio"]
    if rows:
        print("--- the step")
        print(table(rows))
