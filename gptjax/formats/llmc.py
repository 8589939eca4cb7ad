"""llm.c's model files (``gpt2_124M.bin``) and reference gradients (``gpt2_124M_debug_state.bin``).

Both begin with 256 int32. A model's are ``[20240326, version, maxT, V, L, heads, C, Vp]``, and its
versions:

==  =========================================  ===========================
1   float32, vocabulary unpadded (no ``Vp``)   read
2   bfloat16, whose layout changed over time   refused: it is ambiguous
3   float32, vocabulary padded                 read and written
4   bfloat16, LayerNorm tensors float32        read
5   bfloat16                                   read and written
==  =========================================  ===========================

A debug state's are ``[20240327, version, B, T]``, version 1 for an unpadded and 2 for a padded
vocabulary; then inputs and targets (B, T) int32, logits (B, T, V), the loss, and the gradients in
the order of the model's tensors, float32. Tensors are in the order of `TABLES`, stacked over the
layers; matrices are (out, in), the transpose of ours. The header has no family and no hidden width:
the model is GPT-2, its MLP four times as wide as the channels.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import Architecture
from gptjax.errors import ConfigError, FormatError
from gptjax.files import open_file
from gptjax.formats.binary import HEADER_BYTES, check_size, read_header, write_file
from gptjax.formats.lazy import pad_vocab
from gptjax.formats.tables import (
    FileTensor,
    Part,
    Table,
    each_layer,
    file_tensors,
    join,
    open_params,
    table_of,
)
from gptjax.models.family import family_of
from gptjax.models.params import rows

MODEL_MAGIC, STATE_MAGIC = 20240326, 20240327
MODEL, STATE = "llm.c model", "llm.c debug state"
BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT32 = np.dtype("<f4")
TABLES: dict[str, Table] = {
    "gpt2": {
        "wte": "wte",
        "wpe": "wpe",
        "ln1w": "ln1w",
        "ln1b": "ln1b",
        "qkvw": "qw kw vw",
        "qkvb": "qb kb vb",
        "attprojw": "attprojw",
        "attprojb": "attprojb",
        "ln2w": "ln2w",
        "ln2b": "ln2b",
        "fcw": "fcw",
        "fcb": "fcb",
        "fcprojw": "fcprojw",
        "fcprojb": "fcprojb",
        "lnfw": "lnfw",
        "lnfb": "lnfb",
    }
}
LARGEST = 2**24  # upper bound of any header field


class DebugState(NamedTuple):
    """A batch with the model's logits, loss and gradients."""

    inputs: np.ndarray
    """(B, T) int32."""
    targets: np.ndarray
    """(B, T) int32."""
    logits: np.ndarray
    """(B, T, V) float32."""
    loss: float
    grads: Any
    """Gradients, float32; when read, NumPy arrays, padded, stacked over the layers."""


def is_model(path: Path) -> bool:
    """Whether the file begins with the magic number of an llm.c model."""
    with open_file(path) as file:
        return file.read(4) == MODEL_MAGIC.to_bytes(4, "little")


