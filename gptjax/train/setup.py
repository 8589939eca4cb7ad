"""Set up a training run: check everything, resolve every ``auto``, claim the run's folder."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from gptjax import datasets
from gptjax.config import Config, DistributedConfig, ModelConfig
from gptjax.datasets import TEMPLATE_FILE, TOKENIZER_FILE, Corpus
from gptjax.datasets.batches import BatchShape, TrainingBatches, validation_batches
from gptjax.errors import CheckpointError
from gptjax.files import write_whole
from gptjax.models.batch import Batch
from gptjax.parallel import processes
from gptjax.parallel.mesh import make_mesh, place_rows, row_share, whole
from gptjax.tokenizers import Tokenizer
from gptjax.tokenizers.chat_template import ChatTemplate
from gptjax.tokenizers.chat_template import find as find_template
from gptjax.train import folders
from gptjax.train.checkpoint import Restored, restore_newest
from gptjax.train.loggers import check_installed
from gptjax.train.optimizer import Optimizer, make_optimizer
from gptjax.xla.backend import platform_name, start_jax

# Settings that decide the sequence of batches; a resumed run must not change them.
RESUME_KEYS = ("data.batch_size", "data.seq_len", "data.order", "optim.accumulate", "seed")


class Run(NamedTuple):
    """A run that is ready to train."""

    cfg: Config
    model: ModelConfig
    shape: BatchShape
    corpus: Corpus
    batches: TrainingBatches
    val: list[Batch]
    optimizer: Optimizer
    key: Any
    mesh: Mesh | None
    share: tuple[int, int]
    """The rows of each batch that this process reads; see `row_share`."""
    template: str | None = None
    """The chat template, in Jinja, that the model was or is trained with."""
    folder: Path = Path()
    """The run's folder, once `claim_folder` has claimed it."""

    @property
    def packed(self) -> bool:
        """Whether batches have segments."""
        return self.val[0].segments is not None

    def next_batch(self) -> Batch:
        """The next step's batch, laid out over the mesh; each process reads its own rows."""
        return place_rows(self.mesh, next(self.batches), self.share[1])


def set_up(
    cfg: Config, tokenizer: Tokenizer | None = None, template: ChatTemplate | None = None
) -> Run:
    """Open the corpus and resolve every ``auto``; nothing is computed or written yet.

    Args:
        cfg: the configuration.
        tokenizer: replaces ``data.tokenizer`` if that is None.
        template: replaces ``data.chat_template`` if that is None.

    Raises:
        GptjaxError: the configuration or the corpus cannot be used.

    """
    check_installed(cfg.log)
    start_jax(cfg.model.dtype)
    processes.require_same(dataclasses.replace(cfg, distributed=DistributedConfig()))
    packed = datasets.holds_conversations(cfg.data.dataset)
    model = cfg.model.resolve(platform_name(), cfg.data.seq_len, packed)
    # Fail before a download rather than after it
    make_mesh(cfg.mesh, model.axis_sizes, cfg.data.batch_size)
    data = cfg.data
    if data.chat_template:
        template = find_template(data.chat_template)
    find = partial(
        datasets.find_corpus,
        data.dataset,
        data.root,
        data.tokenizer or (None if datasets.holds_shards(Path(data.dataset)) else tokenizer),
        data.column,
        data.tokens,
        template,
    )
    corpus = processes.first_then_others("corpus", find)
    model = model if model.vocab_size else model.with_vocabulary(datasets.vocabulary(corpus))
    corpus = datasets.fitted(corpus, model.vocab_size)
    mesh = make_mesh(cfg.mesh, model.axis_sizes, cfg.data.batch_size)
    share = row_share(mesh, cfg.data.batch_size)
    shape = BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len)
    return Run(
        cfg=cfg,
        model=model,
        shape=shape,
        corpus=corpus,
        batches=TrainingBatches(corpus.train, shape, data.order, cfg.seed, model.vocab_size, share),
        val=validation_batches(
            corpus.val, cfg.train.eval_tokens, shape.batch_size, shape.seq_len, model.vocab_size
        ),
        optimizer=make_optimizer(cfg.optim, cfg.train.steps, model),
        key=whole(mesh, jax.random.key(cfg.seed)),
        mesh=mesh,
        share=share,
        template=template.source if template else datasets.template_of(corpus),
    )


