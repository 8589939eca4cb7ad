"""Gradient checks during training, at the run's parameters and batch."""

import dataclasses
from typing import Any

import numpy as np

from gptjax.train.trainer import Trainer, WrongGradientError
from gptjax.verify.references import against_live
from gptjax.verify.saved_report import environment, write_report


class LiveCheck:
    """A hook for `gptjax.train.trainer.Trainer.before_step`."""

    def __init__(self, trainer: Trainer) -> None:
        """Check the steps of this trainer."""
        self.trainer = trainer

    def __call__(self, batch: Any) -> dict[str, float]:
        """Check the next step's gradient; returns its worst relative L2 error as
        ``gradient_error``, or nothing if JAX's gradient is not finite.

        Raises:
            WrongGradientError: the gradient is wrong; the report is in the run's folder.

        """
        trainer, run, step = self.trainer, self.trainer.run, self.trainer.done + 1

        def step_gradient(params: Any, batch: Any, key: Any, number: Any) -> tuple[Any, Any]:
            loss, trainer.buffer, _ = trainer.compiled.gradient(
                params, batch, key, np.int32(number), trainer.buffer
            )
            return loss, trainer.buffer

        manual = run.cfg.train.backward == "manual"
        found = against_live(
            step_gradient if manual else None, run.model, trainer.state.params, batch, run.key, step
        )
        if found is None:
            return {}
        if found:
            return {"gradient_error": found.gradient.worst.relative_l2}
        facts = {"run": str(run.folder), "step": str(step), **environment(run.cfg)}
        page, data = (run.folder / f"verify-step-{step}{suffix}" for suffix in (".html", ".json"))
        write_report(dataclasses.replace(found, environment=facts), data, page)
        raise WrongGradientError(
            f"step {step}: {found.closing}; the report is in {page} and {data.name}"
        )
