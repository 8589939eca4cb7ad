"""GGUF, the files of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A file is ``GGUF``, a version, the numbers of tensors and of metadata fields, the fields (name, type
and value), each tensor's name, sizes, type and offset, and the tensors' data, each aligned. All of
that is checked here before tensors are read or allocated; the package ``gguf`` quantizes and
dequantizes. Matrices are (out, in), and rotary embeddings rotate neighbours (2i, 2i + 1).
"""

import dataclasses
import importlib
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Architecture
from gptjax.errors import ConfigError, FormatError
from gptjax.files import open_file, write_whole
from gptjax.formats.lazy import LazyTensor
from gptjax.formats.safetensors import check_names
from gptjax.formats.tables import (
    FileTensor,
    Part,
    Table,
    cast,
    each_layer,
    file_tensors,
    join,
    open_params,
    table_of,
)
from gptjax.models.family import family_of
from gptjax.models.params import tensor_at

MAGIC, VERSION = b"GGUF", 3
LENGTH = struct.Struct("<Q")  # before each string
READ_VERSIONS = (2, 3)
MODEL = "GGUF model"
ARCHITECTURE, FILE_TYPE = "general.architecture", "general.file_type"
ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32
LARGEST = 2**24  # upper bound of any size, number of values or length of a text
MOST_DIMENSIONS = 4

STRING, ARRAY, BOOL, INT32, UINT32, FLOAT32 = 8, 9, 7, 5, 4, 6
SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    UINT32: np.dtype("<u4"),
    INT32: np.dtype("<i4"),
    FLOAT32: np.dtype("<f4"),
    BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype("<f8"),
}
"""Types without blocks: one number after the other."""
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Bytes of a block, for the quantized types that decoding computes with directly."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""Types that can be written, with the `FILE_TYPE` that llama.cpp gives a file of them."""

TABLES: dict[str, Table] = {
    "llama": {
        "token_embd.weight": "tok_emb",
        "blk.{}.attn_norm.weight": "att_norm",
        "blk.{}.attn_q.weight": "wq",
        "blk.{}.attn_k.weight": "wk",
        "blk.{}.attn_v.weight": "wv",
        "blk.{}.attn_output.weight": "wo",
        "blk.{}.ffn_norm.weight": "ffn_norm",
        "blk.{}.ffn_gate.weight": "w1",
        "blk.{}.ffn_up.weight": "w3",
        "blk.{}.ffn_down.weight": "w2",
        "output_norm.weight": "final_norm",
        "output.weight": "wcls",
    }
}
NEIGHBOURS = {"wq", "wk"}
EMBEDDING, CLASSIFIER, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Fields without the prefix that names the architecture
SIZES = {
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "channels": "embedding_length",
    "hidden": "feed_forward_length",
    "max_seq_len": "context_length",
}
OPTIONAL = {"num_kv_heads"}
NUMBERS = {"rope_theta": "rope.freq_base", "norm_eps": "attention.layer_norm_rms_epsilon"}
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
VOCABULARY = "vocab_size"
# Settings that are supported only with these values, which change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
}
# Settings that do not affect the computation
IGNORED = {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}


class Tensor(NamedTuple):
    """Where a tensor lies in a file."""

    shape: tuple[int, ...]
    """Outer axis first, as NumPy has it."""
    type: str
    """GGML's name, as in ``Q4_1``."""
    start: int
    size: int
    """Bytes."""


class File(NamedTuple):
    """A validated file."""

    path: Path
    fields: dict[str, Any]
    """Metadata: str, bool, int, float, a list of str, or an array of numbers."""
    tensors: dict[str, Tensor]
    identity: tuple[int, ...]
    """Of the file that was read; see `_identity`."""

    @property
    def title(self) -> str:
        """A description, with the number of tensors of each type."""
        counts = Counter(tensor.type for tensor in self.tensors.values()).most_common()
        return f"{MODEL} ({', '.join(f'{n} {kind}' for kind, n in counts)})"


def library() -> Any:
    """The package ``gguf``.

    Raises:
        ConfigError: it is not installed.

    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the package gguf: pip install 'gptjax[llama]', or pip install gguf"
        ) from error


def is_file(path: Path) -> bool:
    """Whether the file begins with GGUF's magic number."""
    with open_file(path) as file:
        return file.read(4) == MAGIC


