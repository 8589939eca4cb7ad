"""Hugging Face models: a folder with ``config.json`` and one or several safetensors files.

`CONVENTIONS` describes how ``transformers`` stores each family. If ``lm_head.weight`` is tied, it
must equal the token embedding.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Architecture
from gptjax.errors import ConfigError, FormatError
from gptjax.files import write_folder
from gptjax.formats import safetensors
from gptjax.formats.json_files import read_object
from gptjax.formats.tables import (
    FileTensor,
    Part,
    Table,
    each_layer,
    file_contents,
    file_tensors,
    open_params,
    table_of,
)
from gptjax.models.family import family_of
from gptjax.models.params import INIT_STD

KIND = "a Hugging Face folder"
CONFIG_FILE, MODEL_FILE, INDEX_FILE = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
HEAD = "lm_head.weight"
HEAD_ROWS = 4096  # rows compared at a time
LARGEST = 2**24  # upper bound of any size in config.json
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Convention(NamedTuple):
    """How ``transformers`` stores a family."""

    title: str
    architecture: str
    """The class in ``transformers``."""
    expected: dict[str, tuple[Any, ...]]
    """Fields of config.json with their supported values; the first is written."""
    sizes: dict[str, tuple[str, ...]]
    """Fields that hold each dimension: all are written, the first one present is read."""
    implied: tuple[str, ...]
    """Dimensions written as null when they have our default."""
    dropout: tuple[str, ...]
    """Fields that hold the dropout rate; written, never read."""
    tensors: Table
    prefix: str
    """Prefix of the names in `tensors`; older files on the hub lack it."""
    transposed: bool
    """Whether matrices are (out, in), as `torch.nn.Linear` has them."""
    ignored: re.Pattern[str]
    """Tensors that are not parameters."""


CONVENTIONS = {
    "gpt2": Convention(
        title="GPT-2",
        architecture="GPT2LMHeadModel",
        expected={
            "model_type": ("gpt2",),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
        sizes={
            "num_layers": ("n_layer",),
            "num_heads": ("n_head",),
            "channels": ("n_embd",),
            "max_seq_len": ("n_positions", "n_ctx"),
            "hidden": ("n_inner",),
            "vocab_size": ("vocab_size",),
        },
        implied=("hidden",),
        dropout=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
        tensors={
            "wte.weight": "wte",
            "wpe.weight": "wpe",
            "h.{}.ln_1.weight": "ln1w",
            "h.{}.ln_1.bias": "ln1b",
            "h.{}.attn.c_attn.weight": "qw kw vw",
            "h.{}.attn.c_attn.bias": "qb kb vb",
            "h.{}.attn.c_proj.weight": "attprojw",
            "h.{}.attn.c_proj.bias": "attprojb",
            "h.{}.ln_2.weight": "ln2w",
            "h.{}.ln_2.bias": "ln2b",
            "h.{}.mlp.c_fc.weight": "fcw",
            "h.{}.mlp.c_fc.bias": "fcb",
            "h.{}.mlp.c_proj.weight": "fcprojw",
            "h.{}.mlp.c_proj.bias": "fcprojb",
            "ln_f.weight": "lnfw",
            "ln_f.bias": "lnfb",
        },
        prefix="transformer.",
        transposed=False,
        ignored=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),
    )
}


def title(cfg: Architecture) -> str:
    """Description of a folder that holds such a model."""
    return f"Hugging Face {CONVENTIONS[cfg.family].title}"


def read_config(path: Path) -> Architecture:
    """Read the architecture from ``config.json``.

    Raises:
        FormatError: it is missing, not JSON, or describes an unsupported model; the message names
            the field.

    """
    fields = read_object(path)
    family = fields.get("model_type", "gpt2")
    if not isinstance(family, str) or family not in CONVENTIONS:
        raise FormatError(
            f"{path} has model_type {family!r}, but {KIND} of {', '.join(CONVENTIONS)} is expected"
        )
    theirs = CONVENTIONS[family]
    for name, values in theirs.expected.items():
        if fields.get(name, values[0]) not in values:
            raise FormatError(
                f"{path} has {name} {fields[name]!r}, but this {theirs.title} has {values[0]!r}"
            )
    found: dict[str, Any] = {}
    for ours, names in theirs.sizes.items():
        name = next((name for name in names if name in fields), names[0])
        value = fields.get(name)
        if value is None and ours in theirs.implied:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise FormatError(f"{path} has no usable {name}: {value!r}")
        found[ours] = value
    try:
        return Architecture(family=family, **found)
    except ConfigError as error:
        raise FormatError(f"{path} describes an invalid model: {error}") from error


def read_model(folder: Path) -> tuple[Architecture, Any]:
    """Read the architecture from a folder, and its parameters as `LazyTensor`s.

    Raises:
        FormatError: a file is missing or damaged, or a tensor is missing, unknown, or has the wrong
            shape; the message names it.

    """
    cfg = read_config(folder / CONFIG_FILE)
    files = _files(folder)
    if cfg.num_layers > len(files):
        raise FormatError(
            f"{folder / CONFIG_FILE} announces {cfg.num_layers} layers, but there are "
            f"{len(files)} tensors in all"
        )
    theirs = CONVENTIONS[cfg.family]
    tensors = _tensors(cfg, any(name.startswith(theirs.prefix) for name in files))
    shapes = {name: tensor.shape for name, tensor, _ in each_layer(tensors, cfg)}
    head = next(
        tensor.name
        for tensor in tensors
        if family_of(cfg).head_name(cfg) in [part.param for part in tensor.parts]
    )
    tied = HEAD in files and HEAD not in shapes
    if tied:
        shapes[HEAD] = shapes[head]
    safetensors.check_names(
        folder, {name for name in files if not theirs.ignored.fullmatch(name)}, shapes
    )
    dtypes: dict[str, np.dtype] = {}
    for path in set(files.values()):
        with safetensors.opened(path) as file:
            held = set(file.keys())
            for name in (name for name, place in files.items() if place == path and name in shapes):
                if name not in held:
                    raise FormatError(
                        f"{path} lacks the tensor {name}, which {INDEX_FILE} says is in it"
                    )
                dtypes[name] = safetensors.check_tensor(path, file, name, shapes[name])

    def read(tensor: FileTensor, layer: int | None, part: Part) -> np.ndarray:
        name = tensor.name.format(layer)
        return safetensors.read_slice(files[name], name, part.place)

    if tied and not _equal(files, HEAD, head, cfg.vocab_size):
        raise FormatError(
            f"{files[HEAD]}: {HEAD} differs from the token embedding, but this {theirs.title} "
            "uses one for both"
        )
    return cfg, open_params(
        tensors, cfg, read, lambda tensor, layer: dtypes[tensor.name.format(layer)]
    )


def _tensors(cfg: Architecture, prefixed: bool) -> list[FileTensor]:
    """The tensors of a model's files."""
    tables = {family: theirs.tensors for family, theirs in CONVENTIONS.items()}
    table = table_of(tables, cfg, KIND)
    theirs = CONVENTIONS[cfg.family]
    prefix = theirs.prefix if prefixed else ""
    return file_tensors(
        {prefix + name: params for name, params in table.items()}, cfg, transposed=theirs.transposed
    )


