"""Time the real work of a configuration: ``python -m gptjax.bench --config configs/124m.yaml``.

The training step by default, ``--what decode`` decoding, ``--what data`` the corpus, ``--what loop`` what training does beside
its steps; ``--what program`` times nothing and counts the step's operations as lowered for ``--platform cuda``, which need not
be here. ``--compare`` adds the other ways that the step can be computed, ``--peer torch`` the same work in PyTorch. All run
in turns, so that a noisy machine disturbs all alike. The floor is the step's matrix products at the rate of one, and one pass
of AdamW over memory, both measured now; of decoding, reading all weights once a token. The batch is random ids, the weights
are fresh ones.
"""

import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import jax

from gptjax import cli
from gptjax.bench import ceiling, data, loop, program, steps, torch_peer
from gptjax.bench.profile import OpTime, profile
from gptjax.bench.timing import Timing, in_turns
from gptjax.cli.options import parse
from gptjax.config import BenchConfig
from gptjax.datasets import find_corpus, vocabulary, vocabulary_without_corpus
from gptjax.datasets.batches import BatchShape
from gptjax.errors import ConfigError, naming
from gptjax.models.params import flops_per_token
from gptjax.train.metrics import human_bytes, peak_flops
from gptjax.xla.backend import platform_name, start_jax

PROG = "python -m gptjax.bench"
OPS = 12  # lines of a profile


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        cfg, _ = parse(BenchConfig, PROG, __doc__ or "", argv)
        cfg = dataclasses.replace(cfg, what="decode") if cfg.decode else cfg
        if cfg.json and not Path(cfg.json).absolute().parent.is_dir():
            raise ConfigError(f"{cfg.json} cannot be written: there is no folder {Path(cfg.json).absolute().parent}")
        if not cfg.model.vocab_size and cfg.what in ("step", "decode", "program"):  # the others read the corpus
            size, whose = vocabulary_without_corpus(cfg.data.tokenizer)
            print(f"vocabulary of {size:,} ids, of {whose}")
            cfg = dataclasses.replace(cfg, model=cfg.model.with_vocabulary(size))
        cli.keep_freed_memory()
        if cfg.what == "data":
            record = time_data(cfg)
        elif cfg.what == "loop":
            record = time_loop(cfg)
        elif cfg.what == "program":
            record = count_program(cfg)
        else:
            if cfg.peer == "torch":
                os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave a GPU's memory to both
            start_jax(cfg.model.dtype)
            record = time_model(cfg)
        if cfg.json:
            with naming(cfg.json):
                Path(cfg.json).write_text(json.dumps(record, indent=1) + "\n")
            print(f"wrote {cfg.json}")
    return 0


def time_model(cfg: BenchConfig) -> dict[str, Any]:
    """Print a row for each contender; returns all figures.

    Raises:
        GptjaxError: the model does not fit the sequence, or the peer is not installed.

    """
    model = cfg.model.resolve(platform_name(), min(cfg.data.seq_len, cfg.model.max_seq_len))
    if cfg.what == "step":
        tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
        ours, theirs = steps.step_contenders(cfg, cfg.compare), torch_peer.step_contenders
    else:
        tokens, ours, theirs = steps.NEW, steps.decode_contenders(cfg), torch_peer.decode_contenders
    device = f"{platform_name()} ({jax.devices()[0].device_kind}), {os.cpu_count()} cores"
    print(f"{device}, jax {jax.__version__}, {model.dtype}, {tokens:,} tokens", flush=True)
    rivals = theirs(cfg) if cfg.peer == "torch" else iter(())
    timings = in_turns([*ours, *rivals], cfg.rounds)
    best = ceiling.measure(model, min(tokens, cfg.data.batch_size * cfg.data.seq_len))
    if cfg.what == "step":
        floor = ceiling.step_floor(model, tokens, cfg.data.seq_len, best)
        peak = peak_flops(jax.devices()[0].device_kind, model.dtype)
    else:
        floor, peak = tokens * ceiling.decode_floor(model, best), None
    work = tokens * flops_per_token(model, cfg.data.seq_len)
    rows = [figures(timing, timings[0], tokens, floor, work / peak if peak else None) for timing in timings]
    print(table(rows))
    rate = f"{best.flops / 1e9:,.0f} GFLOP/s, {best.bandwidth / 1e9:,.1f} GB/s, {best.reading / 1e9:,.1f} GB/s where only read"
    print(f"{'floor':<24} {floor * 1e3:.1f} ms at {rate}")
    record = {"device": device, "jax": jax.__version__, "tokens": tokens, "floor_ms": floor * 1e3} | best._asdict()
    record["rows"] = rows
    if cfg.profile:
        times = profile(timings[0].contender.run)
        print(profile_table(times))
        record["profile"] = [time._asdict() for time in times]
    return record


def figures(timing: Timing, first: Timing, tokens: int, floor: float, ideal: float | None) -> dict[str, Any]:
    """One row, in numbers."""
    row = {"name": timing.contender.name} | timing.contender.facts
    row |= {"ms": timing.median * 1e3, "spread": timing.spread, "tokens_per_s": tokens / timing.median}
    row |= {"of_floor": timing.median / floor, "ratio": timing.median / first.median}
    return row if ideal is None else row | {"mfu": ideal / timing.median}


