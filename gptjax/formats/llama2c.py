"""llama2.c's model files (https://github.com/karpathy/llama2.c), in all three versions.

==  =====================================================  =============
0   float32, without a magic number                        run by run.c
1   float32, with a header of 256 bytes
2   matrices as int8 in groups with a scale, the same header  run by runq.c
==  =====================================================  =============

Version 0 begins with seven int32: C, F, L, H, K, V and T, where a negative V says that the
classifier has a matrix of its own. The others begin with the magic number, the version and the same
seven; byte 36 is 1 if the classifier is tied to the embeddings, and bytes 37 to 40 of version 2 are
the size of a group. Tensors follow in the order of `ORDERS`, stacked over the layers, matrices as
(out, in). Version 0 has a table of cosines and one of sines (T, D/2) before the classifier, which
nothing reads. Rotary embeddings rotate neighbours (2i, 2i + 1).

No version holds the rotary embedding's theta or the norm's eps: run.c uses 10000 and 1e-5.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Architecture
from gptjax.errors import CheckpointError, ConfigError, FormatError
from gptjax.formats.binary import check_size, read_start, write_arrays
from gptjax.formats.recognise import LLAMA2C_MAGIC, LLAMA2C_MODEL, recognise
from gptjax.formats.tables import (
    FileTensor,
    Part,
    each_layer,
    file_tensors,
    join,
    open_params,
    table_of,
)

MODEL = "llama2.c model"
VERSIONS = (0, 1, 2)
FIELDS = struct.Struct("<7i")
HEADER_BYTES = 256  # of versions 1 and 2
FLOAT32 = np.dtype("<f4")
GROUP = 64  # numbers that share a scale, if the widths allow it
LARGEST = 2**24  # upper bound of any header field
ASSUMED: dict[str, Any] = {"rope_theta": 1e4, "norm_eps": 1e-5}
"""Settings that the file does not hold, with the values in run.c."""
NEWER = "att_norm ffn_norm final_norm tok_emb wq wk wv wo w1 w2 w3 wcls"
ORDERS = {
    0: "tok_emb att_norm wq wk wv wo ffn_norm w1 w2 w3 final_norm wcls",
    1: NEWER,
    2: NEWER,
}


class Header(NamedTuple):
    """The contents of a file's header."""

    version: int
    cfg: Architecture
    group: int
    """Numbers that share a scale; 0 if the file is in float32."""
    size: int
    """Bytes of the file."""


def is_model(path: Path) -> bool:
    """Whether it is a llama2.c model: by the magic number, or, in version 0, by a size that is
    exactly what its seven numbers imply.
    """
    return (recognise(path) or "").startswith(LLAMA2C_MODEL)


def announced_size(path: Path) -> int | None:
    """Bytes that a file of version 0 must have, given the seven numbers that it begins with; None
    if these cannot be a version 0 header.
    """
    try:
        return _layout(path, _read_header(path))[-1]
    except FormatError:
        return None


def read_model(path: str | os.PathLike[str]) -> tuple[int, Architecture, Any]:
    """Read the version, the architecture, and the parameters as `LazyTensor`s of float32.

    Raises:
        FormatError: an unknown version, a field out of range, or a size that does not match the
            header.

    """
    path = Path(path)
    header = _read_header(path)
    cfg, group = header.cfg, header.group
    tensors, offsets, end = _layout(path, header)
    announced = f"{cfg.num_layers} layers of {cfg.channels} channels in version {header.version}"
    check_size(path, MODEL, header.size, end, announced)
    data = np.memmap(path, np.uint8, "r")

    def read(tensor: FileTensor, layer: int | None, part: Part) -> np.ndarray:
        stride, count = _layer_bytes(tensor, group), math.prod(tensor.shape)
        begin = offsets[tensor.name] + (layer or 0) * stride
        held = data[begin : begin + stride]
        if _is_quantized(tensor, group):
            array = dequantize(held[:count].view(np.int8), held[count:].view(FLOAT32))
        else:
            array = held.view(FLOAT32)
        return array.reshape(tensor.shape)[part.place]

    return header.version, cfg, open_params(tensors, cfg, read, lambda tensor, layer: FLOAT32)