def read_model(path: str | os.PathLike[str]) -> tuple[Architecture, Any]:
    """Read the architecture, and the parameters as `LazyTensor`s.

    Raises:
        FormatError: wrong magic or version, a field out of range, or a size that does not match the
            header.

    """
    path = Path(path)
    header, size = read_header(path, MODEL)
    magic, version, max_seq_len, vocab_size, num_layers, num_heads, channels, padded = header[:8]
    if magic != MODEL_MAGIC:
        raise FormatError(
            f"{path} is not an {MODEL}: it begins {magic} where {MODEL_MAGIC} is expected"
        )
    if version == 2:
        raise FormatError(
            f"{path} is an {MODEL} of version 2, whose layout changed over time: write it again "
            "as version 5"
        )
    if version not in (1, 3, 4, 5):
        raise FormatError(
            f"{path} is an {MODEL} of version {version}: versions 1, 3, 4 and 5 can be read"
        )
    padded = vocab_size if version == 1 else padded
    fields = (max_seq_len, vocab_size, num_layers, num_heads, channels)
    if not all(1 <= field <= LARGEST for field in (*fields, padded)) or padded < vocab_size:
        raise FormatError(
            f"{path} is not an {MODEL}: its header holds the sizes "
            f"{', '.join(map(str, (*fields, padded)))}"
        )
    try:
        cfg = Architecture(
            family="gpt2",
            num_layers=num_layers,
            num_heads=num_heads,
            channels=channels,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
        )
    except ConfigError as error:
        raise FormatError(f"{path} holds an invalid model: {error}") from error
    tensors = _tensors(cfg, padded)

    def dtype_of(tensor: FileTensor, layer: int | None = None) -> np.dtype:
        return (
            FLOAT32
            if version in (1, 3) or (version == 4 and tensor.name.startswith("ln"))
            else BFLOAT16
        )

    sizes = [math.prod(_stacked(tensor, cfg)) * dtype_of(tensor).itemsize for tensor in tensors]
    check_size(
        path,
        MODEL,
        size,
        HEADER_BYTES + sum(sizes),
        f"{num_layers} layers of {channels} channels in version {version}",
    )
    arrays: dict[str, np.ndarray] = {}
    offset = HEADER_BYTES
    for tensor, nbytes in zip(tensors, sizes, strict=True):
        arrays[tensor.name] = np.memmap(path, dtype_of(tensor), "r", offset, _stacked(tensor, cfg))
        offset += nbytes

    def read(tensor: FileTensor, layer: int | None, part: Part) -> np.ndarray:
        array = arrays[tensor.name]
        return (array if layer is None else array[layer])[part.place]

    return cfg, open_params(tensors, cfg, read, dtype_of)


def write_model(
    path: str | os.PathLike[str], params: Any, cfg: Architecture, version: int = 3
) -> None:
    """Write a model as version 3 (float32) or 5 (bfloat16), tensor by tensor.

    Args:
        path: the file, written atomically.
        params: in either layout, with or without pad rows.
        cfg: the model.
        version: 3 or 5.

    Raises:
        ConfigError: the format cannot describe the model.
        ValueError: any other version.
        OSError: it cannot be written.

    """
    if version not in (3, 5):
        raise ValueError(f"version 3 or 5 can be written, not {version}")
    sizes = (
        cfg.max_seq_len,
        cfg.vocab_size,
        cfg.num_layers,
        cfg.num_heads,
        cfg.channels,
        cfg.padded_vocab_size,
    )
    dtype = FLOAT32 if version == 3 else BFLOAT16
    tensors = _tensors(cfg, cfg.padded_vocab_size)
    if cfg.hidden != 4 * cfg.channels:
        raise ConfigError(
            f"an {MODEL} has four hidden units for each channel, but this model has "
            f"model.hidden {cfg.hidden} and model.channels {cfg.channels}: write safetensors "
            "instead"
        )
    write_file(path, [MODEL_MAGIC, version, *sizes], _arrays(tensors, params, dtype, cfg))


