"""A training run before its first step: everything checked, every ``auto`` decided, its folder its own."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import numpy as np
import yaml
from jax.sharding import Mesh

from gptjax import datasets, distributed, folders
from gptjax.checkpoint import Restored, restore_newest
from gptjax.config import Config
from gptjax.data import BatchShape, TrainingBatches, validation_batches
from gptjax.datasets import TOKENIZER_FILE, Corpus
from gptjax.distributed import DistributedConfig
from gptjax.durable import write_whole
from gptjax.errors import CheckpointError, ConfigError, DataError
from gptjax.generate import Sampler, sample
from gptjax.loggers import check_installed
from gptjax.mesh import describe_mesh, make_mesh, place_rows, row_share, whole
from gptjax.metrics import human_bytes
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, flops_per_token, num_params
from gptjax.optim import Optimizer, make_optimizer
from gptjax.steps import CompiledStep
from gptjax.tokenizers import Tokenizer

# A resumed run sees the batches that it would have seen only while these stay the same.
RESUME_KEYS = ("data.batch_size", "data.seq_len", "data.order", "optim.accumulate", "seed")


class Run(NamedTuple):
    """What a run is made of."""

    cfg: Config
    model: GPT2Config
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
    start_jax(cfg.model)
    distributed.require_same(dataclasses.replace(cfg, distributed=DistributedConfig()))
    model = cfg.model.resolve(platform_name(), cfg.data.seq_len)
    mesh = make_mesh(cfg.mesh, model, cfg.data.batch_size)
    share = row_share(mesh, cfg.data.batch_size)
    data = cfg.data
    find = partial(datasets.find_corpus, data.dataset, data.root, data.tokenizer, data.column, data.tokens)
    corpus = datasets.fitted(distributed.first_then_others("corpus", find), model.vocab_size)
    prompt_ids(corpus.tokenizer, cfg.train.sample_prompt)  # better now than after the last step
    shape = BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len)
    return Run(
        cfg=cfg,
        model=model,
        shape=shape,
        corpus=corpus,
        batches=TrainingBatches(corpus.train, shape, data.order, cfg.seed, model.vocab_size, share),
        val=validation_batches(corpus.val, cfg.train.eval_tokens, shape.batch_size, shape.seq_len, model.vocab_size),
        optimizer=make_optimizer(cfg.optim, cfg.train.steps),
        key=whole(mesh, jax.random.key(cfg.seed)),
        mesh=mesh,
        share=share,
    )


def start_jax(model: GPT2Config) -> None:
    """Start JAX's backend, with 64-bit numbers where the model asks for them.

    Raises:
        ConfigError: the platform that JAX was told to use is not there.

    """
    if model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError, AssertionError and others
        raise ConfigError(
            f"JAX cannot start: {str(error) or 'no such device'}; unset JAX_PLATFORMS to use what there is"
        ) from error


def platform_name() -> str:
    """The platform that JAX computes on: cpu, cuda, rocm or tpu."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return backend.platform
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"


@contextlib.contextmanager
def owned(run: Run) -> Iterator[Run]:
    """The run with its folder, which until the block ends no other run can have; the first process sees to that.

    Raises:
        CheckpointError: the folder to resume is not a run's, or a run that is being trained owns it.

    """
    cfg = run.cfg
    with contextlib.ExitStack() as until_the_end:
        own = lambda: str(until_the_end.enter_context(folders.owned(Path(cfg.runs), cfg.name or "run", cfg.resume)))  # noqa: E731
        yield run._replace(folder=Path(distributed.agreed("folder", own)))


def restore(run: Run) -> Restored | None:
    """The newest checkpoint in the run's folder, the batches moved to its position; None where there is none.

    Raises:
        CheckpointError: the model or the order of the batches differs from the checkpoint's, all checkpoints are damaged,
            or a folder is named that has none.

    """
    folder = run.folder / "checkpoints"
    restored = restore_newest(folder, run.model, run.optimizer, run.mesh)
    if not restored and run.cfg.resume != "auto":
        raise CheckpointError(f"{folder} holds no checkpoint to resume from; --resume auto would start the run afresh")
    if restored:
        now = _identity(run)
        for key, value in restored.meta["identity"].items():
            if now[key] != value:
                raise CheckpointError(
                    f"{run.folder} was trained with {key} {value}, not {now[key]}: give it that value to resume"
                )
        run.batches.seek(restored.meta["position"])
    return restored