def table(rows: list[dict[str, Any]], ratio: str = ".2f") -> str:
    """A line for each row; what no row has is left out."""
    columns = {
        "": ("name", 24, str),
        "compile s": ("compile_s", 9, "{:.1f}".format),
        "temporaries": ("temporary_bytes", 11, human_bytes),
        "in all": ("total_bytes", 9, human_bytes),
        "ms": ("ms", 9, "{:.1f}".format),
        "spread": ("spread", 6, "{:.0%}".format),
        "tokens/s": ("tokens_per_s", 9, "{:,.0f}".format),
        "MFU": ("mfu", 6, "{:.1%}".format),
        "/ floor": ("of_floor", 7, "{:.2f}".format),
        "ratio": ("ratio", 5, f"{{:{ratio}}}".format),
    }
    shown = {head: column for head, column in columns.items() if any(column[0] in row for row in rows)}

    def line(cells: list[str]) -> str:
        widths = [width for _, width, _ in shown.values()]
        return " ".join([f"{cells[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))])

    def cell(row: dict[str, Any], key: str, form: Any) -> str:
        return form(row[key]) if key in row else "-"

    body = [line([cell(row, key, form) for key, _, form in shown.values()]) for row in rows]
    return "\n".join([line(list(shown)), *body])


def profile_table(times: list[OpTime]) -> str:
    """The ops that take the longest, and the rest in one line."""
    total = sum(time.seconds for time in times)
    top, rest = times[:OPS], times[OPS:]
    if rest:
        top = [*top, OpTime(f"{len(rest)} more", sum(t.seconds for t in rest), sum(t.kernels for t in rest))]
    lines = [f"{'op':<44} {'ms':>9} {'share':>6} {'kernels':>7}"]
    lines += [f"{t.op[:44]:<44} {t.seconds * 1e3:>9.1f} {t.seconds / total:>6.1%} {t.kernels:>7,}" for t in top]
    return "\n".join(lines)


def time_loop(cfg: BenchConfig) -> dict[str, Any]:
    """Print milliseconds a step, with the spread of the rounds and the ratio to the steps alone.

    Raises:
        GptjaxError: the run cannot be set up as configured.

    """
    count = loop.length(cfg)
    with loop.contenders(cfg) as found:
        timings = in_turns(found, cfg.rounds)
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    rows: list[dict[str, Any]] = []
    for timing in timings:
        seconds = timing.median / count
        ratio = timing.median / timings[0].median
        rows.append({"name": timing.contender.name, "ms": seconds * 1e3, "spread": timing.spread})
        rows[-1] |= {"tokens_per_s": tokens / seconds, "ratio": ratio}
    print(f"{platform_name()} ({jax.devices()[0].device_kind}), {os.cpu_count()} cores, {count} steps of {tokens:,} tokens")
    print(table(rows, ".3f"))
    return {"steps": count, "tokens": tokens, "rows": rows}


def count_program(cfg: BenchConfig) -> dict[str, Any]:
    """Print each operation with how often it runs and the gigabytes of its results, for both backwards.

    Raises:
        GptjaxError: the model does not fit the sequence or the platform.

    """
    start_jax(cfg.model.dtype)
    platform = cfg.platform or platform_name()
    model = cfg.model.resolve(platform, cfg.data.seq_len)
    if model.attention == "cudnn" and platform_name() != "cuda":  # JAX asks for cuDNN's version when it traces
        model = dataclasses.replace(model, attention="blockwise")
    found = {way: program.lowered_step(cfg, model, way, platform) for way in ("manual", "autodiff")}
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    print(f"lowered for {platform}, {model.dtype}, attention {model.attention}, layers {model.layers}, {tokens:,} tokens")
    print(f"{'operation':<24}" + "".join(f" {way:>8} {'GB':>7}" for way in found))
    names = sorted(set().union(*(ops.times for ops in found.values())), key=lambda n: -max(o.nbytes[n] for o in found.values()))
    for name in names:
        print(f"{name:<24}" + "".join(f" {o.times[name]:>8,} {o.nbytes[name] / 1e9:>7.2f}" for o in found.values()))
    return {
        way: {name: {"times": ops.times[name], "nbytes": ops.nbytes[name]} for name in ops.times} for way, ops in found.items()
    }


def time_data(cfg: BenchConfig) -> dict[str, Any]:
    """Print tokens a second of each way, with the spread of its rounds and the ratio to the first.

    Raises:
        GptjaxError: the corpus cannot be had.

    """
    chosen = cfg.data
    corpus = find_corpus(chosen.dataset, chosen.root, chosen.tokenizer, chosen.column, chosen.tokens)
    cfg = dataclasses.replace(cfg, model=cfg.model.with_vocabulary(vocabulary(corpus)))
    shape = BatchShape(cfg.optim.accumulate, chosen.batch_size, chosen.seq_len)
    parts = {"tokens to batches": data.loading(corpus.train, shape, chosen.order, cfg.model.vocab_size, cfg.rounds)}
    if corpus.tokenizer:
        parts = {"text to tokens": data.tokenizing(corpus.tokenizer, corpus.train, cfg.rounds)} | parts
    start_jax(cfg.model.dtype)
    (step,) = in_turns(list(steps.step_contenders(cfg, False)), cfg.rounds)
    eaten = shape.accumulate * shape.batch_size * shape.seq_len
    parts["the training step"] = {step.contender.name: [eaten / seconds for seconds in step.seconds]}
    print(f"{corpus.folder}, {os.cpu_count()} cores, batches of {shape.accumulate} x {shape.batch_size} x {shape.seq_len}")
    record: dict[str, Any] = {}
    for part, ways in parts.items():
        first = statistics.median(next(iter(ways.values())))
        print(f"{part:<18} {'tokens a second':>16} {'spread':>8} {'ratio':>6}")
        for name, rates in ways.items():
            median = statistics.median(rates)
            spread = (max(rates) - min(rates)) / median
            print(f"{name:<18} {median:>16,.0f} {spread:>8.0%} {median / first:>6.2f}")
            record.setdefault(part, {})[name] = {"tokens_per_s": median, "spread": spread}
    return record


if __name__ == "__main__":
    sys.exit(main())