def write_model(
    path: str | os.PathLike[str], params: Any, cfg: Architecture, version: int = 0
) -> None:
    """Write a model, tensor by tensor.

    In version 2 groups of `GROUP` numbers share a scale. The size of a group is halved until it
    divides both widths, because runq.c multiplies each row group by group, so that a group must not
    reach into the next row.

    Args:
        path: the file, written atomically.
        params: in either layout, with or without pad rows.
        cfg: the model.
        version: 0, which run.c reads, 1, or 2, which runq.c reads.

    Raises:
        ConfigError: the format cannot describe the model.
        CheckpointError: a number is not finite, which int8 cannot hold.
        ValueError: any other version.
        OSError: it cannot be written.

    """
    if version not in VERSIONS:
        raise ValueError(f"version 0, 1 or 2 can be written, not {version}")
    table_of({"llama": {}}, cfg, f"a {MODEL}")
    for name, value in ASSUMED.items():
        if np.float32(getattr(cfg, name)) != np.float32(value):
            raise ConfigError(
                f"a {MODEL} always has model.{name} {value:g}, and cannot hold this model's "
                f"{getattr(cfg, name):g}: write safetensors or a Hugging Face folder instead"
            )
    group = GROUP
    while cfg.channels % group or cfg.hidden % group:
        group //= 2
    group = group if version == 2 else 0

    def arrays() -> Iterator[np.ndarray]:
        for name, tensor, layer in each_layer(_tensors(cfg, version), cfg):
            array = join(tensor, layer, params, cfg, FLOAT32)
            if _is_quantized(tensor, group):
                if not np.isfinite(array).all():
                    raise CheckpointError(
                        f"the model has numbers in {name} that are not finite, which int8 cannot "
                        "hold: it is damaged, or its training diverged"
                    )
                yield from quantize(array, group)
            else:
                yield array
            if version == 0 and name == "final_norm":
                yield from _rotations(cfg)

    write_arrays(path, _header(cfg, version, group), arrays())


def quantize(array: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8, float32 scales) of an array, as llama2.c's export.py rounds them: half to even.

    ``scale = max|w| / 127`` in each group; a group of zeros has the scale 0.
    """
    groups = np.asarray(array, FLOAT32).reshape(-1, group)
    scales = np.abs(groups).max(1) / FLOAT32.type(127)
    divisors = np.where(scales == 0, 1, scales)
    # A subnormal scale may be rounded down so far that a quotient exceeds 127.
    integers = np.rint(groups / divisors[:, None]).clip(-127, 127).astype(np.int8)
    return integers, scales


def dequantize(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of `quantize`, up to rounding: flat float32 numbers, group after group."""
    with np.errstate(over="ignore", invalid="ignore"):  # checked where finite numbers are needed
        return (integers.reshape(len(scales), -1) * scales[:, None]).reshape(-1)