class _Reader:
    """Reads one value after the other; raises `FormatError` at the end of the data."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def bytes(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise FormatError(
                f"{self.path} is truncated: its header needs {size} bytes at byte {begin}, but the "
                f"file has {len(self.data)}"
            )
        return self.data[begin : self.at]

    def uint32(self) -> int:
        """The next unsigned integer of 4 bytes."""
        return int.from_bytes(self.bytes(4), "little")

    def uint64(self) -> int:
        """The next unsigned integer of 8 bytes."""
        return int.from_bytes(self.bytes(8), "little")

    def count(self, what: str, least: int = 1) -> int:
        """The next integer as a number of items, which must fit the rest of the file.

        Args:
            what: the items, for the error.
            least: the fewest bytes that each takes.

        """
        found = self.uint64()
        if found > LARGEST or found * least > len(self.data) - self.at:
            raise FormatError(
                f"{self.path} is truncated or damaged: it announces {found} {what} at byte "
                f"{self.at - 8} of {len(self.data)}"
            )
        return found

    def string(self, what: str) -> str:
        """The next string."""
        try:
            return str(self.bytes(self.count(f"bytes of {what}")), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path} has {what} that is not UTF-8: {error}") from error

    def _strings(self, what: str, count: int) -> list[str]:
        """The next strings, as `string` reads each; for a vocabulary its calls would take long."""
        found, data, size = [], self.data, len(self.data)
        for _ in range(count):
            begin = self.at + LENGTH.size
            try:
                end = begin + LENGTH.unpack_from(data, self.at)[0]
                fits = end <= min(size, begin + LARGEST)
                found.append(data[begin:end].decode() if fits else self.string(what))
            except (UnicodeDecodeError, struct.error):
                self.string(what)
            self.at = end
        return found

    def array(self, dtype: np.dtype, count: int = 1) -> np.ndarray:
        """The next ``count`` numbers."""
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)

    def value(self, name: str) -> Any:
        """A field's value, after its type."""
        kind = self.uint32()
        if kind == STRING:
            return self.string(name)
        if kind in SCALARS:
            return self._scalar(kind, self.array(SCALARS[kind])[0])
        if kind == ARRAY:
            kind = self.uint32()
            if kind == STRING:
                return self._strings(name, self.count(f"texts in {name}", 8))
            if kind in SCALARS:
                dtype = SCALARS[kind]
                return self.array(dtype, self.count(f"numbers in {name}", dtype.itemsize))
        raise FormatError(f"{self.path} has {name} of the unknown type {kind}")

    @staticmethod
    def _scalar(kind: int, found: Any) -> Any:
        if kind == FLOAT32:
            return float(str(found))  # float32's 1e-05, which would become 9.99999974e-06
        return bool(found) if kind == BOOL else found.item()


