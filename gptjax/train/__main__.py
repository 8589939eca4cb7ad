"""Train GPT-2: ``python -m gptjax.train --config configs/124m.yaml``.

Every option of the config file is also an option here, as in ``--optim.learning_rate 1e-3``; the command line wins.
A run is kept in ``runs/NAME``: ``config.yaml`` as resolved, ``metrics.jsonl``, ``tokenizer.json``, ``checkpoints/``;
``python -m gptjax.plot runs/NAME`` draws it, and ``--log.tensorboard true`` or ``--log.wandb PROJECT`` log it there, too.
Ctrl-C or SIGTERM saves a checkpoint and ends; ``--resume auto`` goes on from the newest one as if never interrupted.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from gptjax import cli, distributed, lost, steps
from gptjax.xla.cache import keep_compiled_programs
from gptjax.checkpoint import CheckpointWriter
from gptjax.config import Config
from gptjax.loggers import open_loggers
from gptjax.loop import DivergedError, WrongGradientError, fit
from gptjax.metrics import Display, MetricsFile, NoMetrics
from gptjax.run import Run, describe, describe_memory, make_folder, resolved, restore, set_up, start_jax
from gptjax.steps import TrainState
from gptjax.weights import load_weights

PROG = "python -m gptjax.train"
FAILED = 1  # exit status


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0 done or stopped by a signal, 1 failed; bad input raises SystemExit(2)."""
    less = "lower data.batch_size, set model.recompute block"
    with lost.ending_together(PROG), cli.reported_errors(PROG, less, lost.speaks):
        cfg, file = cli.parse(Config, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
        keep_compiled_programs()
        cli.quiet_libraries()
        cli.replace_unprintable()
        distributed.start(cfg.distributed)
        start_jax(cfg.model)
        with lost.watched(PROG, cfg.distributed.timeout):
            try:
                train(dataclasses.replace(cfg, name=cfg.name or (file.stem if file else "run")))
            except (DivergedError, WrongGradientError) as error:  # in all processes, so none of them is lost
                if distributed.is_first():
                    print(f"{PROG}: error: {error}", file=sys.stderr)
                return FAILED
    return 0


def train(cfg: Config) -> None:
    """Train as configured, to the last step or to a signal.

    Raises:
        GptjaxError: anything about the configuration, corpus, checkpoint or disk that a person can mend.
        DivergedError: ``train.max_nonfinite`` steps in a row were not finite.
        WrongGradientError: a check that ``train.verify_every`` asks for failed.

    """
    run = set_up(cfg)
    display = Display(cfg.train.steps, quiet=not distributed.is_first())
    display.print(describe(run))
    restored = restore(run) if cfg.resume else None
    state, done = (restored.state, restored.step) if restored else (None, 0)
    if restored:
        display.print(f"{'resumed':<10} {run.folder} after step {done}")
    if done >= cfg.train.steps:
        display.print(f"nothing to do: {done} of {cfg.train.steps} steps are done; raise train.steps to go on")
        return
    if not state and cfg.init:
        state = loaded_state(run)
    loggers = open_loggers(cfg.log, run.folder, done, resolved(run), display.print)  # what they lack is told before compiling
    began = time.perf_counter()
    shapes = steps.step_arguments(run.model, run.optimizer, run.shape, run.mesh)
    compiled = steps.compile_step(run.model, run.optimizer, cfg.train.backward, *shapes, run.mesh)
    display.print(describe_memory(compiled, time.perf_counter() - began))
    state = state or steps.make_state(run.key, run.model, run.optimizer, run.mesh)
    make_folder(run)
    if cfg.init and not done and cfg.train.eval_every:
        loss = steps.evaluate(steps.make_eval_loss(run.model, run.mesh), state.params, run.val)
        display.print(f"{'init':<10} {cfg.init}, val loss {loss:.4f}")
    with contextlib.ExitStack() as cleanup:
        stop = distributed.Stop(cleanup.enter_context(stop_signals()))  # first in, so last out: until all is on disk
        cleanup.enter_context(loggers)
        records = MetricsFile(run.folder / "metrics.jsonl", done) if distributed.is_first() else NoMetrics()
        metrics_file = cleanup.enter_context(contextlib.closing(records))
        writer = cleanup.enter_context(
            contextlib.closing(CheckpointWriter(run.folder / "checkpoints", cfg.train.keep_checkpoints))
        )
        cleanup.enter_context(display.running(done))
        _, done = fit(run, compiled, jax.block_until_ready(state), done, metrics_file, loggers, writer, display, stop)
    if stop.name and done < cfg.train.steps:
        display.print(f"stopped by {stop.name} after step {done}; go on with --resume auto")
    display.print(f"saved in {run.folder}")


def loaded_state(run: Run) -> TrainState:
    """The parameters that ``init`` names, and a fresh optimizer.

    Raises:
        GptjaxError: the weights cannot be had, or are of other dimensions.

    """
    _, params = distributed.first_then_others("init", lambda: load_weights(str(run.cfg.init), run.model, run.mesh))
    return steps.add_optimizer(params, run.model, run.optimizer, run.mesh)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that holds the name of the signal once Ctrl-C or SIGTERM has arrived. A second Ctrl-C interrupts at once."""
    received: list[str] = []

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT.name in received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


if __name__ == "__main__":
    sys.exit(main())
