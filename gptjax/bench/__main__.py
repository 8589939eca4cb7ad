"""Time the real work of a configuration: ``python -m gptjax.bench --config configs/124m.yaml``.

``--what`` chooses the work: the training step (the default), ``decode`` for sampling, ``data`` for
tokenizing and batching the corpus, ``loop`` for the overhead of the training loop. ``--compare``
adds the other ways to compute the step, ``--peer`` the same work in PyTorch. ``--what decode
--checkpoint FILE.gguf`` decodes that model in 4 and 8 bits and in float32, ``--peer
llama.cpp,ctranslate2,transformers`` also with those. Contenders run
interleaved, one round after another, so that a noisy machine disturbs all alike. The batch is
random ids and the weights are fresh.
The floor is measured in the same run: for a step, its matrix products at the rate of one large
product, and one pass of AdamW over memory; for decoding, one read of all weights a token.

``--what program`` times nothing. It counts the step's operations as lowered for ``--platform``,
without needing that hardware. Where JAX's plugin for cuda is installed (``gptjax[cuda-aot]``), it
compiles the step for an H100 and adds up the kernels instead: bytes, FLOPs, and the least time if
they run one after the other; for tpu, where libtpu is (``gptjax[tpu]``), XLA counts the bytes.
``--hlo FOLDER`` keeps the compiled programs, for this CPU too.
``--what gpu`` measures one GPU whole, in 8 minutes.
"""

import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import cli
from gptjax.bench import ceiling, data, decoders, gpu_day, loop, program, steps, torch_peer
from gptjax.bench.parts import run_parts
from gptjax.bench.profile import profile
from gptjax.bench.report import print_kernels, print_timings, profile_table, table
from gptjax.bench.timing import Contender, time_interleaved
from gptjax.cli.options import last_value, parse
from gptjax.config import BenchConfig, Config
from gptjax.convert.weights import open_weights
from gptjax.datasets import find_corpus, vocabulary, vocabulary_without_corpus
from gptjax.datasets.batches import BatchShape
from gptjax.errors import ConfigError, naming
from gptjax.plan.kernels import Kernel, kernels
from gptjax.plan.topology import Topology, open_devices, parse_topology, start
from gptjax.train.metrics import human_bytes
from gptjax.xla import native
from gptjax.xla.backend import platform_name, start_jax

PROG = "python -m gptjax.bench"
UNUSED = ("--model.preset", "124m")  # a model has to be given, but a checkpoint has its own


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        given = sys.argv[1:] if argv is None else argv
        if last_value(given, "--checkpoint"):
            given = [*UNUSED, *given]
        if last_value(given, "--what") == "gpu" and not last_value(given, "--config"):
            given = [*gpu_day.DEFAULTS, *given]
        cfg, _ = parse(BenchConfig, PROG, __doc__ or "", given)
        cfg = dataclasses.replace(cfg, what="decode") if cfg.decode else cfg
        if cfg.json and not Path(cfg.json).absolute().parent.is_dir():
            raise ConfigError(
                f"{cfg.json} cannot be written: there is no folder "
                f"{Path(cfg.json).absolute().parent}"
            )
        # The other modes read the corpus, or have a checkpoint
        fresh = cfg.what in ("step", "decode", "program", "gpu") and not cfg.checkpoint
        if not cfg.model.vocab_size and fresh:
            size, whose = vocabulary_without_corpus(cfg.data.dataset, cfg.data.tokenizer)
            print(f"vocabulary of {size:,} ids, of {whose}")
            cfg = dataclasses.replace(cfg, model=cfg.model.with_vocabulary(size))
        cli.reuse_freed_memory()
        status = 0
        if cfg.what == "gpu":
            status, record = measure_gpu(cfg)
        elif cfg.what == "data":
            record = time_data(cfg)
        elif cfg.what == "loop":
            record = time_loop(cfg)
        elif cfg.what == "program":
            record = study_program(cfg)
        elif cfg.checkpoint:
            record = time_decoders(cfg, cfg.checkpoint)
        else:
            if cfg.peer == "torch":
                # JAX and PyTorch share the GPU's memory
                os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            start_jax(cfg.model.dtype)
            record = time_model(cfg)
        if cfg.json and record:
            write(cfg, record)
            print(f"wrote {cfg.json}")
    return status