def checkpoint_meta(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays: which batches the run reads, where it is in them, and with what tokenizer."""
    tokenizer = run.corpus.tokenizer.sha256 if run.corpus.tokenizer else None
    return {"identity": _identity(run), "position": run.batches.position(), "tokenizer": tokenizer}


def _identity(run: Run) -> dict[str, Any]:
    settings = dataclasses.asdict(run.cfg)
    split = ((key, *key.rpartition(".")[::2]) for key in RESUME_KEYS)
    values = {key: settings[section][name] if section else settings[name] for key, section, name in split}
    return values | {"the corpus": run.corpus.sha256}


def resolved(run: Run) -> dict[str, Any]:
    """The configuration with every ``auto`` decided, as nested dicts: what repeats the run."""
    return dataclasses.asdict(dataclasses.replace(run.cfg, model=run.model, resume=None, distributed=DistributedConfig()))


def fill_folder(run: Run) -> None:
    """Write the configuration as resolved, and the tokenizer, into the run's folder: in the first process."""
    if not distributed.is_first():
        return
    if run.corpus.tokenizer:
        run.corpus.tokenizer.save(run.folder / TOKENIZER_FILE)
    with write_whole(run.folder / "config.yaml") as file:  # with which the folder is that of a run
        file.write(yaml.safe_dump(resolved(run), sort_keys=False).encode())


def sample_text(run: Run, params: Params, step: int) -> str:
    """The configured prompt and what the model makes of it; ids where no tokenizer is known."""
    cfg, tokenizer = run.cfg.train, run.corpus.tokenizer
    prompt = prompt_ids(tokenizer, cfg.sample_prompt)
    ids = sample(
        params,
        [prompt],
        jax.random.fold_in(run.key, step),
        cfg=run.model,
        new_tokens=cfg.sample_tokens,
        sampler=Sampler(cfg.sample_temperature, cfg.sample_top_k),
        allowed=tokenizer.vocab_size if tokenizer else None,
        fetch=lambda x: np.asarray(whole(run.mesh, x)),
    )[0].tolist()
    return tokenizer.decode(prompt + ids) if tokenizer else " ".join(map(str, ids))


def prompt_ids(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """At least one id to start a sample from.

    Those of the prompt; if it is empty, end-of-text, or a line end where there is none. Without a tokenizer, or where its
    vocabulary has no line end, the first id.

    Raises:
        DataError: the vocabulary lacks a character of the prompt, other than a line end.

    """
    if not tokenizer:
        return [0]
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode(prompt or "\n")
    except DataError:
        if prompt.strip("\n"):
            raise
        return [0]


def describe(run: Run) -> str:
    """What will be trained, and on what: a few lines."""
    model, shape, corpus = run.model, run.shape, run.corpus
    train, val = (sum(shard.tokens.size for shard in shards) for shards in (corpus.train, corpus.val))
    vocabulary = f"{corpus.tokenizer.vocab_size} ids" if corpus.tokenizer else "unknown, so samples show ids"
    gflop = flops_per_token(model, shape.seq_len) * shape.tokens / 1e9
    processes = f"{jax.process_count()} processes; should one be lost, all end within {run.cfg.distributed.timeout} s"
    idle = jax.device_count() - (run.mesh.size if run.mesh else 1)
    lines = {
        "device": [
            f"{platform_name()} ({jax.devices()[0].device_kind})",
            f"jax {jax.__version__}",
            *([f"{idle} more like it idle: --mesh.data -1 takes all"] if idle else []),
        ],
        **({"mesh": [describe_mesh(run.mesh)]} if run.mesh else {}),
        **({"processes": [processes]} if jax.process_count() > 1 else {}),
        "model": [
            f"{num_params(model):,} parameters",
            f"{model.num_layers} layers",
            f"{model.num_heads} heads",
            f"{model.channels} channels",
            f"vocabulary {model.vocab_size}",
        ],
        "compute": [
            model.dtype,
            f"attention {model.attention}",
            f"layers {model.layers}",
            f"recompute {model.recompute}",
            f"backward {run.cfg.train.backward}",
        ],
        "corpus": [str(corpus.folder), f"{train:,} training and {val:,} validation tokens", f"sha256 {corpus.sha256[:16]}"],
        "tokenizer": [vocabulary],
        "step": [
            f"{shape.tokens:,} tokens ({shape.accumulate} x {shape.batch_size} x {shape.seq_len})",
            run.cfg.data.order,
            f"{gflop:,.1f} GFLOP",
        ],
        "run": [str(run.folder), f"{run.cfg.train.steps} steps", f"seed {run.cfg.seed}"],
    }
    return "\n".join(f"{name:<10} {', '.join(parts)}" for name, parts in lines.items())


def describe_memory(compiled: CompiledStep, seconds: float) -> str:
    """What the compiler says a step needs."""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in compiled.memory.items())
    total = human_bytes(sum(compiled.memory.values()))
    native = ", AdamW in C++" if compiled.native else ""
    return f"{'memory':<10} {total} predicted: {parts}; compiled in {seconds:.1f} s{native}"
