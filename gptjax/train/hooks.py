"""The hooks of a run: logging, validation, samples, checkpoints and gradient checks."""

from collections.abc import Callable

from gptjax.models.batch import Batch
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.train.loggers import Loggers
from gptjax.train.metrics import Display, MetricsFile, NoMetrics
from gptjax.train.samples import sample_text
from gptjax.train.setup import checkpoint_meta
from gptjax.train.trainer import Record, Trainer, WrongGradientError

# A step whose record has one of these is printed regardless of log_every
NOTABLE = {"val_loss", "skipped", "gradient_error"}


def add_hooks(
    trainer: Trainer,
    records: MetricsFile | NoMetrics,
    loggers: Loggers,
    writer: CheckpointWriter,
    display: Display,
    check: Callable[[Batch], Record],
) -> None:
    """Add the configured hooks to a trainer; ``check`` verifies the gradient of a batch."""
    run, cfg = trainer.run, trainer.run.cfg.train

    def save() -> None:
        writer.save(trainer.done, trainer.state, run.model, run.optimizer, checkpoint_meta(run))

    def log(record: Record) -> None:
        records.write(record)
        loggers.write(record)
        step = record["step"]
        display.step(
            record,
            line=step % cfg.log_every == 0 or step == cfg.steps or not NOTABLE.isdisjoint(record),
        )
        writer.check()

    def checkpoint() -> None:
        if trainer.is_finite():
            save()
            trainer.saved = trainer.done
        else:
            display.print(
                f"{display.label(trainer.done)} | no checkpoint: the loss at these parameters is "
                "not finite"
            )

    def print_sample() -> None:
        text = sample_text(run, trainer.state.params, trainer.done)
        display.print(f"--- sample after step {trainer.done} ---\n{text}\n---")
        loggers.text("sample", text, trainer.done)

    def verify(batch: Batch) -> Record:
        try:
            return check(batch)
        except WrongGradientError:
            # Save the parameters at which the gradient is wrong, for `gptjax.verify --checkpoint`
            if trainer.saved < trainer.done:
                save()
            raise

    trainer.listen(log)
    trainer.before_step(verify, cfg.verify_every)
    trainer.measure(
        lambda: {"val_loss": trainer.validation_loss()}, cfg.eval_every, at_end=cfg.eval_every > 0
    )
    trainer.after_step(checkpoint, cfg.checkpoint_every, when_stopped=True)
    if cfg.sample_tokens:
        trainer.after_step(print_sample, cfg.sample_every)
