"""Safetensors files: low-level reading and writing, and models under our own names.

A file is a 64-bit length, a JSON header of that length with each tensor's dtype, shape and offsets,
and the data (https://github.com/huggingface/safetensors). The library reads files; writing is our
own, tensor by tensor, since the library needs all tensors in memory.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gptjax.config import Architecture
from gptjax.errors import ConfigError, FormatError
from gptjax.files import check_file, open_file, write_whole
from gptjax.formats.lazy import LazyTensor
from gptjax.formats.tables import (
    FileTensor,
    Part,
    Table,
    each_layer,
    file_contents,
    file_tensors,
    open_params,
)
from gptjax.models.family import family_of
from gptjax.models.params import rows

# Families not listed store each parameter under its own name.
TABLES: dict[str, Table] = {
    "gpt2": {
        "wte": "wte",
        "wpe": "wpe",
        "ln1w.{}": "ln1w",
        "ln1b.{}": "ln1b",
        "qkvw.{}": "qw kw vw",
        "qkvb.{}": "qb kb vb",
        "attprojw.{}": "attprojw",
        "attprojb.{}": "attprojb",
        "ln2w.{}": "ln2w",
        "ln2b.{}": "ln2b",
        "fcw.{}": "fcw",
        "fcb.{}": "fcb",
        "fcprojw.{}": "fcprojw",
        "fcprojb.{}": "fcprojb",
        "lnfw": "lnfw",
        "lnfb": "lnfb",
    }
}
# Fields in the metadata of every model
REQUIRED = ("num_layers", "num_heads", "channels", "vocab_size", "max_seq_len")
# What a field of each type looks like in the metadata
PATTERNS: dict[type, str] = {
    int: "[0-9]{1,9}",
    float: "[0-9]{1,9}([.][0-9]{1,20})?(e[+-]?[0-9]{1,2})?",
    bool: "True|False",
    str: ".{1,100}",
}
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file with the library.

    Raises:
        FormatError: it cannot be read, or is not a safetensors file.

    """
    try:
        check_file(path)
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def check_tensor(path: Path, file: Any, name: str, shape: tuple[int, ...]) -> np.dtype:
    """Return a tensor's dtype; raise `FormatError` unless it is floating-point with this shape."""
    found = file.get_slice(name)
    if tuple(found.get_shape()) != shape:
        raise FormatError(
            f"{path}: the tensor {name} has the shape {found.get_shape()}, but {list(shape)} is "
            "expected"
        )
    if found.get_dtype() not in DTYPES:
        raise FormatError(
            f"{path}: the tensor {name} holds {found.get_dtype()}, but one of {', '.join(DTYPES)} "
            "is expected"
        )
    return DTYPES[found.get_dtype()]


def write(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> None:
    """Write tensors one by one, durably and atomically.

    Args:
        path: the file.
        tensors: by name, in file order; each is read just before it is written.
        metadata: strings for the header.

    """
    labels = {dtype: label for label, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
        header[name] = {
            "dtype": labels[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with write_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def is_model(path: Path) -> bool:
    """Whether the file looks like safetensors: a length below 100 MB, and a JSON object."""
    with open_file(path) as file:
        start = file.read(9)
    return (
        len(start) == 9 and int.from_bytes(start[:8], "little") < 100_000_000 and start[8:] == b"{"
    )


def read_model(path: Path) -> tuple[Architecture, Any]:
    """Read a model under our own names (``wte``, ``fcw.3``), with parameters as `LazyTensor`s.

    Raises:
        FormatError: not a gptjax safetensors file, or a tensor is missing, unknown, or has the
            wrong shape; the message names it.

    """
    with opened(path) as file:
        cfg = _architecture(path, file.metadata() or {})
        tensors = _tensors(cfg)
        check_names(path, set(file.keys()), (name for name, _, _ in each_layer(tensors, cfg)))
        dtypes = {
            name: check_tensor(path, file, name, tensor.shape)
            for name, tensor, _ in each_layer(tensors, cfg)
        }

    def read(tensor: FileTensor, layer: int | None, part: Part) -> np.ndarray:
        return read_slice(path, tensor.name.format(layer), part.place)

    return cfg, open_params(
        tensors, cfg, read, lambda tensor, layer: dtypes[tensor.name.format(layer)]
    )


def read_slice(path: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Read a slice of a tensor."""
    with opened(path) as file:
        array: np.ndarray = file.get_slice(name)[index]
        return array


def _architecture(path: Path, metadata: dict[str, str]) -> Architecture:
    """The architecture in a file's metadata; missing fields have their default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Architecture):
        text = metadata.get(field.name)
        if text is None and field.name not in REQUIRED:
            continue
        kind: Any = type(field.default)
        if re.fullmatch(PATTERNS[kind], text or ""):
            found[field.name] = text == "True" if kind is bool else kind(text)
        else:
            raise FormatError(
                f"{path} has no valid {', '.join(REQUIRED)} in its metadata, so gptjax did not "
                "write it; for a Hugging Face model, give the folder with its config.json"
            )
    try:
        cfg = Architecture(**found)
        family_of(cfg)
    except ConfigError as error:
        raise FormatError(f"{path} holds an invalid model: {error}") from error
    return cfg


def _metadata(cfg: Architecture) -> dict[str, str]:
    """Metadata for `_architecture`: required fields, and others that differ from the default."""
    default = Architecture(**{name: getattr(cfg, name) for name in REQUIRED})
    names = [
        *REQUIRED,
        *(f.name for f in dataclasses.fields(Architecture) if f.name not in REQUIRED),
    ]
    chosen = [
        name for name in names if name in REQUIRED or getattr(cfg, name) != getattr(default, name)
    ]
    return {"format": "gptjax", **{name: str(getattr(cfg, name)) for name in chosen}}


def check_names(path: Path, found: set[str], expected: Iterable[str]) -> None:
    """Raise `FormatError` unless exactly the expected tensors are present."""
    known = set()
    for name in expected:
        if name not in found:
            raise FormatError(f"{path} lacks the tensor {name}")
        known.add(name)
    if found - known:
        odd = sorted(found - known)
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise FormatError(
            f"{path} holds tensors that this model does not have: {', '.join(odd[:5])}{more}"
        )


def write_model(path: Path, params: Any, cfg: Architecture, dtype: np.dtype) -> None:
    """Write a model under our own names, tensor by tensor.

    Args:
        path: the file.
        params: in either layout, with or without pad rows.
        cfg: the model.
        dtype: one of `DTYPES`.

    """
    write(path, file_contents(_tensors(cfg), params, cfg, dtype), _metadata(cfg))


def _tensors(cfg: Architecture) -> list[FileTensor]:
    """The file's tensors: by the family's table, by default each parameter under its own name."""
    own = {f"{name}.{{}}" if layered else name: name for name, layered, _, _ in rows(cfg)}
    return file_tensors(TABLES.get(cfg.family, own), cfg)
