"""Hugging Face's GPT-2: a folder of ``config.json`` and safetensors, maybe in several files (``transformers``).

Its linear weights are (in, out), as ours. Names may begin with ``transformer.``; the causal masks that older files carry
are left out; ``lm_head.weight`` is the token embedding once more.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.durable import write_folder
from gptjax.errors import ConfigError, FormatError
from gptjax.formats import safetensors
from gptjax.formats.json_files import read_object
from gptjax.formats.lazy import collect, tensor_names, tensor_of
from gptjax.models.config import GPT2Config
from gptjax.models.params import Params

KIND = "Hugging Face GPT-2"
CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "transformer."
PARTS = {
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}
OUTSIDE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
HEAD = "lm_head.weight"
HEAD_ROWS = 4096  # compared at a time
EPS = 1e-5
# A field of config.json: the values with which the model is the one that is computed here.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def their_name(name: str, layer: int | None) -> str:
    """The name without its prefix: ``h.3.mlp.c_fc.weight`` for (``fcw``, 3)."""
    if layer is None:
        return OUTSIDE[name]
    return f"h.{layer}.{PARTS[name[:-1]]}.{'weight' if name.endswith('w') else 'bias'}"


def read_config(path: Path) -> GPT2Config:
    """The model's dimensions from ``config.json``.

    Raises:
        FormatError: it is missing, no JSON, or of a model that is not GPT-2 as it is computed here; the field is named.

    """
    fields = read_object(path)
    for name, values in EXPECTED.items():
        if fields.get(name, values[0]) not in values:
            raise FormatError(f"{path} has {name} {fields[name]!r}, but this GPT-2 has {values[0]!r}")
    sizes = {"num_layers": "n_layer", "num_heads": "n_head", "channels": "n_embd", "vocab_size": "vocab_size"}
    found: dict[str, Any] = {ours: fields.get(theirs) for ours, theirs in sizes.items()}
    found["max_seq_len"] = fields.get("n_positions", fields.get("n_ctx"))
    for ours, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**24:
            raise FormatError(f"{path} has no usable {sizes.get(ours, 'n_positions')}: {value!r}")
    inner = fields.get("n_inner")
    if inner not in (None, 4 * found["channels"]):
        raise FormatError(f"{path} has n_inner {inner}, but this GPT-2 has 4 n_embd, {4 * found['channels']}")
    try:
        return GPT2Config(**found)
    except ConfigError as error:
        raise FormatError(f"{path} is of a model that cannot be: {error}") from error


def read_model(folder: Path) -> tuple[GPT2Config, Params]:
    """The model in a folder; tensors stay in their files until they are used.

    Raises:
        FormatError: a file is missing or damaged, or a tensor is missing, unknown, or of another shape; it is named.

    """
    cfg = read_config(folder / CONFIG_FILE)
    files = _files(folder)
    if cfg.num_layers > len(files):
        raise FormatError(
            f"{folder / CONFIG_FILE} announces {cfg.num_layers} layers, but there are {len(files)} tensors in all"
        )
    prefix = PREFIX if any(name.startswith(PREFIX) for name in files) else ""
    names = {(name, layer): prefix + their_name(name, layer) for name, layer, _ in tensor_names(cfg)}
    needed = {name for name in files if not MASK.fullmatch(name) and name != HEAD}
    safetensors.check_names(folder, needed, names.values())
    shapes = {names[name, layer]: shape for name, layer, shape in tensor_names(cfg)}
    if HEAD in files:
        shapes[HEAD] = shapes[names["wte", None]]
    dtypes: dict[str, np.dtype] = {}
    for path in set(files.values()):
        with safetensors.opened(path) as file:
            held = set(file.keys())
            for name in (name for name, place in files.items() if place == path and name in shapes):
                if name not in held:
                    raise FormatError(f"{path} lacks the tensor {name}, which {INDEX_FILE} says is in it")
                dtypes[name] = safetensors.check_tensor(path, file, name, shapes[name])

    def load(name: str, layer: int | None) -> np.ndarray:
        return _load(files, names[name, layer])

    if HEAD in files and not _equal(files, HEAD, names["wte", None], cfg.vocab_size):
        raise FormatError(f"{files[HEAD]}: {HEAD} differs from the token embedding, but this GPT-2 uses one for both")
    return cfg, collect(cfg, load, lambda *place: dtypes[names[place]])


def _equal(files: dict[str, Path], a: str, b: str, rows: int) -> bool:
    """Whether two tensors are, compared a few rows at a time."""
    with safetensors.opened(files[a]) as file_a, safetensors.opened(files[b]) as file_b:
        x, y = file_a.get_slice(a), file_b.get_slice(b)
        return all(
            np.array_equal(x[i : min(i + HEAD_ROWS, rows)], y[i : min(i + HEAD_ROWS, rows)]) for i in range(0, rows, HEAD_ROWS)
        )


def _load(files: dict[str, Path], name: str) -> np.ndarray:
    with safetensors.opened(files[name]) as file:
        array: np.ndarray = file.get_tensor(name)
        return array


def _files(folder: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    if (folder / MODEL_FILE).exists():
        with safetensors.opened(folder / MODEL_FILE) as file:
            return dict.fromkeys(file.keys(), folder / MODEL_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        pickled = next((name for name in PICKLES if (folder / name).exists()), None)
        reason = f"{pickled} is a pickle, which can run any code and is not read; " if pickled else ""
        raise FormatError(f"{folder} holds neither {MODEL_FILE} nor {INDEX_FILE}: {reason}save it as safetensors")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{index} has no weight_map from tensors to files")
    missing = set(places.values()) - {path.name for path in folder.iterdir() if path.is_file()}
    if missing:
        raise FormatError(f"{index} names the file {min(missing)[:100]!r}, which is not in {folder}")
    return {str(name): folder / place for name, place in places.items()}


def write_model(
    folder: Path, params: Params, cfg: GPT2Config, dtype: np.dtype, end_of_text: int | None, extra: Callable[[Path], None]
) -> None:
    """Write a folder that ``transformers`` loads; it appears once everything is in it.

    Args:
        folder: must not exist.
        params: in either layout, with or without pad rows.
        cfg: their dimensions.
        dtype: one of `gptjax.formats.safetensors.DTYPES`.
        end_of_text: id that begins and ends a text, if there is one.
        extra: writes further files, of a tokenizer, into the folder.

    """
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in EXPECTED.items()},
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.channels,
        "n_positions": cfg.max_seq_len,
        "n_ctx": cfg.max_seq_len,
        "n_inner": None,
        "vocab_size": cfg.vocab_size,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), cfg.dropout),
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": {2: "bfloat16", 4: "float32"}[dtype.itemsize],
    }
    places = {PREFIX + their_name(name, layer): (name, layer, shape) for name, layer, shape in tensor_names(cfg)}

    def load(key: str) -> np.ndarray:
        return tensor_of(params, *places[key][:2], cfg)

    def fill(into: Path) -> None:
        (into / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        shapes = ((key, shape) for key, (_, _, shape) in places.items())
        safetensors.write(into / MODEL_FILE, shapes, dtype, load, {"format": "pt"})  # transformers refuses other formats
        extra(into)

    write_folder(folder, fill)
