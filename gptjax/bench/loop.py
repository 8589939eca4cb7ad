"""Overhead of the training loop beyond its steps."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from gptjax.bench.timing import Contender
from gptjax.config import Config, TrainConfig
from gptjax.train import step as steps
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.train.hooks import add_hooks
from gptjax.train.loggers import Loggers
from gptjax.train.metrics import Display, MetricsFile
from gptjax.train.setup import claim_folder, set_up, write_run_files
from gptjax.train.trainer import Trainer
from gptjax.verify.live import LiveCheck


def steps_per_round(cfg: Config) -> int:
    """Number of steps between two validations."""
    return cfg.train.eval_every or cfg.train.steps


@contextlib.contextmanager
def contenders(cfg: Config) -> Iterator[list[Contender]]:
    """Three contenders of `steps_per_round` steps each: bare steps, the loop with logging and a
    final checkpoint, and the loop as configured.

    The run has a temporary folder, and its output goes to the null device.

    Raises:
        GptjaxError: the run cannot be set up as configured.

    """
    count = steps_per_round(cfg)
    plain = dataclasses.replace(
        cfg.train, eval_every=0, sample_every=0, sample_tokens=0, checkpoint_every=0, verify_every=0
    )
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        nowhere = cleanup.enter_context(Path(os.devnull).open("w"))
        run = cleanup.enter_context(
            claim_folder(set_up(dataclasses.replace(cfg, runs=folder, resume=None)))
        )
        write_run_files(run)
        shapes = steps.step_arguments(run.model, run.optimizer, run.shape, run.mesh)
        compiled = steps.compile_step(
            run.model, run.optimizer, cfg.train.backward, *shapes, run.mesh
        )
        writer = cleanup.enter_context(
            contextlib.closing(CheckpointWriter(run.folder / "checkpoints", 1))
        )
        records = cleanup.enter_context(
            contextlib.closing(MetricsFile(run.folder / "metrics.jsonl", 0))
        )
        trainer = Trainer(
            run, compiled, steps.make_state(run.key, run.model, run.optimizer, run.mesh)
        )

        def fit(train: TrainConfig, hooks: bool) -> None:
            nonlocal trainer
            goal = dataclasses.replace(train, steps=trainer.done + count)
            goal_run = run._replace(cfg=dataclasses.replace(run.cfg, train=goal))
            trainer = Trainer(goal_run, compiled, trainer.state, trainer.done)
            if hooks:
                with contextlib.redirect_stdout(nowhere):
                    add_hooks(
                        trainer,
                        records,
                        Loggers([], print),
                        writer,
                        Display(goal.steps),
                        LiveCheck(trainer),
                    )
                    trainer.fit()
            else:
                trainer.fit()
            jax.block_until_ready(trainer.state)

        yield [
            Contender("steps alone", partial(fit, plain, False), {}),
            Contender("the loop, logging", partial(fit, plain, True), {}),
            Contender("the loop, as configured", partial(fit, cfg.train, True), {}),
        ]
