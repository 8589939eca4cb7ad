"""Train a tokenizer, encode text, decode ids: ``python -m gptjax.tokenizers
train|encode|decode|export``.

``train --input stories.txt --vocab_size 2048 --output tokenizer.json`` trains a byte-level BPE;
``--kind sentencepiece`` trains SentencePiece's as llama2.c does, ``--kind char`` takes the text's
characters. ``encode --tokenizer gpt2 some text`` prints
ids, ``decode --tokenizer gpt2 15496 11`` prints text. Without text or ids, both read standard
input. ``encode --output`` writes a token shard, which ``decode --input`` reads. ``export
--tokenizer gpt2`` writes llm.c's ``gpt2_tokenizer.bin``, or llama2.c's ``tokenizer.bin`` for a
tokenizer with scores.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import cli, tokenizers
from gptjax.cli.options import described, parse
from gptjax.cli.streams import standard_input
from gptjax.config import DecodeConfig, EncodeConfig, ExportTokenizerConfig, TrainTokenizerConfig
from gptjax.datasets.prepare import id_dtype, make_tokenizer
from gptjax.datasets.text import Piece, find_files, pieces
from gptjax.errors import ConfigError, DataError
from gptjax.formats import llama2c_tokenizer, llmc_tokenizer
from gptjax.formats.token_shards import open_shard, write_shard
from gptjax.tokenizers.llama2c import SCORED, scored

PROG = "python -m gptjax.tokenizers"
CHUNK = 1 << 16  # ids decoded at a time
MOST_BYTES = 1 << 28  # read from standard input into memory


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG):
        words = sys.argv[1:] if argv is None else argv
        name, *rest = words or [""]
        if name in ("-h", "--help", "--help_all"):
            print(
                described(__doc__ or ""),
                "",
                *(f"  {PROG} {name} --help" for name in COMMANDS),
                sep="\n",
            )
            return 0
        if name not in COMMANDS:
            raise ConfigError(
                "the subcommand is missing: give train, encode, decode or export; see --help"
            )
        config_class, run = COMMANDS[name]
        cli.replace_unprintable()
        cfg, _ = parse(config_class, f"{PROG} {name}", run.__doc__ or "", rest)
        run(cfg)
        sys.stdout.flush()
    return 0


def refuse_existing(path: str | None) -> None:
    """Raise `ConfigError` if the file exists; nothing is overwritten."""
    if path and Path(path).exists():
        raise ConfigError(f"{path} already exists: name another file, or remove it")


def train(args: TrainTokenizerConfig) -> None:
    """Train a tokenizer and write it to a file."""
    refuse_existing(args.output)
    files = [file for given in args.input for file in find_files(given)]
    which = "char" if args.kind == "char" else f"{args.kind}:{args.vocab_size}"

    def everything() -> Iterator[Piece]:
        return pieces(files, args.column)

    made = make_tokenizer(which, lambda: (piece.text for piece in everything()), everything)
    named: Any = dataclasses.replace(made, name=f"{files[0].stem}-{made.name}")  # type: ignore[type-var]
    named.save(args.output)
    print(f"{named.vocab_size} ids in {args.output}")


def encode(args: EncodeConfig) -> None:
    """Print the ids of the text, or write them as a shard."""
    refuse_existing(args.output)
    tokenizer = tokenizers.find(args.tokenizer)
    ids = tokenizer.encode(" ".join(args.text) if args.text else _standard_input())
    if args.output:
        dtype = id_dtype(tokenizer)
        count = write_shard(args.output, np.array(ids, dtype), dtype)
        print(f"{count} ids in {args.output}, {dtype.name}")
    else:
        print(*ids)


def decode(args: DecodeConfig) -> None:
    """Print the text of the ids."""
    tokenizer = tokenizers.find(args.tokenizer)
    if args.input and args.ids:
        raise ConfigError("ids and --input are both given: leave one of them out")
    ids = open_shard(args.input).tokens if args.input else args.ids or _ids(_standard_input())
    before = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    for begin in range(0, len(ids), CHUNK):
        part = list(map(int, ids[begin : begin + CHUNK]))
        sys.stdout.buffer.write(tokenizer.decode_more(before, part))
        before = part[-1:]
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise DataError(
            f"ids must be whole numbers separated by blanks: {str(error)[:100]}"
        ) from error


def export(args: ExportTokenizerConfig) -> None:
    """Write a tokenizer as llm.c's or llama2.c's file."""
    tokenizer = tokenizers.find(args.tokenizer)
    to = args.to or ("llama2c" if isinstance(tokenizer, SCORED) else "llmc")
    output = args.output or {"llmc": "gpt2_tokenizer.bin", "llama2c": "tokenizer.bin"}[to]
    refuse_existing(output)
    if to == "llama2c":
        chosen = scored(tokenizer)
        llama2c_tokenizer.write_tokenizer(output, chosen.tokens, chosen.scores)
    else:
        _export_llmc(tokenizer, args, output)
    print(f"{tokenizer.vocab_size} tokens in {output}, {Path(output).stat().st_size} bytes")


def _export_llmc(tokenizer: tokenizers.Tokenizer, args: ExportTokenizerConfig, output: str) -> None:
    if tokenizer.end_of_text is None:
        raise ConfigError(f"{args.tokenizer} has no end-of-text id, which llm.c's file needs")
    if not isinstance(tokenizer, tokenizers.BytePairEncoding):
        raise ConfigError(
            f"the ids of {args.tokenizer} are not the ranks of its merges, which llm.c's file needs"
        )
    try:
        llmc_tokenizer.write_tokenizer(
            output, tokenizer.pieces, tokenizer.end_of_text, args.version
        )
    except ValueError as error:
        raise ConfigError(f"{args.tokenizer} does not fit llm.c's file: {error}") from error


def _standard_input() -> str:
    try:
        return standard_input(MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "train": (TrainTokenizerConfig, train),
    "encode": (EncodeConfig, encode),
    "decode": (DecodeConfig, decode),
    "export": (ExportTokenizerConfig, export),
}

if __name__ == "__main__":
    sys.exit(main())