def _read_header(path: Path) -> Header:
    start, size = read_start(path, MODEL, FIELDS.size)
    magic, version = struct.unpack_from("<Ii", start)
    group = 0
    if magic != LLAMA2C_MAGIC:
        version = 0
        *fields, vocab_size, max_seq_len = FIELDS.unpack(start)
        tied, vocab_size = vocab_size > 0, abs(vocab_size)
    else:
        if version not in VERSIONS[1:]:
            raise FormatError(
                f"{path} is a {MODEL} of version {version}: versions 0, 1 and 2 can be read"
            )
        start, size = read_start(path, MODEL, HEADER_BYTES)
        *fields, vocab_size, max_seq_len = FIELDS.unpack_from(start, 8)
        rest = start[37:]
        if version == 2:
            (group,), rest = struct.unpack_from("<i", rest), rest[4:]
            if not 1 <= group <= LARGEST:
                raise FormatError(f"{path} is not a {MODEL}: it announces groups of {group}")
        if start[36] > 1 or any(rest):
            raise FormatError(
                f"{path} is not a {MODEL}: byte 36 of its header is {start[36]}, where 0 or 1 is "
                "expected"
                if start[36] > 1
                else f"{path} is not a {MODEL}: its header does not end in zeros"
            )
        tied = bool(start[36])
    sizes = (*fields, vocab_size, max_seq_len)
    if not all(1 <= field <= LARGEST for field in sizes):
        raise FormatError(
            f"{path} is not a {MODEL}: its header holds the sizes {', '.join(map(str, sizes))}"
        )
    names = ("channels", "hidden", "num_layers", "num_heads", "num_kv_heads")
    try:
        cfg = Architecture(
            family="llama",
            **dict(zip(names, fields, strict=True)),
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            tied=tied,
            **ASSUMED,
        )
        _tensors(cfg, version)
    except ConfigError as error:
        raise FormatError(f"{path} holds an invalid model: {error}") from error
    return Header(version, cfg, group, size)


def _layout(path: Path, header: Header) -> tuple[list[FileTensor], dict[str, int], int]:
    """The file's tensors, where each begins, and where the file ends."""
    cfg, group = header.cfg, header.group
    tensors = _tensors(cfg, header.version)
    offsets: dict[str, int] = {}
    end = HEADER_BYTES if header.version else FIELDS.size
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if _is_quantized(tensor, group) and count % group:
            raise FormatError(
                f"{path} is not a {MODEL}: its groups of {group} numbers do not divide the "
                f"{count} of {tensor.name}"
            )
        offsets[tensor.name] = end
        end += _layer_bytes(tensor, group) * (cfg.num_layers if tensor.layered else 1)
        if header.version == 0 and tensor.name == "final_norm":
            end += 2 * cfg.max_seq_len * (cfg.head_dim // 2) * FLOAT32.itemsize
    return tensors, offsets, end


def _header(cfg: Architecture, version: int, group: int) -> bytes:
    sizes = (cfg.channels, cfg.hidden, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    if version == 0:
        return FIELDS.pack(*sizes, cfg.vocab_size if cfg.tied else -cfg.vocab_size, cfg.max_seq_len)
    fields = FIELDS.pack(*sizes, cfg.vocab_size, cfg.max_seq_len)
    start = struct.pack("<Ii", LLAMA2C_MAGIC, version) + fields + struct.pack("<?", cfg.tied)
    return (start + (struct.pack("<i", group) if version == 2 else b"")).ljust(HEADER_BYTES, b"\0")


def _tensors(cfg: Architecture, version: int) -> list[FileTensor]:
    """The file's tensors, in its order."""
    names = [name for name in ORDERS[version].split() if name != "wcls" or not cfg.tied]
    return file_tensors(
        dict(zip(names, names, strict=True)), cfg, transposed=True, neighbours={"wq", "wk"}
    )


def _is_quantized(tensor: FileTensor, group: int) -> bool:
    return bool(group) and len(tensor.shape) > 1


def _layer_bytes(tensor: FileTensor, group: int) -> int:
    """Bytes of a tensor in the file, for one layer."""
    count = math.prod(tensor.shape)
    if _is_quantized(tensor, group):
        return count + count // group * FLOAT32.itemsize
    return count * FLOAT32.itemsize


def _rotations(cfg: Architecture) -> Iterator[np.ndarray]:
    """Cosines and sines of every position and pair, (T, D/2) each, in float32 as llama2.c has
    them.
    """
    exponents = np.arange(0, cfg.head_dim, 2, dtype=FLOAT32) / FLOAT32.type(cfg.head_dim)
    frequencies = 1 / FLOAT32.type(cfg.rope_theta) ** exponents
    angles = np.outer(np.arange(cfg.max_seq_len, dtype=FLOAT32), frequencies)
    yield from (np.cos(angles), np.sin(angles))
