"""Weights from wherever they are kept, to wherever they should go."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import tokenizers
from gptjax.checkpoint import open_newest
from gptjax.errors import CheckpointError, FormatError, GptjaxError
from gptjax.formats import hf, hf_tokenizer, llmc, safetensors
from gptjax.formats.lazy import tensor_of
from gptjax.formats.recognise import recognise
from gptjax.mesh import param_shardings, place
from gptjax.models.config import DIMENSIONS, GPT2Config
from gptjax.models.params import Block, Params
from gptjax.tokenizers import Tokenizer

Format = Literal["hf", "llmc", "safetensors"]
HUB = "hf:"
HUB_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json"]
HUB_FILES += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
TENSORFLOW, PICKLED = (".index", ".meta", ".ckpt"), (".pt", ".pth", ".pkl", ".ckpt", ".bin")


class Source(NamedTuple):
    """A model where it lies."""

    format: str
    """What it is, in words."""
    cfg: GPT2Config
    params: Params
    """`gptjax.formats.lazy.LazyTensor`s in the unrolled layout."""
    tokenizer: Tokenizer | None
    note: str = ""
    """Why there is no tokenizer, where one would be expected."""


def open_weights(where: str) -> Source:
    """Find out what something is, and open it; no tensor is read yet.

    Args:
        where: the folder of a run or of its checkpoints, of which the newest counts; a Hugging Face GPT-2 folder; an llm.c
            model ``.bin``; safetensors in our own names; or ``hf:NAME``, a model on the Hugging Face hub, which is fetched
            unless the hub's cache has it.

    Raises:
        CheckpointError: there is nothing there, or a run without checkpoints.
        FormatError: it is damaged, or in a format that is not read.

    """
    if where.startswith(HUB):
        return open_weights(str(_from_hub(where.removeprefix(HUB))))._replace(format=f"{hf.KIND} {where}")
    path = Path(where)
    if not path.exists():
        raise CheckpointError(
            f"{where} does not exist: name a run, a Hugging Face folder, an llm.c model .bin, a .safetensors, or {HUB}NAME"
        )
    if path.is_dir() and (path / hf.CONFIG_FILE).exists():
        return _with_tokenizer(Source(hf.KIND, *hf.read_model(path), None), lambda: hf_tokenizer.read(path))
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        kept = folder.parent / tokenizers.FILE
        return _with_tokenizer(Source("gptjax run", *open_newest(folder), None), lambda: tokenizers.load(kept))
    if llmc.is_model(path):
        return Source(llmc.MODEL, *llmc.read_model(path), None)
    if safetensors.is_model(path):
        return Source("gptjax safetensors", *safetensors.read_model(path), None)
    if found := recognise(path):
        raise FormatError(f"{path} is {found}, not weights that are read here")
    raise FormatError(f"{path} is in no format that is known here" + _why_not(path))


def _why_not(path: Path) -> str:
    if path.suffix in TENSORFLOW:
        return ": a TensorFlow checkpoint, maybe, which is not read; the same weights are to be had with hf:gpt2"
    if path.suffix in PICKLED:
        return ": a PyTorch pickle, maybe, which can run any code and is not read; save it as safetensors"
    return ": a run's folder, a Hugging Face folder, an llm.c model .bin or safetensors is expected"


def _with_tokenizer(source: Source, read: Callable[[], Tokenizer]) -> Source:
    """Weights are of use without their tokenizer."""
    try:
        return source._replace(tokenizer=read())
    except GptjaxError as error:
        return source._replace(note=str(error))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, endpoint=os.environ.get("HF_ENDPOINT")))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{HUB}{name} is not in the Hugging Face cache, nor to be downloaded ({reason}): go online once, "
            f"or download its {', '.join(HUB_FILES[:2])} elsewhere and name their folder"
        ) from error


def load_weights(where: str, cfg: GPT2Config | None = None, mesh: Mesh | None = None) -> tuple[GPT2Config, Params]:
    """Parameters in float32, padded, in the layout of the configuration that comes with them.

    Args:
        where: see `open_weights`.
        cfg: how to compute; its dimensions must be those of the parameters. None takes them from there.
        mesh: what to lay them out over, tensor by tensor.

    Returns:
        ``cfg``, or the configuration found, and the parameters.

    Raises:
        CheckpointError: there is nothing of the kind, or its dimensions are not those of ``cfg``.
        FormatError: a damaged or unknown file.

    """
    source = open_weights(where)
    for name in DIMENSIONS if cfg else ():
        if getattr(source.cfg, name) != getattr(cfg, name):
            raise CheckpointError(
                f"{where} has model.{name} {getattr(source.cfg, name)}, not {getattr(cfg, name)}: give it that value"
            )
    cfg = cfg or source.cfg
    return cfg, load_params(source, cfg, mesh)


def load_params(source: Source, cfg: GPT2Config, mesh: Mesh | None = None) -> Params:
    """The parameters of an opened model in float32, padded, in the layout of ``cfg``, whose dimensions are the model's."""
    found = source.cfg
    layout = param_shardings(mesh, cfg) if mesh else Params(*[None] * len(Params._fields))

    def load(name: str, layout: Any) -> Any:
        if name not in Block._fields:
            array = tensor_of(source.params, name, None, found)
            rows = found.padded_vocab_size - found.vocab_size if name == "wte" else 0
            return place(np.pad(array, ((0, rows), (0, 0))) if rows else array, layout)
        layers = (tensor_of(source.params, name, layer, found) for layer in range(found.num_layers))
        if cfg.layers == "scan":
            return place(np.stack([np.asarray(layer, np.float32) for layer in layers]), layout)
        return tuple(place(layer, layout[0] if layout else None) for layer in layers)

    return Params(*map(load, Params._fields, layout))


def write_weights(source: Source, path: Path, to: Format, dtype: np.dtype) -> None:
    """Write a model tensor by tensor; it appears under its name once it is whole.

    Args:
        source: what to write.
        path: a folder for ``hf``, else a file.
        to: ``hf``: a folder for ``transformers``; ``llmc``: version 3 in float32, 5 in bfloat16; ``safetensors``: our names.
        dtype: float32 or bfloat16.

    """
    if to == "llmc":
        llmc.write_model(path, source.params, source.cfg, 3 if dtype == np.float32 else 5)
    elif to == "safetensors":
        safetensors.write_model(path, source.params, source.cfg, dtype)
    else:
        known = source.tokenizer
        end = known.end_of_text if known else None

        def extra(into: Path) -> None:
            if known and hf_tokenizer.can_write(known):
                hf_tokenizer.write(into, known)

        hf.write_model(path, source.params, source.cfg, dtype, end, extra)


def dtype_of(source: Source) -> np.dtype:
    """What the model is written in: bfloat16 if all of its tensors are, float32 for everything else."""
    kinds = {tensor.dtype for tensor in jax.tree.leaves(source.params)}
    return np.dtype(jnp.bfloat16) if kinds == {np.dtype(jnp.bfloat16)} else np.dtype(np.float32)
