"""A training run before its first step: everything checked, every ``auto`` decided, its folder its
own.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from gptjax import datasets
from gptjax.config import Config, DistributedConfig, ModelConfig
from gptjax.datasets import TOKENIZER_FILE, Corpus
from gptjax.datasets.batches import BatchShape, TrainingBatches, validation_batches
from gptjax.errors import CheckpointError
from gptjax.files import write_whole
from gptjax.models.batch import Batch
from gptjax.parallel import processes
from gptjax.parallel.mesh import make_mesh, place_rows, row_share, whole
from gptjax.train import folders
from gptjax.train.checkpoint import Restored, restore_newest
from gptjax.train.loggers import check_installed
from gptjax.train.optimizer import Optimizer, make_optimizer
from gptjax.xla.backend import platform_name, start_jax

# A resumed run sees the batches that it would have seen only while these stay the same.
RESUME_KEYS = ("data.batch_size", "data.seq_len", "data.order", "optim.accumulate", "seed")


class Run(NamedTuple):
    """What a run is made of."""

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
    folder: Path = Path()
    """Where it is kept: the one that it has `owned`."""

    def next_batch(self) -> Batch:
        """The next step's, laid out over the mesh: of this process's rows, and the others'."""
        return place_rows(self.mesh, next(self.batches), self.share[1])


def set_up(cfg: Config) -> Run:
    """Open the corpus and decide every ``auto``; nothing is computed or written yet.

    Raises:
        GptjaxError: anything about the configuration or the corpus that a person can mend.

    """
    check_installed(cfg.log)
    start_jax(cfg.model.dtype)
    processes.require_same(dataclasses.replace(cfg, distributed=DistributedConfig()))
    model = cfg.model.resolve(platform_name(), cfg.data.seq_len)
    # Better an error now than after a download
    make_mesh(cfg.mesh, model.axis_sizes, cfg.data.batch_size)
    data = cfg.data
    find = partial(
        datasets.find_corpus, data.dataset, data.root, data.tokenizer, data.column, data.tokens
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
    )


@contextlib.contextmanager
def owned(run: Run) -> Iterator[Run]:
    """The run with its folder, which until the block ends no other run can have; the first process
    sees to that.

    Raises:
        CheckpointError: the folder to resume is not a run's, or a run that is being trained owns
            it.

    """
    cfg = run.cfg
    with contextlib.ExitStack() as until_the_end:

        def own() -> str:
            folder = folders.owned(Path(cfg.runs), cfg.name or "run", cfg.resume)
            return str(until_the_end.enter_context(folder))

        yield run._replace(folder=Path(processes.agreed("folder", own)))


def restore(run: Run) -> Restored | None:
    """The newest checkpoint in the run's folder, the batches moved to its position; None where
    there is none.

    Raises:
        CheckpointError: the model or the order of the batches differs from the checkpoint's, all
            checkpoints are damaged, or a folder is named that has none.

    """
    folder = run.folder / "checkpoints"
    restored = restore_newest(folder, run.model, run.optimizer, run.mesh)
    if not restored and run.cfg.resume != "auto":
        raise CheckpointError(
            f"{folder} holds no checkpoint to resume from; --resume auto would start the run afresh"
        )
    if restored:
        now = _identity(run)
        for key, value in restored.meta["identity"].items():
            if now[key] != value:
                raise CheckpointError(
                    f"{run.folder} was trained with {key} {value}, not {now[key]}: give it that "
                    "value to resume"
                )
        run.batches.seek(restored.meta["position"])
    return restored


def checkpoint_meta(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays: which batches the run reads, where it is in them,
    and with what tokenizer.
    """
    tokenizer = run.corpus.tokenizer.sha256 if run.corpus.tokenizer else None
    return {"identity": _identity(run), "position": run.batches.position(), "tokenizer": tokenizer}


def _identity(run: Run) -> dict[str, Any]:
    settings = dataclasses.asdict(run.cfg)
    split = ((key, *key.rpartition(".")[::2]) for key in RESUME_KEYS)
    values = {
        key: settings[section][name] if section else settings[name] for key, section, name in split
    }
    return values | {"the corpus": run.corpus.sha256}


def resolved(run: Run) -> dict[str, Any]:
    """The configuration with every ``auto`` decided, as nested dicts: what repeats the run."""
    return dataclasses.asdict(
        dataclasses.replace(run.cfg, model=run.model, resume=None, distributed=DistributedConfig())
    )


def fill_folder(run: Run) -> None:
    """Write the configuration as resolved, and the tokenizer, into the run's folder: in the first
    process.
    """
    if not processes.is_first():
        return
    if run.corpus.tokenizer:
        run.corpus.tokenizer.save(run.folder / TOKENIZER_FILE)
    with write_whole(run.folder / "config.yaml") as file:  # with which the folder is that of a run
        file.write(yaml.safe_dump(resolved(run), sort_keys=False).encode())