def _equal(files: dict[str, Path], a: str, b: str, rows: int) -> bool:
    """Compare two tensors a few rows at a time."""
    with safetensors.opened(files[a]) as file_a, safetensors.opened(files[b]) as file_b:
        x, y = file_a.get_slice(a), file_b.get_slice(b)
        return all(
            np.array_equal(x[i : min(i + HEAD_ROWS, rows)], y[i : min(i + HEAD_ROWS, rows)])
            for i in range(0, rows, HEAD_ROWS)
        )


def _files(folder: Path) -> dict[str, Path]:
    """Map each tensor to its file."""
    if (folder / MODEL_FILE).exists():
        with safetensors.opened(folder / MODEL_FILE) as file:
            return dict.fromkeys(file.keys(), folder / MODEL_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        pickled = next((name for name in PICKLES if (folder / name).exists()), None)
        reason = (
            f"{pickled} is a pickle, which can run any code and is not read; " if pickled else ""
        )
        raise FormatError(
            f"{folder} holds neither {MODEL_FILE} nor {INDEX_FILE}: {reason}save it as safetensors"
        )
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{index} has no weight_map from tensors to files")
    missing = set(places.values()) - {path.name for path in folder.iterdir() if path.is_file()}
    if missing:
        raise FormatError(
            f"{index} names the file {min(missing)[:100]!r}, which is not in {folder}"
        )
    return {str(name): folder / place for name, place in places.items()}


def write_model(
    folder: Path,
    params: Any,
    cfg: Architecture,
    dtype: np.dtype,
    end_of_text: int | None,
    extra: Callable[[Path], None],
    dropout: float = 0.0,
) -> None:
    """Write a folder that ``transformers`` can load; it appears only when complete.

    Args:
        folder: must not exist.
        params: in either layout, with or without pad rows.
        cfg: the model.
        dtype: one of `gptjax.formats.safetensors.DTYPES`.
        end_of_text: id of the end-of-text token, if any.
        extra: writes further files, such as a tokenizer, into the folder.
        dropout: the rate used in training.

    Raises:
        ConfigError: the format does not support the family.

    """
    tensors = _tensors(cfg, prefixed=True)
    theirs = CONVENTIONS[cfg.family]
    zeros: dict[str, Any] = dict.fromkeys(theirs.implied, 0)
    default = dataclasses.replace(cfg, **zeros)
    sizes = {ours: getattr(cfg, ours) for ours in theirs.sizes}
    sizes |= {ours: None for ours in theirs.implied if sizes[ours] == getattr(default, ours)}
    fields = {
        "architectures": [theirs.architecture],
        **{name: values[0] for name, values in theirs.expected.items()},
        **{name: sizes[ours] for ours, names in theirs.sizes.items() for name in names},
        **dict.fromkeys(theirs.dropout, dropout),
        "initializer_range": INIT_STD,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": {2: "bfloat16", 4: "float32"}[dtype.itemsize],
    }

    def fill(into: Path) -> None:
        (into / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        found = file_contents(tensors, params, cfg, dtype)
        # Transformers rejects other values
        safetensors.write(into / MODEL_FILE, found, {"format": "pt"})
        extra(into)

    write_folder(folder, fill)