def write(cfg: BenchConfig, record: dict[str, Any]) -> None:
    """Write all figures to the file of ``--json``, if any."""
    if cfg.json:
        with naming(cfg.json):
            Path(cfg.json).write_text(json.dumps(record, indent=1) + "\n")


def measure_gpu(cfg: BenchConfig) -> tuple[int, dict[str, Any]]:
    """Run the parts of `gptjax.bench.gpu_day`; the file of ``--json`` is written after each.
    Returns the exit status and all figures.
    """
    status, record = run_parts(gpu_day.PARTS, cfg, partial(write, cfg))
    gpu_day.print_summary(record)
    return status, record


def time_model(cfg: BenchConfig) -> dict[str, Any]:
    """Time the step or decoding, and print a row for each contender; returns all figures.

    Raises:
        GptjaxError: the model does not fit the sequence, or the peer is not installed.

    """
    model = cfg.model.resolve(platform_name(), min(cfg.data.seq_len, cfg.model.max_seq_len))
    theirs: Callable[[Config], Iterator[Contender]]
    if cfg.what == "step":
        tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
        ours, theirs = steps.step_contenders(cfg, cfg.compare), torch_peer.step_contenders
    else:
        tokens, ours, theirs = (
            steps.NEW_TOKENS,
            steps.decode_contenders(cfg),
            torch_peer.decode_contenders,
        )
    device = f"{platform_name()} ({jax.devices()[0].device_kind}), {os.cpu_count()} cores"
    print(f"{device}, jax {jax.__version__}, {model.dtype}, {tokens:,} tokens", flush=True)
    rivals = theirs(cfg) if cfg.peer == "torch" else iter(())
    timings = time_interleaved([*ours, *rivals], cfg.rounds)
    best = ceiling.measure(model, min(tokens, cfg.data.batch_size * cfg.data.seq_len))
    if cfg.what == "step":
        floor = ceiling.step_floor(model, tokens, cfg.data.seq_len, best)
        ideal = ceiling.peak_seconds(model, tokens, cfg.data.seq_len)
    else:
        floor, ideal = tokens * ceiling.decode_floor(model, best), None
    record = {"device": device, "jax": jax.__version__, "tokens": tokens}
    record |= print_timings(timings, tokens, best, floor, ideal)
    if cfg.profile:
        times = profile(timings[0].contender.run)
        print(profile_table(times))
        record["profile"] = [time._asdict() for time in times]
    return record


def time_decoders(cfg: BenchConfig, checkpoint: str) -> dict[str, Any]:
    """Decode a checkpoint in several storages and with the peers; print a row for each, and the
    rate at which memory is read.

    Raises:
        GptjaxError: the checkpoint cannot be read, is too short for the tokens, or a peer fails.

    """
    start_jax("float32")
    source = open_weights(checkpoint)
    tokens = decoders.PROMPT_TOKENS + decoders.NEW_TOKENS
    if source.cfg.max_seq_len < tokens:
        raise ConfigError(
            f"{checkpoint} has a context of {source.cfg.max_seq_len} tokens, but {tokens} are timed"
        )
    device = f"{platform_name()} ({jax.devices()[0].device_kind}), {os.cpu_count()} cores"
    if isa := native.instruction_set_in_use():
        device += f", {isa}"
    print(f"{device}, {decoders.NEW_TOKENS} tokens after {decoders.PROMPT_TOKENS}", flush=True)
    prompt = np.random.default_rng(cfg.seed).integers(
        0, source.cfg.vocab_size, decoders.PROMPT_TOKENS
    )
    tell = partial(print, file=sys.stderr, flush=True)
    found = decoders.compare(
        checkpoint, cfg.peers, prompt.tolist(), cfg.rounds, ceiling.read_rate(), tell
    )
    rows = decoders.figures(found)
    print(table([{"name": name} | row for name, row in rows.items()]))
    reading = statistics.median(run["bytes_per_s"] for run in found[decoders.MEMORY])
    print(f"{'memory':<24} {reading / 1e9:,.1f} GB/s read")
    return {"device": device, "jax": jax.__version__, "reading": reading, "rows": rows}


