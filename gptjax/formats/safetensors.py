"""Safetensors: read through the library of that name, written tensor by tensor; and models in it under our own names.

A file is a 64-bit length, a JSON header of that length with each tensor's dtype, shape and place, and the numbers
(https://github.com/huggingface/safetensors). The library writes only what is in memory as a whole.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gptjax.durable import write_whole
from gptjax.errors import ConfigError, FormatError
from gptjax.files import check_file, open_file
from gptjax.formats.lazy import collect, tensor_names, tensor_of
from gptjax.models.config import DIMENSIONS, GPT2Config
from gptjax.models.params import Params

DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The library's handle on a file.

    Raises:
        FormatError: it cannot be read, or is not such a file.

    """
    try:
        check_file(path)
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def check_tensor(path: Path, file: Any, name: str, shape: tuple[int, ...]) -> np.dtype:
    """The dtype of a tensor; raises `FormatError` unless the file holds floating-point numbers so shaped under this name."""
    found = file.get_slice(name)
    if tuple(found.get_shape()) != shape:
        raise FormatError(f"{path}: the tensor {name} has the shape {found.get_shape()}, but {list(shape)} is expected")
    if found.get_dtype() not in DTYPES:
        raise FormatError(f"{path}: the tensor {name} holds {found.get_dtype()}, but one of {', '.join(DTYPES)} is expected")
    return DTYPES[found.get_dtype()]


def write(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    load: Callable[[str], np.ndarray],
    metadata: dict[str, str],
) -> None:
    """Write tensors one by one, durably: either the whole file appears under its name, or nothing does.

    Args:
        path: the file.
        tensors: names and shapes, in the order in which they are written.
        dtype: one of `DTYPES`, of all of them.
        load: gives a tensor by its name.
        metadata: text, for the header.

    """
    label = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with write_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name != "__metadata__":
                array = np.ascontiguousarray(load(name).astype(dtype, copy=False))
                file.write(array.reshape(-1).view(np.uint8).data)


def is_model(path: Path) -> bool:
    """Whether the file looks like safetensors: a length below 100 MB, and a JSON object."""
    with open_file(path) as file:
        start = file.read(9)
    return len(start) == 9 and int.from_bytes(start[:8], "little") < 100_000_000 and start[8:] == b"{"


def read_model(path: Path) -> tuple[GPT2Config, Params]:
    """A model in our own names, ``wte`` or ``fcw.3``; tensors stay in the file until they are used.

    Raises:
        FormatError: not such a file, or a tensor is missing, unknown, or of another shape; it is named.

    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        if not all(re.fullmatch("[0-9]{1,9}", metadata.get(name, "")) for name in DIMENSIONS):
            raise FormatError(
                f"{path} does not say the model's {', '.join(DIMENSIONS)} in its metadata: it is not one of gptjax's; "
                "of a Hugging Face model name the folder, with its config.json"
            )
        try:
            sizes: dict[str, Any] = {name: int(metadata[name]) for name in DIMENSIONS}
            cfg = GPT2Config(**sizes)
        except ConfigError as error:
            raise FormatError(f"{path} holds a model that cannot be: {error}") from error
        check_names(path, set(file.keys()), (_name(name, layer) for name, layer, _ in tensor_names(cfg)))
        dtypes = {
            (name, layer): check_tensor(path, file, _name(name, layer), shape) for name, layer, shape in tensor_names(cfg)
        }

    def load(name: str, layer: int | None) -> np.ndarray:
        with opened(path) as file:
            array: np.ndarray = file.get_tensor(_name(name, layer))
            return array

    return cfg, collect(cfg, load, lambda *place: dtypes[place])


def check_names(path: Path, found: set[str], expected: Iterable[str]) -> None:
    """Raise `FormatError` unless exactly these tensors are there; stops at the first one that is missing."""
    known = set()
    for name in expected:
        if name not in found:
            raise FormatError(f"{path} lacks the tensor {name}")
        known.add(name)
    if found - known:
        odd = sorted(found - known)
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise FormatError(f"{path} holds tensors that this model does not have: {', '.join(odd[:5])}{more}")


def write_model(path: Path, params: Params, cfg: GPT2Config, dtype: np.dtype) -> None:
    """Write a model in our own names, tensor by tensor.

    Args:
        path: the file.
        params: in either layout, with or without pad rows.
        cfg: their dimensions.
        dtype: one of `DTYPES`.

    """
    places = {_name(name, layer): (name, layer, shape) for name, layer, shape in tensor_names(cfg)}
    metadata = {"format": "gptjax", **{name: str(getattr(cfg, name)) for name in DIMENSIONS}}
    shapes = ((key, shape) for key, (_, _, shape) in places.items())
    write(path, shapes, dtype, lambda key: tensor_of(params, *places[key][:2], cfg), metadata)


def _name(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}.{layer}"
