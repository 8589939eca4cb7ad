"""A tokenizer with ChatML's control tokens, and conversations."""

from gptjax.tokenizers.bpe import PRINTABLE
from gptjax.tokenizers.hugging_face import HuggingFace, canonical

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]


def chatml_tokenizer() -> HuggingFace:
    """The control tokens, and then each byte."""
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = {PRINTABLE[b]: len(CONTROL) + b for b in range(256)}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True} | added for i, text in enumerate(CONTROL)
        ],
        "pre_tokenizer": {"type": "ByteLevel"} | byte_level,
        "decoder": {"type": "ByteLevel"} | byte_level,
        "model": {
            "type": "BPE",
            "vocab": ids | {c: i for i, c in enumerate(CONTROL)},
            "merges": [],
        },
    }
    return HuggingFace("chatml", *canonical(content, "<|im_end|>")[0])


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