def time_loop(cfg: BenchConfig) -> dict[str, Any]:
    """Time the training loop; print milliseconds a step, the spread of the rounds and the ratio to
    the bare steps.

    Raises:
        GptjaxError: the run cannot be set up as configured.

    """
    count = loop.steps_per_round(cfg)
    with loop.contenders(cfg) as found:
        timings = time_interleaved(found, cfg.rounds)
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    rows: list[dict[str, Any]] = []
    for timing in timings:
        seconds = timing.median / count
        ratio = timing.median / timings[0].median
        rows.append({"name": timing.contender.name, "ms": seconds * 1e3, "spread": timing.spread})
        rows[-1] |= {"tokens_per_s": tokens / seconds, "ratio": ratio}
    print(
        f"{platform_name()} ({jax.devices()[0].device_kind}), {os.cpu_count()} cores, {count} "
        f"steps of {tokens:,} tokens"
    )
    print(table(rows, ".3f"))
    return {"steps": count, "tokens": tokens, "rows": rows}


def study_program(cfg: BenchConfig) -> dict[str, Any]:
    """Compile the step if ``hlo`` is set or, for CUDA and TPU, if the compiler is installed;
    otherwise count its lowered operations.

    Raises:
        GptjaxError: as `compile_program` and `count_program` do.

    """
    if cfg.hlo:
        if cfg.platform is None:
            start_jax(cfg.model.dtype)
        topology = program.target(cfg, cfg.platform or platform_name())
        return compile_program(cfg, topology, Path(cfg.hlo))
    if cfg.platform in ("cuda", "tpu"):
        try:
            topology = program.target(cfg, cfg.platform)
            start(topology)
            open_devices(topology)
        except ConfigError as error:
            print(f"lowered only, as {error}")
        else:
            return compile_program(cfg, topology, None)
    return count_program(cfg)


def count_program(cfg: BenchConfig) -> dict[str, Any]:
    """Print how often each operation runs and the gigabytes of its results, for both backwards.

    Raises:
        GptjaxError: the model does not fit the sequence or the platform.

    """
    if cfg.platform:
        start(parse_topology("cpu:1"))  # lowering needs none of this machine's devices
    start_jax(cfg.model.dtype)
    platform = cfg.platform or platform_name()
    model = cfg.model.resolve(platform, cfg.data.seq_len)
    found = {way: program.lowered_step(cfg, model, way, platform) for way in program.BACKWARDS}
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    print(
        f"lowered for {platform}, {model.dtype}, attention {model.attention}, layers "
        f"{model.layers}, {tokens:,} tokens"
    )
    print(f"{'operation':<24}" + "".join(f" {way:>8} {'GB':>7}" for way in found))
    names = sorted(
        set().union(*(ops.times for ops in found.values())),
        key=lambda n: -max(o.nbytes[n] for o in found.values()),
    )
    for name in names:
        print(
            f"{name:<24}"
            + "".join(f" {o.times[name]:>8,} {o.nbytes[name] / 1e9:>7.2f}" for o in found.values())
        )
    return {
        way: {name: {"times": ops.times[name], "nbytes": ops.nbytes[name]} for name in ops.times}
        for way, ops in found.items()
    }


