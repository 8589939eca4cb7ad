"""Time the training step: ``python -m gptjax.bench --config configs/124m.yaml``.

Compiles the configured step with the hand-written and with JAX's backward, layers unrolled and scanned, and runs them in
turns, one step each, so that a noisy machine disturbs all alike. Prints the time to compile, the temporaries that the
compiler reports, the median time of a step and its ratio to the first row. The batch is random ids.

``--what data`` times the corpus instead: text to tokens, and tokens to batches, in turns with what others do for it, and then
how many of those tokens the configured step eats.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gptjax import cli, steps, throughput
from gptjax.config import Config
from gptjax.data import BatchShape
from gptjax.datasets import find_corpus
from gptjax.metrics import human_bytes
from gptjax.models.gpt2 import Batch
from gptjax.optim import make_optimizer
from gptjax.run import platform_name, start_jax

PROG = "python -m gptjax.bench"
ROUNDS = 12
WARMUP = 2


@dataclasses.dataclass(frozen=True)
class BenchConfig(Config):
    """A training configuration, and what to time of it."""

    what: Literal["step", "data"] = "step"
    """step: the training step; data: tokenizing the configured corpus, and reading batches from it."""


class Contender(NamedTuple):
    """One way to compute the step, ready to run."""

    name: str
    compiled: steps.CompiledStep
    compile_seconds: float
    state: steps.TrainState


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        cfg, _ = cli.parse(BenchConfig, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
        if cfg.what == "data":
            time_data(cfg)
            return 0
        start_jax(cfg.model)
        batch, key = random_batch(cfg), jax.random.key(cfg.seed)
        contenders = [
            prepare(cfg, *choice, batch, key) for choice in itertools.product(("manual", "autodiff"), ("unroll", "scan"))
        ]
        print(f"{platform_name()} ({jax.devices()[0].device_kind}), jax {jax.__version__}, {batch.inputs.size:,} tokens a step")
        times = run_in_turns(contenders, batch, key)
    first = statistics.median(times[0])
    print(f"{'backward, layers':<18} {'compile s':>9} {'temporaries':>12} {'ms a step':>10} {'spread':>8} {'ratio':>6}")
    for contender, seconds in zip(contenders, times, strict=True):
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        temporaries = human_bytes(contender.compiled.memory["temporaries"])
        print(
            f"{contender.name:<18} {contender.compile_seconds:>9.1f} {temporaries:>12} {median * 1e3:>10.1f} "
            f"{spread:>8.0%} {median / first:>6.2f}"
        )
    return 0


def time_data(cfg: Config) -> None:
    """Print tokens a second of each way, with the spread of its rounds and the ratio to the first.

    Raises:
        GptjaxError: the corpus cannot be had.

    """
    data = cfg.data
    corpus = find_corpus(data.dataset, data.root, data.tokenizer, data.column, data.tokens)
    shape = BatchShape(cfg.optim.accumulate, data.batch_size, data.seq_len)
    parts = {"tokens to batches": throughput.loading(corpus.train, shape, data.order, cfg.model.vocab_size)}
    if corpus.tokenizer:
        parts = {"text to tokens": throughput.tokenizing(corpus.tokenizer, corpus.train)} | parts
    start_jax(cfg.model)
    batch, key = random_batch(cfg), jax.random.key(cfg.seed)
    step = prepare(cfg, cfg.train.backward, cfg.model.layers, batch, key)
    parts["the training step"] = {step.name: [batch.inputs.size / t for t in run_in_turns([step], batch, key)[0]]}
    print(f"{corpus.folder}, {os.cpu_count()} cores, batches of {shape.accumulate} x {shape.batch_size} x {shape.seq_len}")
    for part, ways in parts.items():
        first = statistics.median(next(iter(ways.values())))
        print(f"{part:<18} {'tokens a second':>16} {'spread':>8} {'ratio':>6}")
        for name, rates in ways.items():
            median = statistics.median(rates)
            print(f"{name:<18} {median:>16,.0f} {(max(rates) - min(rates)) / median:>8.0%} {median / first:>6.2f}")


def random_batch(cfg: Config) -> Batch:
    """(A, B, T) random ids on the device."""
    shape = cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len + 1
    ids = np.random.default_rng(cfg.seed).integers(0, cfg.model.vocab_size, shape, np.int32)
    return jax.device_put(Batch(ids[..., :-1], ids[..., 1:]))


def prepare(cfg: Config, backward: Any, layers: Any, batch: Batch, key: Any) -> Contender:
    """Compile one variant and initialise its state."""
    model = dataclasses.replace(cfg.model, layers=layers).resolve(platform_name(), cfg.data.seq_len)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    state = jax.block_until_ready(jax.jit(lambda key: steps.init_state(key, model, optimizer))(key))
    began = time.perf_counter()
    compiled = steps.compile_step(model, optimizer, backward, state, batch, key)
    return Contender(f"{backward}, {layers}", compiled, time.perf_counter() - began, state)


def run_in_turns(contenders: list[Contender], batch: Batch, key: Any) -> list[list[float]]:
    """Seconds of each step, one list a contender; the first rounds are not counted."""
    states = [contender.state for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for n in range(WARMUP + ROUNDS):
        for i, contender in enumerate(contenders):
            began = time.perf_counter()
            states[i], metrics = steps.run_step(contender.compiled, states[i], batch, key, n)
            jax.block_until_ready((states[i], metrics))
            if n >= WARMUP:
                times[i].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    sys.exit(main())
