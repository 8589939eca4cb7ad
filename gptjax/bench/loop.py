"""What the training loop costs beside its steps."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from gptjax.parallel import processes
from gptjax.train import step as steps
from gptjax.bench.timing import Contender
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.config import Config, TrainConfig
from gptjax.train.loggers import Loggers
from gptjax.train.trainer import fit
from gptjax.train.metrics import Display, MetricsFile
from gptjax.train.setup import fill_folder, owned, set_up


def length(cfg: Config) -> int:
    """Steps of a round: as many as lie between two validations."""
    return cfg.train.eval_every or cfg.train.steps


@contextlib.contextmanager
def contenders(cfg: Config) -> Iterator[list[Contender]]:
    """`length` steps by themselves; in the loop that logs each and ends with a checkpoint; and with all that is configured.

    The run lives in a temporary folder, its lines go to the null device.

    Raises:
        GptjaxError: the run cannot be set up as configured.

    """
    count = length(cfg)
    plain = dataclasses.replace(cfg.train, eval_every=0, sample_every=0, sample_tokens=0, checkpoint_every=0, verify_every=0)
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        nowhere = cleanup.enter_context(Path(os.devnull).open("w"))
        run = cleanup.enter_context(owned(set_up(dataclasses.replace(cfg, runs=folder, resume=None))))
        fill_folder(run)
        shapes = steps.step_arguments(run.model, run.optimizer, run.shape, run.mesh)
        compiled = steps.compile_step(run.model, run.optimizer, cfg.train.backward, *shapes, run.mesh)
        state = steps.make_state(run.key, run.model, run.optimizer, run.mesh)
        writer = cleanup.enter_context(contextlib.closing(CheckpointWriter(run.folder / "checkpoints", 1)))
        records = cleanup.enter_context(contextlib.closing(MetricsFile(run.folder / "metrics.jsonl", 0)))
        done = 0

        def bare() -> None:
            nonlocal state, done
            for step in range(done + 1, done + count + 1):
                state, metrics = steps.run_step(compiled, state, run.next_batch(), run.key, step)
            jax.block_until_ready((state, metrics))
            done += count

        def loop(train: TrainConfig) -> None:
            nonlocal state, done
            goal = run._replace(cfg=dataclasses.replace(run.cfg, train=dataclasses.replace(train, steps=done + count)))
            with contextlib.redirect_stdout(nowhere):
                display, stop = Display(done + count), processes.Stop()
                state, done, _ = fit(goal, compiled, state, done, records, Loggers([], print), writer, display, stop)

        yield [
            Contender("steps alone", bare, {}),
            Contender("the loop, logging", partial(loop, plain), {}),
            Contender("the loop, as configured", partial(loop, cfg.train), {}),
        ]
