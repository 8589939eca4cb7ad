"""Train GPT-2: ``python -m gptjax.train --config configs/124m.yaml``.

Every option of the config file is also an option here, as in ``--optim.learning_rate 1e-3``; the command line wins.
A run is kept in ``runs/NAME``: ``config.yaml`` as resolved, ``metrics.jsonl``, ``tokenizer.json``, ``checkpoints/``;
``python -m gptjax.plot runs/NAME`` draws it, and ``--log.tensorboard true`` or ``--log.wandb PROJECT`` log it there, too.
Ctrl-C or SIGTERM saves a checkpoint and ends; ``--resume auto`` goes on from the newest one as if never interrupted.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from gptjax import cli, distributed, steps
from gptjax.checkpoint import CheckpointWriter
from gptjax.config import Config
from gptjax.loggers import Loggers, open_loggers
from gptjax.metrics import Display, Meter, MetricsFile, NoMetrics, peak_flops
from gptjax.models.gpt2 import Batch
from gptjax.models.params import flops_per_token
from gptjax.optim import StepMetrics
from gptjax.run import Run, checkpoint_meta, describe, describe_memory, make_folder, resolved, restore, sample_text, set_up
from gptjax.steps import CompiledStep, TrainState
from gptjax.verify.files import environment, write_report
from gptjax.verify.references import against_live
from gptjax.weights import load_weights

PROG = "python -m gptjax.train"
FAILED = 1  # exit status
NOTABLE = {"val_loss", "skipped", "gradient_error"}  # a step with one of them gets its line whatever log_every says


class DivergedError(Exception):
    """Too many steps in a row were not finite; the message says what is left to go on from."""


class WrongGradientError(Exception):
    """The hand-written gradient is not JAX's; the message says where, and where the report is."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0 done or stopped by a signal, 1 failed; bad input raises SystemExit(2)."""
    with distributed.ending_together(PROG), cli.reported_errors(PROG):
        cfg, file = cli.parse(Config, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
        cli.keep_compiled_programs()
        cli.quiet_libraries()
        cli.replace_unprintable()
        try:
            train(dataclasses.replace(cfg, name=cfg.name or (file.stem if file else "run")))
        except (DivergedError, WrongGradientError) as error:
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
        done = fit(run, compiled, jax.block_until_ready(state), done, metrics_file, loggers, writer, display, stop)
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


def fit(
    run: Run,
    compiled: CompiledStep,
    state: TrainState,
    done: int,
    metrics_file: MetricsFile | NoMetrics,
    loggers: Loggers,
    writer: CheckpointWriter,
    display: Display,
    stop: distributed.Stop,
) -> int:
    """The loop, from ``done`` steps on; it ends early once ``stop`` says so. Returns the steps done.

    A step's numbers are fetched after the next step was dispatched, so that the device never waits for the host.
    """
    cfg = run.cfg.train
    eval_loss = steps.make_eval_loss(run.model, run.mesh)
    flops = flops_per_token(run.model, run.shape.seq_len) * run.shape.tokens
    peak = peak_flops(jax.devices()[0].device_kind, run.model.dtype)
    meter = Meter(run.shape.tokens, flops, peak * (run.mesh.size if run.mesh else 1) if peak else None)
    pending: tuple[int, StepMetrics] | None = None
    saved = done

    def report(record: dict[str, Any]) -> None:
        metrics_file.write(record)
        loggers.write(record)
        step = record["step"]
        display.step(record, line=step % cfg.log_every == 0 or step == cfg.steps or not NOTABLE.isdisjoint(record))
        writer.check()
        if meter.nonfinite >= cfg.max_nonfinite:
            left = f"the checkpoint after step {saved} is the last good one" if saved else "there is no checkpoint yet"
            raise DivergedError(
                f"{meter.nonfinite} losses or gradients in a row were not finite, up to step {step}: stopped; {left}; "
                "lower optim.learning_rate or raise optim.warmup_steps"
            )

    for step in range(done + 1, cfg.steps + 1):
        batch = run.next_batch()
        checked: dict[str, float] = {}
        if _due(step, cfg.verify_every):
            if pending:
                report(meter.record(*pending))
                pending = None
            try:
                checked = verify(run, compiled, state, batch, step)
            except WrongGradientError:
                if saved < step - 1:  # the parameters in question, to look into with `gptjax.verify --checkpoint`
                    writer.save(step - 1, state, run.model, checkpoint_meta(run))
                raise
            meter.restart()
        stop.say(step)
        state, metrics = steps.run_step(compiled, state, batch, run.key, step)
        if pending:
            report(meter.record(*pending))
        pending = step, metrics
        final, stopping = step == cfg.steps, stop.now(step)
        evaluate, show, save = (_due(step, every) for every in (cfg.eval_every, cfg.sample_every, cfg.checkpoint_every))
        if not (evaluate or show or save or final or stopping or checked):
            continue
        record = meter.record(*pending) | checked
        pending = None
        if (evaluate or (final and cfg.eval_every)) and not stopping:
            record["val_loss"] = steps.evaluate(eval_loss, state.params, run.val)
        report(record)
        if save or final or stopping:
            # A step can be finite and still leave parameters that are not fit to go on from.
            if math.isfinite(steps.evaluate(eval_loss, state.params, run.val[:1])):
                writer.save(step, state, run.model, checkpoint_meta(run))
                saved = step
            else:
                display.print(f"{display.of(step)} | no checkpoint: the parameters give a loss that is not finite")
        if (show or final) and cfg.sample_tokens and not stopping:
            text = sample_text(run, state.params, step)
            display.print(f"--- sample after step {step} ---\n{text}\n---")
            loggers.text("sample", text, step)
        if stopping:
            return step
        meter.restart()
    return cfg.steps


def verify(run: Run, compiled: CompiledStep, state: TrainState, batch: Batch, step: int) -> dict[str, float]:
    """What to log of the gradient of the step to come: its worst relative L2 error over its tensors, if it is finite.

    Raises:
        WrongGradientError: the gradient is wrong; the report is in the run's folder.

    """
    gradient = compiled.grads if run.cfg.train.backward == "manual" else None
    found = against_live(gradient, run.model, state.params, batch, run.key, step)
    if found is None:
        return {}
    if found:
        return {"gradient_error": found.gradient.worst.relative_l2}
    facts = {"run": str(run.folder), "step": str(step), **environment(run.cfg)}
    page, data = (run.folder / f"verify-step-{step}{suffix}" for suffix in (".html", ".json"))
    write_report(dataclasses.replace(found, environment=facts), data, page)
    raise WrongGradientError(f"step {step}: {found.closing}; the report is in {page} and {data.name}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
