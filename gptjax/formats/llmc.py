"""llm.c's model files (``gpt2_124M.bin``) and the gradients it tests itself against (``gpt2_124M_debug_state.bin``).

Both begin with 256 int32. A model's are ``[20240326, version, maxT, V, L, heads, C, Vp]``, and its versions:

==  =========================================  ===========================
1   float32, vocabulary unpadded (no ``Vp``)   read
2   bfloat16, in layouts that changed          refused: it is ambiguous
3   float32, vocabulary padded                 read and written
4   bfloat16, LayerNorm tensors float32        read
5   bfloat16                                   read and written
==  =========================================  ===========================

A debug state's are ``[20240327, version, B, T]``, version 1 for an unpadded and 2 for a padded vocabulary; then inputs and
targets (B, T) int32, logits (B, T, V), the loss, and the gradients in the order of the model's tensors, float32.
Tensors are in llm.c's order, which is `Params`', stacked over the layers, and matrices are (out, in), the transpose of ours.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.errors import ConfigError, FormatError
from gptjax.files import open_file
from gptjax.formats.binary import HEADER_BYTES, check_size, read_header, write_file
from gptjax.formats.lazy import collect, tensor_names, tensor_of
from gptjax.models.config import GPT2Config
from gptjax.models.params import Params, param_shapes

MODEL_MAGIC, STATE_MAGIC = 20240326, 20240327
MODEL, STATE = "llm.c model", "llm.c debug state"
BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT32 = np.dtype("<f4")
TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")
LARGEST = 2**24  # of any field of a header: beyond what GPT-2 could be


class DebugState(NamedTuple):
    """A batch, and what the model makes of it."""

    inputs: np.ndarray
    """(B, T) int32."""
    targets: np.ndarray
    """(B, T) int32."""
    logits: np.ndarray
    """(B, T, V) float32."""
    loss: float
    grads: Params
    """float32, stacked over the layers, (in, out)."""


def is_model(path: Path) -> bool:
    """Whether the file begins as a model of llm.c does."""
    with open_file(path) as file:
        return file.read(4) == MODEL_MAGIC.to_bytes(4, "little")


def read_model(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """The model's dimensions, and its tensors, which stay in the file until they are used.

    Raises:
        FormatError: not such a file: wrong magic, version, a field out of range, or another size than they imply.

    """
    path = Path(path)
    header, size = read_header(path, MODEL)
    magic, version, max_seq_len, vocab_size, num_layers, num_heads, channels, padded = header[:8]
    if magic != MODEL_MAGIC:
        raise FormatError(f"{path} is not an {MODEL}: it begins {magic} where {MODEL_MAGIC} is expected")
    if version == 2:
        raise FormatError(f"{path} is an {MODEL} of version 2, whose layout changed over time: write it again as version 5")
    if version not in (1, 3, 4, 5):
        raise FormatError(f"{path} is an {MODEL} of version {version}: versions 1, 3, 4 and 5 can be read")
    padded = vocab_size if version == 1 else padded
    fields = (max_seq_len, vocab_size, num_layers, num_heads, channels)
    if not all(1 <= field <= LARGEST for field in (*fields, padded)) or padded < vocab_size:
        raise FormatError(f"{path} is no {MODEL}: its header holds the sizes {', '.join(map(str, (*fields, padded)))}")
    try:
        cfg = GPT2Config(None, num_layers, num_heads, channels, vocab_size, max_seq_len)
    except ConfigError as error:
        raise FormatError(f"{path} holds a model that cannot be: {error}") from error
    dtypes = Params(
        *(FLOAT32 if version in (1, 3) or (version == 4 and n.startswith("ln")) else BFLOAT16 for n in Params._fields)
    )
    shapes = _shapes(cfg, padded)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    check_size(path, MODEL, size, HEADER_BYTES + sum(sizes), f"{num_layers} layers of {channels} channels in version {version}")
    tensors: dict[str, np.ndarray] = {}
    offset = HEADER_BYTES
    for name, shape, dtype, nbytes in zip(Params._fields, shapes, dtypes, sizes, strict=True):
        tensors[name] = np.memmap(path, dtype, "r", offset, shape)
        offset += nbytes

    def load(name: str, layer: int | None) -> np.ndarray:
        array = tensors[name] if layer is None else tensors[name][layer]
        return array.T if name in TRANSPOSED else array[:vocab_size] if name == "wte" else array

    return cfg, collect(cfg, load, lambda name, _: tensors[name].dtype)


def write_model(path: str | os.PathLike[str], params: Params, cfg: GPT2Config, version: int = 3) -> None:
    """Write a model as version 3 (float32) or 5 (bfloat16), tensor by tensor.

    Args:
        path: the file; it appears whole or not at all.
        params: in either layout, with or without pad rows.
        cfg: their dimensions.
        version: 3 or 5.

    Raises:
        ValueError: another version.
        OSError: it cannot be written.

    """
    if version not in (3, 5):
        raise ValueError(f"version 3 or 5 can be written, not {version}")
    sizes = cfg.max_seq_len, cfg.vocab_size, cfg.num_layers, cfg.num_heads, cfg.channels, cfg.padded_vocab_size
    dtype = FLOAT32 if version == 3 else BFLOAT16
    write_file(path, [MODEL_MAGIC, version, *sizes], _to_file(params, dtype, cfg.padded_vocab_size, cfg))


def read_debug_state(path: str | os.PathLike[str], cfg: GPT2Config) -> DebugState:
    """A debug state of the model of dimensions ``cfg``, which the file itself does not tell.

    Raises:
        FormatError: not such a file: wrong magic, version or size, or a token id that the vocabulary lacks.

    """
    path = Path(path)
    (magic, version, B, T, *_), size = read_header(path, STATE)
    if magic != STATE_MAGIC or version not in (1, 2):
        raise FormatError(f"{path} is not an {STATE}: it begins {magic}, {version} where {STATE_MAGIC}, 1 or 2 is expected")
    if not (1 <= B <= LARGEST and 1 <= T <= cfg.max_seq_len):
        raise FormatError(f"{path} announces {B} sequences of {T} tokens, but the model takes 1 to {cfg.max_seq_len} tokens")
    shapes = _shapes(cfg, cfg.vocab_size if version == 1 else cfg.padded_vocab_size)
    counts = [B * T, B * T, B * T * cfg.vocab_size, 1, *map(math.prod, shapes)]
    announced = f"{B} sequences of {T} tokens for this model"
    check_size(path, STATE, size, HEADER_BYTES + 4 * sum(counts), announced)
    numbers = np.memmap(path, "<i4", "r", HEADER_BYTES, (sum(counts),))
    inputs, targets, logits, loss, *grads = np.split(numbers, np.cumsum(counts)[:-1])
    for ids in (inputs, targets):
        if ids.min() < 0 or ids.max() >= cfg.vocab_size:
            raise FormatError(
                f"{path} holds the token ids {ids.min()}..{ids.max()}, but the model knows 0..{cfg.vocab_size - 1}"
            )
    tensors = [g.view(FLOAT32).reshape(shape) for g, shape in zip(grads, shapes, strict=True)]
    return DebugState(
        inputs.reshape(B, T),
        targets.reshape(B, T),
        logits.view(FLOAT32).reshape(B, T, cfg.vocab_size),
        float(loss.view(FLOAT32)[0]),
        _from_file(tensors, cfg),
    )


def write_debug_state(path: str | os.PathLike[str], state: DebugState, cfg: GPT2Config, version: int = 2) -> None:
    """Write a debug state; version 2 is what llm.c's C test reads.

    Raises:
        ValueError: a version other than 1 and 2.
        OSError: it cannot be written.

    """
    if version not in (1, 2):
        raise ValueError(f"version 1 or 2 can be written, not {version}")

    def arrays() -> Iterator[np.ndarray]:
        yield np.asarray(state.inputs, "<i4")
        yield np.asarray(state.targets, "<i4")
        yield np.asarray(state.logits, FLOAT32)
        yield np.asarray([state.loss], FLOAT32)
        yield from _to_file(state.grads, FLOAT32, cfg.vocab_size if version == 1 else cfg.padded_vocab_size, cfg)

    write_file(path, [STATE_MAGIC, version, *state.inputs.shape], arrays())


def _shapes(cfg: GPT2Config, rows: int) -> Params:
    """Shapes in the file, where the token embedding has ``rows`` rows."""
    ours = param_shapes(cfg)
    turned = Params(*((s[0], s[2], s[1]) if n in TRANSPOSED else s for n, s in zip(Params._fields, ours, strict=True)))
    return turned._replace(wte=(rows, cfg.channels))


def _from_file(tensors: list[np.ndarray], cfg: GPT2Config) -> Params:
    """Our order of axes, and our padding of the vocabulary, with zeros."""
    params = Params(*(t.swapaxes(1, 2) if n in TRANSPOSED else t for n, t in zip(Params._fields, tensors, strict=True)))
    rows = params.wte[: cfg.vocab_size]
    return params._replace(wte=np.pad(rows, ((0, cfg.padded_vocab_size - cfg.vocab_size), (0, 0))))


def _to_file(params: Params, dtype: Any, rows: int, cfg: GPT2Config) -> Iterator[np.ndarray]:
    """Each tensor, layer by layer where it has layers, as the file has it; its token embedding has ``rows`` rows."""
    for name, layer, _ in tensor_names(cfg):
        tensor = tensor_of(params, name, layer, cfg).astype(dtype, copy=False)
        yield tensor.T if name in TRANSPOSED else tensor
        if name == "wte":
            yield np.zeros((rows - cfg.vocab_size, cfg.channels), dtype)
