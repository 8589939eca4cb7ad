"""What a model is, and how it is computed."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from gptjax.errors import ConfigError
from gptjax.ops.splash import LANES

PRESETS = {  # of each family: num_layers, num_heads, channels
    "124m": ("gpt2", 12, 12, 768),
    "350m": ("gpt2", 24, 16, 1024),
    "774m": ("gpt2", 36, 20, 1280),
    "1558m": ("gpt2", 48, 25, 1600),
}
VOCAB_MULTIPLE = 128
SHORT_SEQUENCE = {"cpu": 128}  # beyond, blockwise attention takes less memory and, at 256 tokens on CPU, no longer
SHORT_SEQUENCE_ELSEWHERE = 256  # not measured


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the weights are: the family and its dimensions. A checkpoint keeps it."""

    family: str = "gpt2"
    """The network: gpt2."""
    num_layers: int = 0
    """Transformer blocks (L); 0 takes the preset's."""
    num_heads: int = 0
    """Attention heads (H), a divisor of channels; 0 takes the preset's."""
    channels: int = 0
    """Width of the residual stream (C); 0 takes the preset's."""
    hidden: int = 0
    """Hidden units of the MLP (F); 0 is four times the channels."""
    vocab_size: int = 50257
    """Token ids the model knows (V); the tables are padded to a multiple of 128."""
    max_seq_len: int = 1024
    """Longest sequence."""

    def __post_init__(self) -> None:
        """Fill in the hidden units and check every field.

        Raises:
            ConfigError: a dimension is missing or does not divide, or a number is out of range.

        """
        if self.hidden == 0:
            object.__setattr__(self, "hidden", 4 * self.channels)
        for name in ("num_layers", "num_heads", "channels", "hidden", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.channels % self.num_heads:
            raise ConfigError(
                f"model.channels {self.channels} does not divide by model.num_heads {self.num_heads}: "
                f"choose a multiple, such as {self.num_heads * max(1, round(self.channels / self.num_heads))}"
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
        """The size of each logical axis of a weight, by its letter in the legend of `gptjax.ops`."""
        return {
            "L": self.num_layers,
            "C": self.channels,
            "H": self.num_heads,
            "D": self.head_dim,
            "F": self.hidden,
            "Vp": self.padded_vocab_size,
            "T": self.max_seq_len,
        }


DIMENSIONS = tuple(field.name for field in dataclasses.fields(Architecture))


@dataclasses.dataclass(frozen=True)
class Computation:
    """How a model is computed; the weights do not depend on it."""

    dropout: float = 0.0
    """Dropout rate on embeddings, attention probabilities and both residual branches."""
    dropout_mlp: float = 0.0
    """Dropout rate inside the MLP, on its activations."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters stay float32."""
    attention: Literal["auto", "materialised", "blockwise", "cudnn", "splash"] = "auto"
    """Attention implementation; auto picks by platform and sequence length."""
    layers: Literal["unroll", "scan"] = "unroll"
    """Unrolled layers run faster; scanned ones compile faster."""
    recompute: Literal["none", "gelu", "block"] = "none"
    """What the backward computes again instead of storing: nothing, the MLP's activations, or each whole block."""
    loss_chunks: int = 1
    """Chunks of the classifier's rows: more chunks keep fewer logits in memory at once."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a number is out of range.

        """
        for name in ("dropout", "dropout_mlp"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.loss_chunks < 1:
            raise ConfigError(f"model.loss_chunks must be at least 1, not {self.loss_chunks}")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Computation, Architecture):
    """The section ``model`` of a configuration: what the model is, and how it is computed.

    Immutable and hashable, so that it can be a static argument of a jitted function.
    """

    preset: Literal["124m", "350m", "774m", "1558m"] | None = None
    """A published size: sets num_layers, num_heads and channels, each of which may still be given."""

    def __post_init__(self) -> None:
        """Fill in what the preset implies and check every field.

        Raises:
            ConfigError: a dimension is missing or does not divide, or a number is out of range.

        """
        names = "family", "num_layers", "num_heads", "channels"
        preset = dict(zip(names, PRESETS[self.preset], strict=True)) if self.preset else {}
        for name in names[1:]:
            if getattr(self, name) == 0:
                if name not in preset:
                    raise ConfigError(f"model.{name} is missing: give it, or choose model.preset from {', '.join(PRESETS)}")
                object.__setattr__(self, name, preset[name])
        Architecture.__post_init__(self)
        Computation.__post_init__(self)

    @property
    def architecture(self) -> Architecture:
        """What a checkpoint keeps."""
        return Architecture(**{name: getattr(self, name) for name in DIMENSIONS})

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations; call on a `resolve`d config."""
        return jnp.dtype(self.dtype)

    def resolve(self, platform: str, seq_len: int) -> "ModelConfig":
        """The same config with every ``auto`` decided for ``platform`` ("cpu", "cuda", "rocm", "tpu") and sequence length.

        Raises:
            ConfigError: the sequence is too long, or a kernel for attention is asked for where it cannot run.

        """
        if not 1 <= seq_len <= self.max_seq_len:
            raise ConfigError(
                f"data.seq_len {seq_len} does not fit model.max_seq_len {self.max_seq_len}: it must be between 1 and that"
            )
        dtype = ("float32" if platform == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype
        obstacles: dict[Any, str | None] = {
            "cudnn": self._cudnn_obstacle(platform, dtype),
            "splash": self._splash_obstacle(platform, dtype, seq_len),
        }
        if obstacle := obstacles.get(self.attention):
            raise ConfigError(f"model.attention {self.attention} {obstacle}: choose auto, materialised or blockwise")
        attention, short = self.attention, SHORT_SEQUENCE.get(platform, SHORT_SEQUENCE_ELSEWHERE)
        if attention == "auto":
            without: Any = "materialised" if seq_len <= short else "blockwise"
            attention = next((kernel for kernel, obstacle in obstacles.items() if not obstacle), without)
        return dataclasses.replace(self, dtype=dtype, attention=attention)

    def _cudnn_obstacle(self, platform: str, dtype: str) -> str | None:
        if platform != "cuda":
            return f"needs an NVIDIA GPU, not {platform}"
        if dtype != "bfloat16":
            return f"needs model.dtype bfloat16, not {dtype}"
        if self.head_dim % 8 or self.head_dim > 128:
            return f"needs heads of a multiple of 8 and at most 128 channels, not {self.head_dim}"
        if self.dropout:
            return "offers no dropout"
        return None

    def _splash_obstacle(self, platform: str, dtype: str, seq_len: int) -> str | None:
        if platform != "tpu":
            return f"needs a TPU, not {platform}"
        if dtype == "float64":
            return "needs model.dtype bfloat16 or float32, not float64"
        if seq_len % LANES:
            return f"needs data.seq_len to be a multiple of {LANES}, not {seq_len}"
        if self.dropout:
            return "offers no dropout"
        return None
