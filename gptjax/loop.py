"""The training loop: steps, and what is done between them."""

import dataclasses
import math
from typing import Any

import jax

from gptjax import distributed, steps
from gptjax.checkpoint import CheckpointWriter
from gptjax.loggers import Loggers
from gptjax.metrics import Display, Meter, MetricsFile, NoMetrics, peak_flops
from gptjax.models.gpt2 import Batch
from gptjax.models.params import flops_per_token
from gptjax.optim import StepMetrics
from gptjax.run import Run, checkpoint_meta, sample_text
from gptjax.steps import CompiledStep, TrainState
from gptjax.verify.files import environment, write_report
from gptjax.verify.references import against_live

NOTABLE = {"val_loss", "skipped", "gradient_error"}  # a step with one of them gets its line whatever log_every says


class DivergedError(Exception):
    """Too many steps in a row were not finite; the message says what is left to go on from."""


class WrongGradientError(Exception):
    """The hand-written gradient is not JAX's; the message says where, and where the report is."""


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
) -> tuple[TrainState, int, int]:
    """The loop, from ``done`` steps on; it ends early once ``stop`` says so.

    Returns:
        The state, the steps done, and those after which the newest checkpoint was saved, 0 for none.

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
            return state, step, saved
        meter.restart()
    return state, cfg.steps, saved


def verify(run: Run, compiled: CompiledStep, state: TrainState, batch: Batch, step: int) -> dict[str, float]:
    """What to log of the gradient of the step to come: its worst relative L2 error over its tensors, if it is finite.

    Raises:
        WrongGradientError: the gradient is wrong; the report is in the run's folder.

    """

    def on_trial(*arguments: Any) -> tuple[Any, Any]:
        loss, gradient, _ = compiled.loss_and_grad(*arguments)
        compiled.room[:] = [gradient]  # to be written over by the step, once it was compared
        return loss, gradient

    manual = run.cfg.train.backward == "manual"
    found = against_live(on_trial if manual else None, run.model, state.params, batch, run.key, step)
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
