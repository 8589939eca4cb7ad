"""Mapping between the tensors of a file and the parameters of a model.

A format has one `Table` for each family: the file's names, and the parameters that each holds.
Matrices in a file are (in, out) or (out, in), with the axes of heads merged. A tensor that holds
several parameters, such as GPT-2's ``c_attn`` with queries, keys and values, concatenates them
along their outputs. Everything else follows from the family's weight table.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Architecture
from gptjax.errors import ConfigError
from gptjax.formats.lazy import LazyTensor, collect, tensor_of, unpadded_shape
from gptjax.models.family import Weight
from gptjax.models.params import rows

Table = Mapping[str, str]
"""Tensor name, with ``{}`` for the layer -> the names of its parameters.

For example ``{"layer.{}.qkv": "q k v"}``, a tensor that joins three parameters of a layer.
"""


class Part(NamedTuple):
    """One parameter within a tensor of a file."""

    param: str
    place: tuple[slice, ...]
    """Its index in the tensor."""
    shape: tuple[int, ...]
    """The parameter's shape, without pad rows."""
    flat: tuple[int, ...]
    """The same shape with merged axes, (in, out)."""
    transposed: bool
    neighbours: bool = False
    """Whether the file rotates neighbours (2i, 2i + 1) of a head, where we rotate halves
    (i, i + D/2).
    """

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Convert the parameter to file layout."""
        if self.neighbours:
            array = array.reshape(*self.shape[:-1], 2, -1).swapaxes(-1, -2)
        array = array.reshape(self.flat)
        return array.T if self.transposed else array

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Convert the file's values at `place` to the parameter; leading layer axes are
        preserved.
        """
        array = array.swapaxes(-1, -2) if self.transposed else array
        layers = array.shape[: array.ndim - len(self.flat)]
        if self.neighbours:
            array = array.reshape(*layers, *self.shape[:-1], -1, 2).swapaxes(-1, -2)
        return array.reshape(*layers, *self.shape)


class FileTensor(NamedTuple):
    """One tensor of a file, or one per layer."""

    name: str
    """Name in the file; ``{}`` is the layer."""
    layered: bool
    shape: tuple[int, ...]
    """Shape in the file, for one layer."""
    parts: tuple[Part, ...]


def table_of(tables: Mapping[str, Table], cfg: Architecture, kind: str) -> Table:
    """The table of a model's family.

    Raises:
        ConfigError: the format, described by ``kind``, has none.

    """
    if cfg.family not in tables:
        raise ConfigError(
            f"{kind} holds models of the family {' or '.join(tables)}, and this is {cfg.family}: "
            "write another format, as safetensors"
        )
    return tables[cfg.family]


def file_tensors(
    table: Table,
    cfg: Architecture,
    *,
    transposed: bool = False,
    vocab_rows: int | None = None,
    neighbours: Container[str] = (),
) -> list[FileTensor]:
    """The tensors of a file for one model, in the table's order.

    Args:
        table: the format's, for the model's family.
        cfg: the model.
        transposed: matrices are (out, in).
        vocab_rows: rows of tables with one row per id, padding included; by default no padding.
        neighbours: parameters whose heads the file rotates by neighbours (`Part.neighbours`).

    """
    found_as = {row[:2]: row for row in rows(cfg)}  # a name may occur in and outside the blocks
    found = []
    for name, params in table.items():
        held = [
            found_as.get((param, "{}" in name)) or found_as[param, True] for param in params.split()
        ]
        _, layered, first, _ = held[0]
        turned = transposed and first.kind == "matrix"
        parts: list[Part] = []
        outputs = 0
        for param, _, weight, shape in held:
            shape = unpadded_shape(weight, shape, cfg)
            flat = merged(weight, shape)
            index = [*map(slice, flat[:-1]), slice(outputs, outputs + flat[-1])]
            place = tuple(index[::-1] if turned else index)
            parts.append(Part(param, place, shape, flat, turned, param in neighbours))
            outputs += flat[-1]
        sizes = [*flat[:-1], outputs]
        if first.axes[0] == "Vp" and vocab_rows:
            sizes[0] = vocab_rows
        found.append(
            FileTensor(name, layered, tuple(sizes[::-1] if turned else sizes), tuple(parts))
        )
    return found


def merged(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a file: (in, out) for a matrix, (rows, width) for a table, (width,) for a vector."""
    inputs = {"matrix": weight.inputs, "table": 1, "vector": 0}[weight.kind]
    return tuple(math.prod(axes) for axes in (shape[:inputs], shape[inputs:]) if axes)


def each_layer(
    tensors: list[FileTensor], cfg: Architecture
) -> Iterator[tuple[str, FileTensor, int | None]]:
    """Name, tensor and layer (None outside the blocks) of each tensor in a file, in order."""
    for tensor in tensors:
        for layer in range(cfg.num_layers) if tensor.layered else [None]:
            yield tensor.name.format(layer), tensor, layer


def open_params(
    tensors: list[FileTensor],
    cfg: Architecture,
    read: Callable[[FileTensor, int | None, Part], np.ndarray],
    dtype_of: Callable[[FileTensor, int | None], np.dtype],
) -> Any:
    """A model's parameters as `LazyTensor`s, unrolled.

    Args:
        tensors: the file's.
        cfg: the model.
        read: ``read(tensor, layer, part)`` reads ``part.place`` of a tensor from the file.
        dtype_of: ``dtype_of(tensor, layer)`` is a tensor's dtype.

    """
    places = {
        (part.param, tensor.layered): (tensor, part) for tensor in tensors for part in tensor.parts
    }

    def load(name: str, layer: int | None) -> np.ndarray:
        tensor, part = places[name, layer is not None]
        return part.from_file(read(tensor, layer, part))

    return collect(
        cfg, load, lambda name, layer: dtype_of(places[name, layer is not None][0], layer)
    )


def file_contents(
    tensors: list[FileTensor], params: Any, cfg: Architecture, dtype: np.dtype
) -> dict[str, LazyTensor]:
    """All tensors of a file by name, in order, each computed lazily from its parameters.

    Args:
        tensors: the file's.
        params: as `tensor_of` takes them.
        cfg: the model.
        dtype: of every tensor written.

    """
    return {
        name: LazyTensor(tensor.shape, dtype, partial(join, tensor, layer, params, cfg, dtype))
        for name, tensor, layer in each_layer(tensors, cfg)
    }


def join(
    tensor: FileTensor, layer: int | None, params: Any, cfg: Architecture, dtype: np.dtype
) -> np.ndarray:
    """Build one tensor of a file from its parameters, in ``dtype``, without pad rows.

    Raises:
        ConfigError: see `cast`.

    """
    name = tensor.name.format(layer)
    arrays = (
        cast(part.to_file(tensor_of(params, part.param, layer, cfg)), dtype, name)
        for part in tensor.parts
    )
    if len(tensor.parts) == 1:
        return next(arrays)
    joined = np.empty(tensor.shape, dtype)
    for part, array in zip(tensor.parts, arrays, strict=True):
        joined[part.place] = array
    return joined


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """An array in another dtype.

    Raises:
        ConfigError: a number is beyond the range of float16.

    """
    with np.errstate(over="ignore"):
        found = array.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(found).any():
        raise ConfigError(
            f"{name} has numbers beyond 65504, float16's largest: write bfloat16 or float32"
        )
    return found
