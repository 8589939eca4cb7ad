"""Prepare a corpus: ``python -m gptjax.datasets tinyshakespeare``, or any text: ``python -m
gptjax.datasets stories/``.

``gptjax.train --data.dataset`` does the same on first use. Prepared corpora are kept under
``--root`` and reused.
"""

import sys

from gptjax import cli
from gptjax.cli.options import parse
from gptjax.config import DatasetConfig
from gptjax.datasets import find_corpus

PROG = "python -m gptjax.datasets"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG):
        cfg, _ = parse(DatasetConfig, PROG, __doc__ or "", argv)
        corpus = find_corpus(**vars(cfg))
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
