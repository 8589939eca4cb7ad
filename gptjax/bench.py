"""Time the training step: ``python -m gptjax.bench --config configs/124m.yaml``.

Compiles the configured step with the hand-written and with JAX's backward, layers unrolled and scanned, and runs them in
turns, one step each, so that a noisy machine disturbs all alike. Prints the time to compile, the temporaries that the
compiler reports, the median time of a step and its ratio to the first row. The batch is random ids.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import cli, steps
from gptjax.config import Config
from gptjax.metrics import human_bytes
from gptjax.models.gpt2 import Batch
from gptjax.optim import make_optimizer
from gptjax.run import platform_name, start_jax

PROG = "python -m gptjax.bench"
ROUNDS = 12
WARMUP = 2


class Contender(NamedTuple):
    """One way to compute the step, ready to run."""

    name: str
    compiled: steps.CompiledStep
    compile_seconds: float
    state: steps.TrainState


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        cfg, _ = cli.parse(Config, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
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
