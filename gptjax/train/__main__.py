"""Train a model: ``python -m gptjax.train --config configs/124m.yaml``.

Every option of the config file is also an option here, as in ``--optim.learning_rate 1e-3``; the
command line wins. A run is kept in ``runs/NAME``: the resolved ``config.yaml``, ``metrics.jsonl``,
``tokenizer.json``, ``checkpoints/``, and a ``lock`` that the training process holds. ``python -m
gptjax.plot runs/NAME`` draws it; ``--log.tensorboard`` and ``--log.wandb PROJECT`` also log it
elsewhere. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and end the run; ``--resume runs/NAME``
continues from the newest checkpoint as if never interrupted.
"""

import contextlib
import dataclasses
import shlex
import sys
import time
from pathlib import Path

import jax

from gptjax import cli, tokenizers
from gptjax.cli.options import last_value, parse
from gptjax.config import Config
from gptjax.convert.weights import load_weights, open_weights
from gptjax.datasets.prepare import TRAINED
from gptjax.errors import CheckpointError, ConfigError
from gptjax.generate.stream import prompt_ids
from gptjax.parallel import heartbeat, processes
from gptjax.tokenizers import Tokenizer, is_gpt2
from gptjax.tokenizers.chat_template import ChatTemplate
from gptjax.train import step as steps
from gptjax.train.checkpoint import CheckpointWriter, Restored
from gptjax.train.hooks import add_hooks
from gptjax.train.loggers import open_loggers
from gptjax.train.metrics import Display, MetricsFile, NoMetrics
from gptjax.train.report import describe, describe_memory
from gptjax.train.setup import Run, claim_folder, resolved_config, restore, set_up, write_run_files
from gptjax.train.signals import stop_on_signals
from gptjax.train.trainer import DivergedError, Trainer, WrongGradientError
from gptjax.verify.live import LiveCheck
from gptjax.xla.backend import start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.train"
FAILED = 1  # exit status


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if done or stopped by a signal, 1 if training
    failed; bad input raises SystemExit(2).
    """
    less = "lower data.batch_size, set model.recompute block"
    with heartbeat.exit_together(PROG), cli.reported_errors(PROG, less, heartbeat.should_report):
        cfg, file = parse(Config, PROG, __doc__ or "", with_own_config(argv))
        cli.reuse_freed_memory()
        enable_compilation_cache()
        cli.quiet_libraries()
        cli.replace_unprintable()
        processes.start(cfg.distributed)
        start_jax(cfg.model.dtype)
        with heartbeat.watched(PROG, cfg.distributed.timeout):
            try:
                train(dataclasses.replace(cfg, name=cfg.name or (file.stem if file else "run")))
            # Every process raises it, so none waits for another
            except (DivergedError, WrongGradientError) as error:
                if processes.is_first():
                    print(f"{PROG}: error: {error}", file=sys.stderr)
                return FAILED
            except KeyboardInterrupt:  # later, `stop_on_signals` saves a checkpoint
                print(f"{PROG}: error: interrupted before the first step", file=sys.stderr)
                return cli.INTERRUPTED
    return 0


def train(cfg: Config) -> None:
    """Train to the last step or until a signal stops the run.

    Raises:
        GptjaxError: the configuration, corpus, checkpoint or disk cannot be used.
        DivergedError: ``train.max_nonfinite`` steps in a row were not finite.
        WrongGradientError: a gradient check (``train.verify_every``) failed.

    """
    display = Display(cfg.train.steps, quiet=not processes.is_first())
    new = set_up(*with_init(cfg))
    # Fail now rather than at the first sample
    prompt_ids(new.corpus.tokenizer, cfg.train.sample_prompt)
    with claim_folder(new) as run:
        restored = restore(run) if cfg.resume else None
        display.print(describe(run))
        if restored:
            display.print(f"{'resumed':<10} {run.folder} after step {restored.step}")
        done = restored.step if restored else 0
        if done < cfg.train.steps:
            display.print(_train(run, restored, display))
        else:
            display.print(
                f"nothing to do: {done} of {cfg.train.steps} steps are done; to go on, raise "
                "train.steps and, unless the learning rate is constant, add --reschedule"
            )


def _train(run: Run, restored: Restored | None, display: Display) -> str:
    """Train a run from its first step or from a checkpoint. Returns the last line to print."""
    cfg, done = run.cfg, restored.step if restored else 0
    state = restored.state if restored else initial_state(run)
    # Opened before the step is compiled, so that they fail early
    loggers = open_loggers(cfg.log, run.folder, done, resolved_config(run), display.print)
    began = time.perf_counter()
    shapes = steps.step_arguments(run.model, run.optimizer, run.shape, run.mesh, run.packed)
    display.print(f"{'compiling':<10} the training step")
    compiled = steps.compile_step(run.model, run.optimizer, cfg.train.backward, *shapes, run.mesh)
    display.print(describe_memory(compiled, time.perf_counter() - began))
    state = state or steps.make_state(run.key, run.model, run.optimizer, run.mesh)
    write_run_files(run)
    trainer = Trainer(run, compiled, jax.block_until_ready(state), done)
    if cfg.init and not done and cfg.train.eval_every:
        display.print(f"{'init':<10} {cfg.init}, val loss {trainer.validation_loss():.4f}")
    stop = processes.Stop(done, cfg.train.steps)
    with contextlib.ExitStack() as cleanup:
        # Entered first, so that signals are handled until everything is on disk
        cleanup.enter_context(stop_on_signals(PROG, stop, display))
        cleanup.enter_context(loggers)
        records = (
            MetricsFile(run.folder / "metrics.jsonl", done) if processes.is_first() else NoMetrics()
        )
        cleanup.enter_context(contextlib.closing(records))
        writer = CheckpointWriter(run.folder / "checkpoints", cfg.train.keep_checkpoints)
        cleanup.enter_context(contextlib.closing(writer))
        cleanup.enter_context(display.running(done))
        add_hooks(trainer, records, loggers, writer, display, LiveCheck(trainer))
        trainer.fit(stop)
    if trainer.saved < trainer.done:
        newest = (
            f"the newest checkpoint is after step {trainer.saved}"
            if trainer.saved
            else "there is no checkpoint"
        )
        return f"ended after step {trainer.done} without saving it; in {run.folder} {newest}"
    if stop.name and trainer.done < cfg.train.steps:
        display.print(
            f"stopped by {stop.name} after step {trainer.done}, saved in {run.folder}; "
            "continue with"
        )
        return resuming_command(run)
    return f"saved in {run.folder}"


def resuming_command(run: Run) -> str:
    """The whole command that continues a run."""
    command = f"{PROG} --resume {shlex.quote(str(run.folder))}"
    if run.cfg.distributed.coordinator is None:
        return command
    coordinator, count = run.cfg.distributed.coordinator, run.cfg.distributed.count_of
    return f"{command} --distributed.coordinator {coordinator} --distributed.process N/{count}"


def with_own_config(argv: list[str] | None) -> list[str]:
    """The arguments, after the config of the run whose folder ``--resume`` names, if it has one.

    Raises:
        CheckpointError: there is no such folder.

    """
    argv = sys.argv[1:] if argv is None else argv
    resumed = last_value(argv, "--resume")
    if resumed not in ("", "auto") and not Path(resumed).exists():
        near = Path("runs") / resumed
        raise CheckpointError(
            f"--resume {resumed}: there is no such run"
            + (f"; did you mean {near}?" if near.is_dir() else "")
        )
    config = Path(resumed) / "config.yaml"
    return ["--config", str(config), *argv] if resumed and config.is_file() else argv


def with_init(cfg: Config) -> tuple[Config, Tokenizer | None, ChatTemplate | None]:
    """The configuration with the vocabulary of ``init`` if it gives none, and the tokenizer and
    chat template of ``init``, if it has them.

    Raises:
        GptjaxError: the weights cannot be read, or ``data.tokenizer`` is another than theirs.

    """
    if not cfg.init:
        return cfg, None, None
    source = processes.first_then_others("init-tokenizer", lambda: open_weights(str(cfg.init)))
    own, given = source.tokenizer, cfg.data.tokenizer
    new = given == "char" or (given or "").partition(":")[0] in TRAINED
    if own and given and (new or not tokenizers.find(given).same_as(own)):
        raise ConfigError(
            f"{cfg.init} has its own tokenizer, {own.name} of {own.vocab_size} ids, and "
            f"data.tokenizer {given} is another: leave it out"
        )
    model = cfg.model.with_vocabulary(source.cfg.vocab_size)
    template = ChatTemplate(source.chat_template) if source.chat_template else None
    # Every corpus defaults to GPT-2's
    tokenizer = None if source.tokenizer and is_gpt2(source.tokenizer) else source.tokenizer
    return dataclasses.replace(cfg, model=model), tokenizer, template


def initial_state(run: Run) -> steps.TrainState | None:
    """The parameters of ``init`` with a fresh optimizer state; None without ``init``.

    Raises:
        GptjaxError: the weights cannot be read, or have other dimensions.

    """
    if not run.cfg.init:
        return None
    load = lambda: load_weights(str(run.cfg.init), run.model, run.mesh)  # noqa: E731
    _, params = processes.first_then_others("init", load)
    return steps.add_optimizer(params, run.model, run.optimizer, run.mesh)


if __name__ == "__main__":
    sys.exit(main())
