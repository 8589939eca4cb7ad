"""A trainer whose steps compute nothing, so that what happens around them can be seen."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from gptjax.config import TrainConfig
from gptjax.datasets.batches import BatchShape
from gptjax.train import trainer as trainers
from gptjax.train.optimizer import StepMetrics
from gptjax.train.setup import Run
from gptjax.train.step import TrainState
from tests.models import tiny


class Steps:
    """In place of `gptjax.train.step.run_step`: writes down what is dispatched, in ``log``;
    ``losses`` are by step.
    """

    def __init__(self, losses: dict[int, float] | None = None) -> None:
        """Losses that are left out are 1."""
        self.log: list[Any] = []
        self.losses = losses or {}

    def __call__(
        self, compiled: Any, state: Any, buffer: Any, batch: Any, key: Any, step: int
    ) -> Any:
        """Do the step: its number is what the state holds."""
        self.log.append(f"step {step} of {batch}")
        loss = jnp.asarray(self.losses.get(step, 1.0))
        metrics = StepMetrics(loss, jnp.asarray(2.0), jnp.asarray(0.1), jnp.isfinite(loss))
        return TrainState({"w": jnp.asarray(step)}, ()), buffer, metrics


def make_trainer(
    monkeypatch: Any, run_step: Steps, done: int = 0, **options: Any
) -> trainers.Trainer:
    """A trainer with these ``train.*`` options, after ``done`` steps."""
    monkeypatch.setattr(trainers, "run_step", run_step)
    numbers = iter(range(done + 1, 1000))
    run: Run = SimpleNamespace(
        cfg=SimpleNamespace(train=TrainConfig(**options)),
        model=tiny.config(dtype="float32"),
        shape=BatchShape(1, 2, 6),
        optimizer="optimizer",
        mesh=None,
        key=None,
        val=[],
        next_batch=lambda: f"batch {next(numbers)}",
    )
    return trainers.Trainer(
        run, compiled=None, state=TrainState({"w": jnp.zeros(())}, ()), done=done
    )
