"""Train a tokenizer, or turn text into ids and back: ``python -m gptjax.tokenizers train|encode|decode|export``.

``train --input stories.txt --vocab_size 2048 --output tokenizer.json`` trains a byte-level BPE; ``--kind char`` takes the
text's characters. ``encode --tokenizer gpt2 some text`` prints ids, ``decode --tokenizer gpt2 15496 11`` text; both read
standard input where nothing is given. ``export --tokenizer gpt2 --output gpt2_tokenizer.bin`` writes llm.c's file.
"""

import sys
from pathlib import Path
from typing import Any

from gptjax import cli, tokenizers
from gptjax.datasets.prepare import make_tokenizer
from gptjax.datasets.text import find_files, pieces
from gptjax.errors import ConfigError
from gptjax.formats import llmc_tokenizer
from gptjax.tokenizers import BytePairEncoding

PROG = "python -m gptjax.tokenizers"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG):
        args: Any = _parser().parse_args(argv)
        if not args.command:
            raise ConfigError("say what to do: train, encode, decode or export; --help explains each")
        cli.replace_unprintable()
        {"train": train, "encode": encode, "decode": decode, "export": export}[args.command](args[args.command])
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser(prog=PROG, description=__doc__)
    commands = parser.add_subcommands(dest="command", required=False)

    def command(name: str, does: str) -> cli.Parser:
        sub = cli.Parser(description=does)
        commands.add_subcommand(name, sub, help=does)
        return sub

    of = "gpt2, byte, a tokenizer.json, a folder that holds one, or llm.c's gpt2_tokenizer.bin"
    sub = command("train", "Make a vocabulary from text.")
    sub.add_argument("--input", required=True, type=str, help="file, folder or pattern of text, as for --data.dataset")
    sub.add_argument("--column", type=str | None, help="of .jsonl and .parquet, the one that holds the text")
    sub.add_argument("--kind", default="bpe", choices=["bpe", "char"], help="what to train")
    sub.add_argument("--vocab_size", default=2048, type=int, help="of a BPE: 256 bytes, the merges, and end-of-text")
    sub.add_argument("--output", default="tokenizer.json", type=str, help="file to write")
    sub = command("encode", "Text to ids.")
    sub.add_argument("--tokenizer", required=True, type=str, help=of)
    sub.add_argument("text", nargs="*", type=str, help="joined by spaces; standard input without")
    sub = command("decode", "Ids to text.")
    sub.add_argument("--tokenizer", required=True, type=str, help=of)
    sub.add_argument("ids", nargs="*", type=int, help="standard input without")
    sub = command("export", "Write llm.c's gpt2_tokenizer.bin.")
    sub.add_argument("--tokenizer", required=True, type=str, help=of)
    sub.add_argument("--output", default="gpt2_tokenizer.bin", type=str, help="file to write")
    return parser


def train(args: Any) -> None:
    """Train, and say what came of it."""
    files = find_files(args.input)
    which = "char" if args.kind == "char" else f"bpe:{args.vocab_size}"
    made = make_tokenizer(
        which, lambda: (piece.text for piece in pieces(files, args.column)), lambda: pieces(files, args.column)
    )
    made.save(args.output)
    print(f"{made.vocab_size} ids in {args.output}")


def encode(args: Any) -> None:
    """Print the ids of the text."""
    text = " ".join(args.text) if args.text else _standard_input()
    print(*tokenizers.find(args.tokenizer).encode(text))


def decode(args: Any) -> None:
    """Print the text of the ids."""
    try:
        ids = args.ids or [int(word) for word in _standard_input().split()]
    except ValueError as error:
        raise ConfigError(f"ids are whole numbers: {error}") from error
    print(tokenizers.find(args.tokenizer).decode(ids))


def export(args: Any) -> None:
    """Write llm.c's file."""
    tokenizer = tokenizers.find(args.tokenizer)
    if not isinstance(tokenizer, BytePairEncoding):
        raise ConfigError(f"{args.tokenizer} has no byte-level tokens, which is what llm.c's file holds")
    tokens = [*tokenizer.tokens(), tokenizers.END_OF_TEXT.encode()]
    try:
        llmc_tokenizer.write_tokenizer(args.output, tokens, tokenizer.end_of_text)
    except ValueError as error:
        raise ConfigError(f"{args.tokenizer} does not fit llm.c's file: {error}") from error
    print(f"{len(tokens)} tokens in {args.output}, {Path(args.output).stat().st_size} bytes")


def _standard_input() -> str:
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