def compile_program(cfg: BenchConfig, topology: Topology, folder: Path | None) -> dict[str, Any]:
    """Compile the step with both backwards and print a row for each program; write their texts to
    the folder, if any. Of a GPU's programs also print what their kernels read, write and compute.

    Raises:
        GptjaxError: the compiler is not installed, the model does not fit the platform, or a file
            cannot be written.

    """
    start(topology)
    start_jax(cfg.model.dtype)
    devices = open_devices(topology)
    model = cfg.model.resolve(topology.platform, cfg.data.seq_len)
    if folder:
        with naming(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            for backward, name in itertools.product(program.BACKWARDS, program.NAMES):
                # An earlier run for another platform may have left more files
                (folder / f"{backward}-{name}.txt").unlink(missing_ok=True)
    tokens = cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    count = f"{topology.size} x " if topology.size > 1 else ""
    print(
        f"compiled for {count}{topology.kind}, {model.dtype}, attention {model.attention}, layers "
        f"{model.layers}, {tokens:,} tokens"
    )
    # XLA counts no bytes for a GPU
    counted = topology.platform != "cuda"
    print(f"{'program':<24} {'temporaries':>11}" + f" {'accessed':>9}" * counted)
    record: dict[str, Any] = {}
    found: dict[str, list[Kernel]] = {}
    for backward in program.BACKWARDS:
        for one in program.compiled_step(cfg, model, backward, devices):
            file = f"{backward}-{one.name}.txt"
            if folder:
                with naming(str(folder / file)):
                    (folder / file).write_text(one.text)
            figures = {"temporary_bytes": one.temporary_bytes}
            line = f"{file:<24} {human_bytes(one.temporary_bytes):>11}"
            if counted:
                figures["accessed_bytes"] = one.accessed_bytes
                line += f" {human_bytes(one.accessed_bytes):>9}"
            print(line, flush=True)
            record[file] = figures
            if topology.platform == "cuda" and topology.device:
                found.setdefault(backward, []).extend(kernels(one.text, topology.device))
    if found:
        each = tokens / math.prod(max(1, size) for size in cfg.mesh.shape)
        record["kernels"] = print_kernels(found, each)
    return record


def time_data(cfg: BenchConfig) -> dict[str, Any]:
    """Time tokenizing and batching; print tokens a second, the spread of the rounds and the ratio
    to the first way.

    Raises:
        GptjaxError: the corpus cannot be found or prepared.

    """
    chosen = cfg.data
    corpus = find_corpus(
        chosen.dataset, chosen.root, chosen.tokenizer, chosen.column, chosen.tokens
    )
    cfg = dataclasses.replace(cfg, model=cfg.model.with_vocabulary(vocabulary(corpus)))
    shape = BatchShape(cfg.optim.accumulate, chosen.batch_size, chosen.seq_len)
    sections = {
        "tokens to batches": data.loading(
            corpus.train, shape, chosen.order, cfg.model.vocab_size, cfg.rounds
        )
    }
    if corpus.tokenizer:
        sections = {
            "text to tokens": data.tokenizing(corpus.tokenizer, corpus.train, cfg.rounds)
        } | sections
    start_jax(cfg.model.dtype)
    (step,) = time_interleaved(list(steps.step_contenders(cfg, False)), cfg.rounds)
    tokens = shape.accumulate * shape.batch_size * shape.seq_len
    sections["the training step"] = {
        step.contender.name: [tokens / seconds for seconds in step.seconds]
    }
    print(
        f"{corpus.folder}, {os.cpu_count()} cores, batches of {shape.accumulate} x "
        f"{shape.batch_size} x {shape.seq_len}"
    )
    record: dict[str, Any] = {}
    for section, ways in sections.items():
        first = statistics.median(next(iter(ways.values())))
        print(f"{section:<18} {'tokens a second':>16} {'spread':>8} {'ratio':>6}")
        for name, rates in ways.items():
            median = statistics.median(rates)
            spread = (max(rates) - min(rates)) / median
            print(f"{name:<18} {median:>16,.0f} {spread:>8.0%} {median / first:>6.2f}")
            record.setdefault(section, {})[name] = {"tokens_per_s": median, "spread": spread}
    return record


if __name__ == "__main__":
    sys.exit(main())
