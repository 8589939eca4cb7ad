"""The commands: ``python -m gptjax`` lists them."""

import sys

from gptjax import __version__

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue text with a model",
    "chat": "talk with a model",
    "evaluate": "perplexity on a corpus or a text, HellaSwag",
    "verify": "check the hand-written gradient",
    "explore": "write a page that shows a model's backward, op by op",
    "plot": "draw the metrics of runs",
    "convert": "inspect models, convert them to other formats",
    "datasets": "prepare a corpus",
    "tokenizers": "train a tokenizer, encode, decode",
    "plan": "predict memory, collectives and step time on any devices",
    "bench": "time steps, decoding, data and the loop",
}


def main() -> int:
    """List the commands."""
    print(f"gptjax {__version__}\n")
    for name, purpose in COMMANDS.items():
        print(f"  python -m gptjax.{name:<11} {purpose}")
    print("\nEach has --help. Begin with: python -m gptjax.train --config configs/debug.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
