"""Hugging Face models: a folder with ``config.json`` and one or several safetensors files.

`CONVENTIONS` describes how ``transformers`` stores each family. If ``lm_head.weight`` is tied, it
must equal the token embedding. ``transformers`` rotates halves of a Llama's heads, as we do, so
nothing is permuted.
"""

import json
import math
import re
import sys
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
ROPE = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0, None),
}
"""Settings of an unscaled rotary embedding, the only one supported, with their values."""
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
    """Dimensions whose field may be missing or null, and is then our default."""
    read_rest: Callable[[Path, dict[str, Any], dict[str, Any]], dict[str, Any]]
    """``read_rest(path, fields, found)``: the settings that are not dimensions, given the
    dimensions ``found``.
    """
    write_rest: Callable[[Architecture], dict[str, Any]]
    """The fields that `read_rest` reads."""
    dropout: tuple[str, ...]
    """Fields that hold the dropout rate; written, never read."""
    tensors: Table
    prefix: str
    """Prefix of the names in `tensors`; older files on the hub lack it."""
    transposed: bool
    """Whether matrices are (out, in), as `torch.nn.Linear` has them."""
    ignored: re.Pattern[str]
    """Tensors that are not parameters."""


def _read_llama(path: Path, fields: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's base, the norms' eps, and whether the classifier is tied.

    Raises:
        FormatError: the rotary embedding is scaled, the heads are not C / H wide, or a field has
            another type.

    """
    head_dim = fields.get("head_dim")
    if head_dim not in (None, found["channels"] / found["num_heads"]):
        raise FormatError(
            f"{path} has head_dim {head_dim!r}, but only hidden_size / num_attention_heads is "
            "supported"
        )
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise FormatError(f"{path} has no usable tie_word_embeddings: {tied!r}")
    eps = fields.get("rms_norm_eps", 1e-6)
    return {
        "rope_theta": _number(path, "rope_theta", _rope_theta(path, fields)),
        "norm_eps": _number(path, "rms_norm_eps", eps),
        "tied": tied,
    }


def _rope_theta(path: Path, fields: dict[str, Any]) -> Any:
    """The rotary embedding's base: in ``rope_parameters``, or in older models at the top level.

    Raises:
        FormatError: the rotary embedding is not the default one, or has two bases.

    """
    bases = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict):
            raise FormatError(f"{path} has no usable {name}: {rope!r}")
        for key, value in rope.items():
            if key == "rope_theta":
                bases.append(value)
            elif value not in ROPE.get(key, ()):
                raise FormatError(
                    f"{path} has {name} with {key} {value!r}, but only the default rotary "
                    "embedding is supported"
                )
    if any(base != bases[0] for base in bases):
        raise FormatError(f"{path} has two values of rope_theta: {bases[0]!r} and {bases[-1]!r}")
    return bases[0] if bases else 1e4


def _number(path: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FormatError(f"{path} has no usable {name}: {value!r}")
    return float(value) if abs(value) < sys.float_info.max else math.inf


def _write_llama(cfg: Architecture) -> dict[str, Any]:
    """The fields of a Llama that are not dimensions.

    The rotary embedding's base is where old and where new versions of ``transformers`` look for it.
    """
    return {
        "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
    }


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
        read_rest=lambda path, fields, found: {},
        write_rest=lambda cfg: {"n_inner": None} if cfg.hidden == 4 * cfg.channels else {},
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
    ),
    "llama": Convention(
        title="Llama",
        architecture="LlamaForCausalLM",
        expected={
            "model_type": ("llama",),
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
        },
        sizes={
            "num_layers": ("num_hidden_layers",),
            "num_heads": ("num_attention_heads",),
            "num_kv_heads": ("num_key_value_heads",),
            "channels": ("hidden_size",),
            "hidden": ("intermediate_size",),
            "vocab_size": ("vocab_size",),
            "max_seq_len": ("max_position_embeddings",),
        },
        implied=("num_kv_heads",),
        read_rest=_read_llama,
        write_rest=_write_llama,
        dropout=("attention_dropout",),
        tensors={
            "embed_tokens.weight": "tok_emb",
            "layers.{}.input_layernorm.weight": "att_norm",
            "layers.{}.self_attn.q_proj.weight": "wq",
            "layers.{}.self_attn.k_proj.weight": "wk",
            "layers.{}.self_attn.v_proj.weight": "wv",
            "layers.{}.self_attn.o_proj.weight": "wo",
            "layers.{}.post_attention_layernorm.weight": "ffn_norm",
            "layers.{}.mlp.gate_proj.weight": "w1",
            "layers.{}.mlp.up_proj.weight": "w3",
            "layers.{}.mlp.down_proj.weight": "w2",
            "norm.weight": "final_norm",
        },
        prefix="model.",
        transposed=True,
        ignored=re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
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
            f"{path} has model_type {family!r}, but {KIND} of {' or '.join(CONVENTIONS)} is "
            "expected"
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
    found |= theirs.read_rest(path, fields, found)
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
    """The tensors of a model's files; a classifier of its own comes last."""
    tables = {family: theirs.tensors for family, theirs in CONVENTIONS.items()}
    table = table_of(tables, cfg, KIND)
    theirs = CONVENTIONS[cfg.family]
    prefix = theirs.prefix if prefixed else ""
    table = {prefix + name: params for name, params in table.items()}
    head = family_of(cfg).head_name(cfg)
    if head not in table.values():
        table[HEAD] = head
    return file_tensors(table, cfg, transposed=theirs.transposed)


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
    begin_of_text: int | None = None,
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
        begin_of_text: id of the token that begins a document; None for ``end_of_text``.

    Raises:
        ConfigError: the format does not support the family.

    """
    tensors = _tensors(cfg, prefixed=True)
    theirs = CONVENTIONS[cfg.family]
    fields = {
        "architectures": [theirs.architecture],
        **{name: values[0] for name, values in theirs.expected.items()},
        **{name: getattr(cfg, ours) for ours, names in theirs.sizes.items() for name in names},
        **theirs.write_rest(cfg),
        **dict.fromkeys(theirs.dropout, dropout),
        "initializer_range": INIT_STD,
        "bos_token_id": end_of_text if begin_of_text is None else begin_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype.name,
    }

    def fill(into: Path) -> None:
        (into / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        found = file_contents(tensors, params, cfg, dtype)
        # Transformers rejects other values
        safetensors.write(into / MODEL_FILE, found, {"format": "pt"})
        extra(into)

    write_folder(folder, fill)