def read_debug_state(path: str | os.PathLike[str], cfg: Architecture) -> DebugState:
    """Read a debug state of the model ``cfg``; the file does not describe its model.

    Raises:
        ConfigError: the format does not support the family.
        FormatError: wrong magic, version or size, or a token id outside the vocabulary.

    """
    path = Path(path)
    (magic, version, B, T, *_), size = read_header(path, STATE)
    if magic != STATE_MAGIC or version not in (1, 2):
        raise FormatError(
            f"{path} is not an {STATE}: it begins {magic}, {version} where {STATE_MAGIC}, 1 or 2 "
            "is expected"
        )
    if not (1 <= B <= LARGEST and 1 <= T <= cfg.max_seq_len):
        raise FormatError(
            f"{path} announces {B} sequences of {T} tokens, but the model takes 1 to "
            f"{cfg.max_seq_len} tokens"
        )
    tensors = _tensors(cfg, cfg.vocab_size if version == 1 else cfg.padded_vocab_size)
    shapes = [_stacked(tensor, cfg) for tensor in tensors]
    counts = [B * T, B * T, B * T * cfg.vocab_size, 1, *map(math.prod, shapes)]
    announced = f"{B} sequences of {T} tokens for this model"
    check_size(path, STATE, size, HEADER_BYTES + 4 * sum(counts), announced)
    numbers = np.memmap(path, "<i4", "r", HEADER_BYTES, (sum(counts),))
    inputs, targets, logits, loss, *grads = np.split(numbers, np.cumsum(counts)[:-1])
    for ids in (inputs, targets):
        if ids.min() < 0 or ids.max() >= cfg.vocab_size:
            raise FormatError(
                f"{path} holds the token ids {ids.min()}..{ids.max()}, but the model knows "
                f"0..{cfg.vocab_size - 1}"
            )
    arrays = [g.view(FLOAT32).reshape(shape) for g, shape in zip(grads, shapes, strict=True)]
    return DebugState(
        inputs.reshape(B, T),
        targets.reshape(B, T),
        logits.view(FLOAT32).reshape(B, T, cfg.vocab_size),
        float(loss.view(FLOAT32)[0]),
        _grads(tensors, arrays, cfg),
    )


def write_debug_state(
    path: str | os.PathLike[str], state: DebugState, cfg: Architecture, version: int = 2
) -> None:
    """Write a debug state; version 2 is what llm.c's C test reads.

    Raises:
        ConfigError: the format does not support the family.
        ValueError: a version other than 1 and 2.
        OSError: it cannot be written.

    """
    if version not in (1, 2):
        raise ValueError(f"version 1 or 2 can be written, not {version}")
    tensors = _tensors(cfg, cfg.vocab_size if version == 1 else cfg.padded_vocab_size)

    def arrays() -> Iterator[np.ndarray]:
        yield np.asarray(state.inputs, "<i4")
        yield np.asarray(state.targets, "<i4")
        yield np.asarray(state.logits, FLOAT32)
        yield np.asarray([state.loss], FLOAT32)
        yield from _arrays(tensors, state.grads, FLOAT32, cfg)

    write_file(path, [STATE_MAGIC, version, *state.inputs.shape], arrays())


def _tensors(cfg: Architecture, vocab_rows: int) -> list[FileTensor]:
    """The file's tensors, with ``vocab_rows`` rows in the token embedding."""
    return file_tensors(
        table_of(TABLES, cfg, f"an {MODEL}"), cfg, transposed=True, vocab_rows=vocab_rows
    )


def _stacked(tensor: FileTensor, cfg: Architecture) -> tuple[int, ...]:
    """The shape of a tensor in the file, where layers are stacked."""
    return (cfg.num_layers, *tensor.shape) if tensor.layered else tensor.shape


def _grads(tensors: list[FileTensor], arrays: list[Any], cfg: Architecture) -> Any:
    """Gradients in our shapes: views of the file, except that pad rows are zeros."""
    ours = {
        part.param: part.from_file(array[..., *part.place])
        for tensor, array in zip(tensors, arrays, strict=True)
        for part in tensor.parts
    }
    padded = {name: pad_vocab(ours[name], weight, cfg) for name, _, weight, _ in rows(cfg)}
    family = family_of(cfg)
    blocks = family.Block(*(padded.pop(name) for name in family.Block._fields))
    return family.Params(**padded, blocks=blocks)


def _arrays(
    tensors: list[FileTensor], params: Any, dtype: np.dtype, cfg: Architecture
) -> Iterator[np.ndarray]:
    """Each tensor in file layout, layer by layer if layered, followed by its pad rows."""
    for _, tensor, layer in each_layer(tensors, cfg):
        array = join(tensor, layer, params, cfg, dtype)
        yield array
        if missing := tensor.shape[0] - len(array):
            yield np.zeros((missing, *tensor.shape[1:]), dtype)
