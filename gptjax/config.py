"""The configuration: frozen dataclasses, read from YAML and the command line."""

import dataclasses

from gptjax.datasets.batches import Order
from gptjax.errors import ConfigError
from gptjax.generate.sampling import Sampler
from gptjax.models.config import ModelConfig
from gptjax.parallel.mesh import MeshConfig
from gptjax.parallel.processes import DistributedConfig
from gptjax.train.folders import check_name
from gptjax.train.optimizer import OptimConfig
from gptjax.train.step import Backward


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into batches."""

    dataset: str = "pydoc"
    """A named corpus (pydoc, tinyshakespeare, shakespeare-char, tinystories, openwebtext, fineweb, fineweb-edu), a folder of
    train*.bin and val*.bin token shards, or text: a file, folder or pattern of .txt, .jsonl or .parquet, maybe .gz or .zst."""
    root: str = "data"
    """Folder in which prepared corpora are kept."""
    tokenizer: str | None = None
    """What text is tokenized with: gpt2, byte, char, bpe:SIZE (trained on it), a file; by default a corpus's own, or gpt2."""
    column: str | None = None
    """Of .jsonl and .parquet, the column that holds the text; by default text, or else the first that holds any."""
    tokens: int | None = None
    """Training tokens that are enough, of tinystories, openwebtext, fineweb or fineweb-edu."""
    batch_size: int = 4
    """Sequences in a micro-batch (B)."""
    seq_len: int = 64
    """Tokens in a sequence (T)."""
    order: Order = "shuffle"
    """shuffle: windows in an order drawn from the seed; sequential: the corpus as it lies, as llm.c reads it."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a size is below 1.

        """
        _at_least("data", self, 1, "batch_size", "seq_len", *(["tokens"] if self.tokens is not None else []))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to do along the way. An interval of 0 turns its action off."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    backward: Backward = "manual"
    """Gradient that training runs: manual is the backward derived by hand, autodiff is JAX's."""
    log_every: int = 1
    """Steps between lines on the screen; the metrics file has every step."""
    eval_every: int = 50
    """Steps between validations; there is always one after the last step."""
    eval_tokens: int = 8192
    """Tokens of a validation, rounded up to whole sequences; the same ones each time."""
    sample_every: int = 0
    """Steps between samples; there is always one after the last step, unless sample_tokens is 0."""
    sample_tokens: int = 96
    """Tokens in a sample."""
    sample_prompt: str = "\n"
    """Text that a sample continues."""
    sample_temperature: float = Sampler.temperature
    """Divides the logits before drawing; 0 takes the likeliest token."""
    sample_top_k: int = Sampler.top_k
    """Draw among this many likeliest tokens; 0 for all."""
    checkpoint_every: int = 0
    """Steps between checkpoints; there is always one after the last step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    verify_every: int = 0
    """Steps between checks of the gradient of the live parameters and batch against JAX's; one that fails ends the run."""
    max_nonfinite: int = 5
    """Stop after this many non-finite losses or gradients in a row; each one's update is skipped."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of its range.

        """
        _at_least("train", self, 1, "steps", "log_every", "eval_tokens", "keep_checkpoints", "max_nonfinite")
        _at_least("train", self, 0, "eval_every", "sample_every", "sample_tokens", "checkpoint_every", "verify_every")
        _at_least("train", self, 0, "sample_temperature", "sample_top_k")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where else a run's numbers, samples and configuration go, for people to look at; metrics.jsonl has the numbers always."""

    tensorboard: bool = False
    """Write TensorBoard events to runs/NAME/tensorboard, for `tensorboard --logdir runs`; needs gptjax[tensorboard]."""
    wandb: str | None = None
    """PROJECT or ENTITY/PROJECT of Weights & Biases to log to; WANDB_MODE=offline keeps it on disk. Needs gptjax[wandb]."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a training run."""

    model: ModelConfig
    """The model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The corpus and its batches."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The loop."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Other places to log to."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """The processes."""
    name: str | None = None
    """Name of the run; the config file's name without it."""
    runs: str = "runs"
    """Folder in which runs are kept, each under its name; a new run never overwrites an old one, it gets a number."""
    seed: int = 0
    """Seed of the initial parameters, the batches' order, dropout and samples."""
    init: str | None = None
    """Weights to start from, in place of random ones: a run, or any model that gptjax.convert reads, as hf:gpt2."""
    resume: str | None = None
    """auto continues the newest run of this name from its last checkpoint, or starts it; a folder continues that run."""

    def __post_init__(self) -> None:
        """Check the seed, the name, and what to resume.

        Raises:
            ConfigError: the seed does not fit 32 bits, the name is not that of a folder, or nothing is named to resume.

        """
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.name is not None:
            check_name(self.name)
        if self.resume == "":
            raise ConfigError("resume is empty: name the folder of a run, or auto")


def _at_least(section: str, cfg: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < least:
            raise ConfigError(f"{section}.{name} must be at least {least}, not {getattr(cfg, name)}")
