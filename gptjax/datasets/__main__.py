"""Prepare a corpus: ``python -m gptjax.datasets tinyshakespeare``, or any text: ``python -m gptjax.datasets stories/``.

``gptjax.train --data.dataset`` does the same on first use. What it makes lies under ``--root``, and is not made twice.
"""

import sys

from gptjax import cli
from gptjax.datasets import CORPORA, find_corpus

PROG = "python -m gptjax.datasets"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("dataset", type=str, help=f"one of {', '.join(CORPORA)}, or a file, folder or pattern of text")
    parser.add_argument("--root", default="data", type=str, help="folder in which prepared corpora are kept")
    parser.add_argument("--tokenizer", type=str | None, help="gpt2, byte, char, bpe:SIZE or a file; by default its own")
    parser.add_argument("--column", type=str | None, help="of .jsonl and .parquet, the one that holds the text")
    parser.add_argument("--tokens", type=int | None, help="training tokens that are enough, where a corpus comes in parts")
    with cli.reported_errors(PROG):
        corpus = find_corpus(**vars(parser.parse_args(argv)))
        for split, shards in (("train", corpus.train), ("val", corpus.val)):
            tokens = sum(shard.tokens.size for shard in shards)
            print(f"{split:<10} {tokens:,} tokens in {len(shards)} shard{'s' * (len(shards) > 1)}")
        if corpus.tokenizer:
            print(f"{'tokenizer':<10} {corpus.tokenizer.vocab_size} ids")
        print(f"{'folder':<10} {corpus.folder}")
        print(f"{'sha256':<10} {corpus.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
