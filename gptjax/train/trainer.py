"""The training loop: steps, and hooks that are called between them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gptjax.models.batch import Batch
from gptjax.models.params import flops_per_token
from gptjax.parallel.processes import Stop
from gptjax.train.metrics import Meter, peak_flops
from gptjax.train.optimizer import StepMetrics
from gptjax.train.setup import Run
from gptjax.train.step import (
    CompiledStep,
    TrainState,
    evaluate,
    gradient_buffer,
    make_eval_loss,
    run_step,
)

Record = dict[str, Any]
"""One step's numbers: step, loss, gradient norm, learning rate, times, and what hooks measure."""


class DivergedError(Exception):
    """Too many steps in a row were not finite; the message names the last good checkpoint."""


class WrongGradientError(Exception):
    """The hand-written gradient differs from JAX's; the message names the op and the report."""


class Hook(NamedTuple):
    """A callback of the loop."""

    every: int
    """Steps between calls; 0 for no regular calls."""
    at_end: bool
    """Also call after the last step."""
    when_stopped: bool
    """Call after the step at which a signal stopped the run; other hooks are not called there."""
    call: Any

    def due(self, step: int) -> bool:
        """Whether a regular call is due at this step."""
        return self.every > 0 and step % self.every == 0


class Trainer:
    """A run in progress: the state that steps change, and the hooks between them."""

    def __init__(self, run: Run, compiled: CompiledStep, state: TrainState, done: int = 0) -> None:
        """Start from the state after ``done`` steps."""
        self.run, self.compiled, self.state = run, compiled, state
        self.buffer = gradient_buffer(state.params)
        self.done = self.saved = done
        """Steps done, and the step of the newest checkpoint."""
        self.steps = run.cfg.train.steps
        flops = flops_per_token(run.model, run.shape.seq_len) * run.shape.tokens
        peak = peak_flops(jax.devices()[0].device_kind, run.model.dtype)
        self.meter = Meter(
            run.shape.tokens, flops, peak * (run.mesh.size if run.mesh else 1) if peak else None
        )
        self._before: list[Hook] = []
        self._measures: list[Hook] = []
        self._after: list[Hook] = []
        self._listeners: list[Callable[[Record], None]] = []
        self._pending: tuple[int, StepMetrics] | None = None

    def before_step(self, call: Callable[[Batch], Record], every: int) -> None:
        """Add a hook that is called with the next step's batch before that step; the numbers it
        returns are added to that step's record.
        """
        self._before.append(Hook(every, False, False, call))

    def measure(self, call: Callable[[], Record], every: int, at_end: bool = True) -> None:
        """Add a hook that measures the state after a step; its numbers are added to that step's
        record.
        """
        self._measures.append(Hook(every, at_end, False, call))

    def after_step(
        self, call: Callable[[], None], every: int, at_end: bool = True, when_stopped: bool = False
    ) -> None:
        """Add a hook that is called after a step's record has been passed to the listeners."""
        self._after.append(Hook(every, at_end, when_stopped, call))

    def listen(self, call: Callable[[Record], None]) -> None:
        """Add a callback that receives every step's record, in order."""
        self._listeners.append(call)

    def fit(self, stop: Stop | None = None) -> None:
        """Train to the last step, or until ``stop`` ends the run.

        A step's numbers are fetched after the next step is dispatched, so that the device never
        waits for the host.

        Raises:
            DivergedError: ``train.max_nonfinite`` steps in a row were not finite.

        """
        stop = stop or Stop(self.done, self.steps)
        while self.done < self.steps and not stop.name:
            step = self.done + 1
            batch = self.run.next_batch()
            found: Record = {}
            for hook in self._before:
                if hook.due(step):
                    self._flush()
                    found |= hook.call(batch)
                    self.meter.restart()
            stop.announce(step)
            self.state, self.buffer, metrics = run_step(
                self.compiled, self.state, self.buffer, batch, self.run.key, step
            )
            self._flush()
            self._pending, self.done = (step, metrics), step
            self._between(found, last=step == self.steps, stopping=stop.is_last(step))

    def _between(self, found: Record, last: bool, stopping: bool) -> None:
        """Call the hooks that are due after a step."""

        def due(hook: Hook) -> bool:
            return hook.when_stopped if stopping else hook.due(self.done) or (last and hook.at_end)

        measures, after = (
            [hook for hook in hooks if due(hook)] for hooks in (self._measures, self._after)
        )
        if measures or after or found or last or stopping:
            self._flush(found, measures)
            for hook in after:
                hook.call()
            self.meter.restart()

    def _flush(self, found: Record | None = None, measures: list[Hook] | None = None) -> None:
        """Fetch the numbers of the last dispatched step and pass its record to the listeners."""
        if not self._pending:
            return
        record = self.meter.record(*self._pending) | (found or {})
        self._pending = None
        for hook in measures or []:
            record |= hook.call()
        for listen in self._listeners:
            listen(record)
        if self.meter.nonfinite >= self.run.cfg.train.max_nonfinite:
            good = f"the last good checkpoint is after step {self.saved}"
            left = good if self.saved else "there is no checkpoint yet"
            raise DivergedError(
                f"stopped after step {record['step']}: {self.meter.nonfinite} losses or gradients "
                f"in a row were not finite; {left}; lower optim.learning_rate or raise "
                "optim.warmup_steps"
            )

    def validation_loss(self) -> float:
        """Mean loss over the validation batches, in nats."""
        return evaluate(
            make_eval_loss(self.run.model, self.run.mesh), self.state.params, self.run.val
        )

    def is_finite(self) -> bool:
        """Whether the loss at the current parameters is finite. It may not be, even after a step
        whose loss and gradient were.
        """
        eval_loss = make_eval_loss(self.run.model, self.run.mesh)
        return math.isfinite(evaluate(eval_loss, self.state.params, self.run.val[:1]))