@contextlib.contextmanager
def claim_folder(run: Run) -> Iterator[Run]:
    """Hold the run's folder for the block, so that no other process trains in it; yields the run
    with its folder. The first process holds the lock.

    Raises:
        CheckpointError: the folder to resume is not a run's, or another process is training it.

    """
    cfg = run.cfg
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            folder = folders.claim(Path(cfg.runs), cfg.name or "run", cfg.resume)
            return str(stack.enter_context(folder))

        yield run._replace(folder=Path(processes.broadcast("folder", claim)))


def restore(run: Run) -> Restored | None:
    """Read the newest checkpoint in the run's folder and move the batches to its position; None if
    there is none.

    Raises:
        CheckpointError: the model, the order of the batches or, without ``reschedule``, the
            schedule differs from the checkpoint's; all checkpoints are damaged; or the folder
            given to --resume has none.

    """
    folder = run.folder / "checkpoints"
    restored = restore_newest(folder, run.model, run.optimizer, run.mesh)
    if not restored and run.cfg.resume != "auto":
        raise CheckpointError(
            f"{folder} has no checkpoint to resume from: start afresh with python -m gptjax.train "
            f"--config {shlex.quote(str(run.folder / 'config.yaml'))}"
        )
    if restored:
        now = _identity(run)
        for key, value in restored.meta["identity"].items():
            if now[key] != value:
                raise CheckpointError(
                    f"{run.folder} was trained with {key} {value}, not {now[key]}: set it to that "
                    "value to resume"
                )
        schedule = _schedule(run)
        for key, value in restored.meta.get("schedule", {}).items():
            if schedule.get(key, value) != value and not run.cfg.reschedule:
                raise CheckpointError(
                    f"{run.folder} was trained with {key} {value}, not {schedule[key]}: set it to "
                    "that value, or change the schedule with --reschedule"
                )
        run.batches.seek(restored.meta["position"])
    return restored


def checkpoint_meta(run: Run) -> dict[str, Any]:
    """Metadata saved with a checkpoint: the sequence of batches, the position in it, the schedule,
    and the tokenizer.
    """
    return {
        "identity": _identity(run),
        "position": run.batches.position(),
        "schedule": _schedule(run),
        "tokenizer": run.corpus.tokenizer.sha256 if run.corpus.tokenizer else None,
    }


def _schedule(run: Run) -> dict[str, Any]:
    """What decides each step's update; the number of steps does unless the rate is constant."""
    options = {f"optim.{key}": value for key, value in vars(run.cfg.optim).items()}
    steps = {} if run.cfg.optim.schedule == "constant" else {"train.steps": run.cfg.train.steps}
    return options | steps


def _identity(run: Run) -> dict[str, Any]:
    settings = dataclasses.asdict(run.cfg)
    split = ((key, *key.rpartition(".")[::2]) for key in RESUME_KEYS)
    values = {
        key: settings[section][name] if section else settings[name] for key, section, name in split
    }
    return values | {"the corpus": run.corpus.sha256}


def resolved_config(run: Run) -> dict[str, Any]:
    """The configuration with every ``auto`` resolved, as nested dicts; it reproduces the run."""
    return dataclasses.asdict(
        dataclasses.replace(
            run.cfg,
            model=run.model,
            resume=None,
            reschedule=False,
            distributed=DistributedConfig(),
        )
    )


def write_run_files(run: Run) -> None:
    """Write the resolved configuration and the tokenizer to the run's folder, in the first
    process.
    """
    if not processes.is_first():
        return
    if run.corpus.tokenizer:
        run.corpus.tokenizer.save(run.folder / TOKENIZER_FILE)
    if run.template:
        (run.folder / TEMPLATE_FILE).write_text(run.template)
    with write_whole(run.folder / "config.yaml") as file:  # last: it makes the folder a run's
        file.write(yaml.safe_dump(resolved_config(run), sort_keys=False).encode())