def read_file(path: str | os.PathLike[str]) -> File:
    """Read the metadata, and where each tensor lies.

    Raises:
        ConfigError: the package ``gguf`` is not installed.
        FormatError: it is not a GGUF file, is damaged, or has another size than its header implies.
        OSError: it cannot be read.

    """
    path = Path(path)
    with open_file(path) as file:  # a regular one
        if file.read(4) != MAGIC:
            raise FormatError(f"{path} is not a {MODEL}: it does not begin with {MAGIC.decode()}")
        reader = _Reader(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        identity = _identity(file)
    reader.at = len(MAGIC)
    version = reader.uint32()
    if version not in READ_VERSIONS:
        order = " (of the other byte order)" if version & 0xFFFF == 0 else ""
        raise FormatError(
            f"{path} is a GGUF file of version {version}{order}: "
            f"{' and '.join(map(str, READ_VERSIONS))} can be read"
        )
    num_tensors = reader.count("tensors", 24)
    fields: dict[str, Any] = {}
    for _ in range(reader.count("fields", 13)):
        name = reader.string("a field's name")
        if name in fields:
            raise FormatError(f"{path} has {name} twice")
        fields[name] = reader.value(name)
    return File(path, fields, _tensors(reader, num_tensors, fields), identity)


def _tensors(reader: _Reader, number: int, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    path, size = reader.path, len(reader.data)
    alignment = fields.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if not _is_size(alignment) or alignment & (alignment - 1):
        raise FormatError(f"{path} has {ALIGNMENT} {alignment!r}: a power of two is expected")
    constants = library().constants
    found: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
    end = 0
    for _ in range(number):
        name = reader.string("a tensor's name")
        dimensions = reader.uint32()
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise FormatError(f"{path}: the tensor {name} has {dimensions} axes")
        shape = tuple(reversed(reader.array(np.dtype("<u8"), dimensions).tolist()))
        kind, offset = reader.uint32(), reader.uint64()
        try:
            theirs = constants.GGMLQuantizationType(kind)
            block, block_bytes = constants.GGML_QUANT_SIZES[theirs]
        except (ValueError, KeyError):
            raise FormatError(f"{path}: the tensor {name} has the unknown type {kind}") from None
        if name in found:
            raise FormatError(f"{path} has the tensor {name} twice")
        if shape[-1] % block or not math.prod(shape):
            raise FormatError(
                f"{path}: the tensor {name} has the shape {list(shape)}, whose rows are not whole "
                f"blocks of {theirs.name}"
            )
        if offset != end:
            raise FormatError(
                f"{path}: the tensor {name} is at {offset} of the data, where {end} is expected"
            )
        nbytes = math.prod(shape) // block * block_bytes
        end = _aligned(offset + nbytes, alignment)
        found[name] = shape, theirs.name, offset, nbytes
    start = _aligned(reader.at, alignment)
    last = max((offset + nbytes for _, _, offset, nbytes in found.values()), default=0)
    if not start + last <= size <= start + end:
        raise FormatError(
            f"{MODEL} {path} is {'truncated' if size < start + last else 'malformed'}: its header "
            f"announces {start + end} bytes, but the file has {size}"
        )
    return {
        name: Tensor(shape, kind, start + offset, nbytes)
        for name, (shape, kind, offset, nbytes) in found.items()
    }


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def raw_blocks(path: str | os.PathLike[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Each tensor's GGML type and bytes as they lie, memory-mapped: uint8, (..., bytes of a row).

    Raises:
        ConfigError: the package ``gguf`` is not installed.
        FormatError: see `read_file`.

    """
    file = read_file(path)
    return {name: (tensor.type, _mapped(file, name)) for name, tensor in file.tensors.items()}


def _mapped(file: File, name: str) -> np.ndarray:
    """A tensor's bytes as they lie. Each tensor has a mapping of its own, so that its pages leave
    memory with the array.

    Raises:
        FormatError: the file is another than that which was read first.

    """
    shape, _, start, size = file.tensors[name]
    with open_file(file.path) as opened:
        if _identity(opened) != file.identity:
            raise FormatError(f"{file.path} has been changed while it was read: read it again")
        return np.memmap(opened, np.uint8, "r", start, size).reshape(*shape[:-1], -1)


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """What changes with a file's content."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_model(path: str | os.PathLike[str]) -> tuple[Architecture, Any, File]:
    """Read the architecture, the parameters as `LazyTensor`s, and the file's description.

    Parameters in blocks are dequantized to float32 when they are read.

    Raises:
        ConfigError: the package ``gguf`` is not installed.
        FormatError: see `read_file`; or the model is not supported, or a tensor is missing,
            unknown, or of another shape or type; the message names it.

    """
    file = read_file(path)
    cfg = _architecture(file)
    tensors = _file_tensors(cfg)
    shapes = {name: tensor.shape for name, tensor, _ in each_layer(tensors, cfg)}
    check_names(file.path, set(file.tensors), shapes)
    for name, shape in shapes.items():
        if file.tensors[name].shape != shape:
            raise FormatError(
                f"{path}: the tensor {name} has the shape {list(file.tensors[name].shape)}, but "
                f"{list(shape)} is expected"
            )
    for kind in {tensor.type for tensor in file.tensors.values()} - PLAIN.keys():
        if not _can_dequantize(kind):
            raise FormatError(f"{path} has tensors of type {kind}, which is not supported")

    def read_numbers(tensor: FileTensor, layer: int | None, part: Part) -> np.ndarray:
        name = tensor.name.format(layer)
        return dequantized(file.tensors[name].type, _mapped(file, name))[part.place]

    def dtype_of(tensor: FileTensor, layer: int | None) -> np.dtype:
        return PLAIN.get(file.tensors[tensor.name.format(layer)].type, PLAIN["F32"])

    parts = {(part.param, t.layered): (t, part) for t in tensors for part in t.parts}

    def with_blocks(path: Any, lazy: LazyTensor) -> LazyTensor:
        param, layer = tensor_at(path)
        tensor, part = parts[param, layer is not None]
        name = tensor.name.format(layer)
        kind = file.tensors[name].type
        if kind in PLAIN:
            return lazy

        def read() -> RawBlocks:
            return read_blocks(kind, _mapped(file, name), part)

        return dataclasses.replace(
            lazy, blocks=read if kind in BLOCK_BYTES else None, block_type=kind
        )

    params = open_params(tensors, cfg, read_numbers, dtype_of)
    return cfg, jax.tree_util.tree_map_with_path(with_blocks, params), file


class RawBlocks(NamedTuple):
    """A matrix in N blocks of 32 inputs for each of its O outputs."""

    kind: str
    """GGML's name of the type, as in ``Q4_1``."""
    integers: np.ndarray
    """(O, N, bytes) uint8: signed integers of 8 bits; or of 4 bits, two in a byte: those of the
    lower halves come first.
    """
    scale: np.ndarray
    """(O, N) float16."""
    minimum: np.ndarray | None
    """(O, N) float16, of Q4_1."""


def read_blocks(kind: str, data: np.ndarray, part: Part) -> RawBlocks:
    """The blocks of a tensor of `raw_blocks` whose type is one of `BLOCK_BYTES`."""
    rows = data[part.place[0]]
    if part.neighbours:
        pairs = rows.reshape(-1, part.shape[-1] // 2, 2, rows.shape[-1])
        rows = pairs.swapaxes(1, 2).reshape(rows.shape)
    found = rows.reshape(len(rows), -1, BLOCK_BYTES[kind])
    begin = 4 if kind == "Q4_1" else 2
    numbers = np.ascontiguousarray(found[..., :begin]).view(np.float16)
    return RawBlocks(
        kind, found[..., begin:], numbers[..., 0], numbers[..., 1] if begin == 4 else None
    )


def dequantized(kind: str, data: np.ndarray) -> np.ndarray:
    """A tensor of `raw_blocks` as numbers: blocks in float32, other types in their own dtype."""
    if kind in PLAIN:
        return np.ascontiguousarray(data).view(PLAIN[kind])
    theirs = library()
    with np.errstate(all="ignore"):  # a damaged scale may be infinite
        found: np.ndarray = theirs.quants.dequantize(data, theirs.GGMLQuantizationType[kind])
    return found


def _can_dequantize(kind: str) -> bool:
    size = library().constants.GGML_QUANT_SIZES[library().GGMLQuantizationType[kind]][1]
    try:
        dequantized(kind, np.zeros((1, size), np.uint8))
    except NotImplementedError:
        return False
    return True


def _file_tensors(cfg: Architecture) -> list[FileTensor]:
    table = table_of(TABLES, cfg, f"a {MODEL}")
    own = {name: row for name, row in table.items() if not (cfg.tied and name == CLASSIFIER)}
    return file_tensors(own, cfg, transposed=True, neighbours=NEIGHBOURS)


def _architecture(file: File) -> Architecture:
    """The architecture that the metadata describe; raises `FormatError` for an unsupported
    setting.
    """
    path, fields = file.path, file.fields
    family = fields.get(ARCHITECTURE)
    if family not in TABLES:
        raise FormatError(
            f"{path} is a {MODEL} of architecture {family!r}, but {' or '.join(TABLES)} is expected"
        )
    if fields.get("general.type", "model") != "model":
        raise FormatError(f"{path} holds no model, but an {fields['general.type']!r}")
    if fields.get("split.count", 1) not in (0, 1):
        raise FormatError(
            f"{path} is one of {fields['split.count']} parts of a model: join them with "
            "llama-gguf-split --merge of llama.cpp"
        )
    if ROPE_FACTORS in file.tensors:
        raise FormatError(
            f"{path} scales its rotary embedding ({ROPE_FACTORS}), which is not supported"
        )
    if EMBEDDING not in file.tensors:
        raise FormatError(f"{path} lacks the tensor {EMBEDDING}")
    settings = {
        name.removeprefix(f"{family}."): value
        for name, value in fields.items()
        if name.startswith(f"{family}.")
    }
    found: dict[str, Any] = {"vocab_size": file.tensors[EMBEDDING].shape[0]}
    for ours, name in SIZES.items():
        if ours in OPTIONAL and name not in settings:
            continue
        found[ours] = settings.pop(name, None)
        if not _is_size(found[ours]):
            raise FormatError(f"{path} has no usable {family}.{name}: {found[ours]!r}")
    for ours, name in NUMBERS.items():
        if name == NUMBERS["rope_theta"] and name not in settings:
            continue  # llama.cpp's default is the same as ours
        found[ours] = settings.pop(name, None)
        if not isinstance(found[ours], float):
            raise FormatError(f"{path} has no usable {family}.{name}: {found[ours]!r}")
    if found["num_layers"] > len(file.tensors):
        raise FormatError(
            f"{path} announces {found['num_layers']} layers, but there are {len(file.tensors)} "
            "tensors in all"
        )
    try:
        cfg = Architecture(family=str(family), tied=CLASSIFIER not in file.tensors, **found)
        family_of(cfg).weights(cfg)
    except ConfigError as error:
        raise FormatError(f"{path} describes an invalid model: {error}") from error
    expected = {
        **NEUTRAL,
        **dict.fromkeys(HEAD_SIZES, (cfg.head_dim,)),
        VOCABULARY: (cfg.vocab_size,),
    }
    for name, value in settings.items():
        if name in IGNORED:
            continue
        if name not in expected:
            raise FormatError(f"{path} has the setting {family}.{name}, which is not supported")
        if not isinstance(value, str | bool | int | float) or value not in expected[name]:
            raise FormatError(
                f"{path} has {family}.{name} {value!r}, but only {expected[name][-1]!r} is "
                "supported"
            )
    return cfg


def write_model(
    path: str | os.PathLike[str],
    params: Any,
    cfg: Architecture,
    kind: str = "F32",
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a model for llama.cpp, tensor by tensor.

    Vectors are float32, and so, in a file of blocks, are matrices whose rows are not whole blocks.

    Args:
        path: the file, written atomically.
        params: in either layout, with or without pad rows.
        cfg: the model.
        kind: one of `FILE_TYPES`.
        fields: more metadata: the tokenizer's, by default none.

    Raises:
        ConfigError: the format cannot describe the model, a number is not finite or beyond the
            range of float16, or the package ``gguf`` is missing.
        OSError: it cannot be written.

    """
    tensors = _file_tensors(cfg)
    for ours in NUMBERS:
        value = getattr(cfg, ours)
        if float(str(np.float32(value))) != value:
            raise ConfigError(
                f"a {MODEL} holds model.{ours} in float32, which cannot represent {value}: write "
                "safetensors instead"
            )
    described = _described(cfg, kind) | dict(fields or {"tokenizer.ggml.model": "none"})
    theirs = library()
    quantization = theirs.GGMLQuantizationType
    header = [
        MAGIC,
        struct.pack("<IQQ", VERSION, len(list(each_layer(tensors, cfg))), len(described)),
        *(_string(name) + _value(value) for name, value in described.items()),
    ]
    end, kinds = 0, []
    for name, tensor, _ in each_layer(tensors, cfg):
        block, block_bytes = theirs.GGML_QUANT_SIZES[quantization[kind]]
        whole = len(tensor.shape) > 1 and tensor.shape[-1] % block == 0
        stored = quantization[kind if whole else "F32"]
        kinds.append(stored)
        block, block_bytes = theirs.GGML_QUANT_SIZES[stored]
        header.append(
            _string(name)
            + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            + struct.pack("<IQ", stored, end)
        )
        end = _aligned(end + math.prod(tensor.shape) // block * block_bytes, DEFAULT_ALIGNMENT)
    with write_whole(Path(path)) as file:
        file.write(_padded(b"".join(header)))
        for stored, (_, tensor, layer) in zip(kinds, each_layer(tensors, cfg), strict=True):
            array = join(tensor, layer, params, cfg, PLAIN["F32"])
            name = tensor.name.format(layer)
            if not np.isfinite(array).all():
                raise ConfigError(f"{name} has numbers that are not finite")
            file.write(_padded(_encoded(np.ascontiguousarray(array), stored, name).tobytes()))


def _encoded(array: np.ndarray, stored: Any, name: str) -> np.ndarray:
    if stored.name in PLAIN:
        return cast(array, PLAIN[stored.name], name)
    found: np.ndarray = library().quants.quantize(array, stored)
    return found


def _described(cfg: Architecture, kind: str) -> dict[str, Any]:
    """Metadata of the model itself."""
    settings = {name: getattr(cfg, ours) for ours, name in (SIZES | NUMBERS).items()}
    settings |= {"rope.dimension_count": cfg.head_dim, VOCABULARY: cfg.vocab_size}
    return {
        ARCHITECTURE: cfg.family,
        FILE_TYPE: FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{cfg.family}.{name}": value for name, value in settings.items()},
    }


def _string(text: str) -> bytes:
    data = text.encode()
    return LENGTH.pack(len(data)) + data


def _value(value: Any) -> bytes:
    """A field's type and value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, np.ndarray):
        kind = next(k for k, dtype in SCALARS.items() if dtype == value.dtype)
        return struct.pack("<IIQ", ARRAY, kind, value.size) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % DEFAULT_ALIGNMENT)
