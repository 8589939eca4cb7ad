"""Continuations of prompts: their tokens, their text, and why they ended."""

from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal

from gptjax.generate.engine import CHUNK, Rules, generate
from gptjax.generate.stream import TextStream
from gptjax.tokenizers import Tokenizer, as_text


class Sample:
    """One continuation while it is generated."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        """Start with no tokens; the text ends before the first of ``stops``."""
        self.tokenizer, self.prompt = tokenizer, prompt
        self.stream = TextStream(tokenizer, stops, prompt[-1])
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Literal["length", "end", "stop"] | None = None
        """``end``: end-of-text was drawn; ``stop``: a stop string appeared; ``length``: neither,
        all tokens are drawn; None: not finished.
        """

    def take(
        self, ids: Sequence[int], logprobs: Sequence[float], ends: Container[int], last: bool
    ) -> str:
        """Add tokens up to one that ends the continuation; returns the text that is now final."""
        text = ""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish:
                return text
            self.ids.append(token)
            self.logprobs.append(logprob)
            if token in ends:
                self.finish = "end"
                return text + self.stream.feed([], last=True)
            text += self.stream.feed([token])
            if self.stream.stopped:
                self.finish = "stop"
        if last and not self.finish:
            self.finish = "length"
            text += self.stream.feed([], last=True)
        return text

    def visible_ids(self) -> list[int]:
        """The ids of the visible text, without end-of-text or a stop string."""
        if self.finish == "stop":
            return self.tokenizer.encode_more(self.stream.text) if self.stream.text else []
        return self.ids[:-1] if self.finish == "end" else self.ids

    def record(self, logprobs: bool) -> dict[str, Any]:
        """The continuation as a JSON object."""
        found = {"text": self.stream.text, "finish": self.finish, "ids": self.ids}
        return found | {"logprobs": self.logprobs} if logprobs else found

    def listing(self, logprobs: bool) -> str:
        """A line ``id, text`` for each token, or ``id, logprob, text``."""
        lines = []
        for token, logprob in zip(self.ids, self.logprobs, strict=True):
            middle = f"{logprob:9.4f}, " if logprobs else ""
            lines.append(f"{token:>6}, {middle}{as_text(self.tokenizer.decode_bytes([token]))}")
        return "\n".join(lines)


def continued(
    params: Any,
    samples: Sequence[Sample],
    rules: Rules,
    key: Any,
    new_tokens: int,
    chunk: int = CHUNK,
    first: int = 0,
) -> Iterator[list[str]]:
    """Extend all samples until each is finished, yielding the new text of each; see `generate`."""
    left = new_tokens
    for new in generate(
        params, [sample.prompt for sample in samples], rules, key, new_tokens, chunk, first=first
    ):
        left -= new.tokens.shape[1]
        rows = zip(samples, new.tokens.tolist(), new.logprobs.tolist(), strict=True)
        yield [sample.take(ids, logprobs, rules.ends, left == 0) for sample, ids, logprobs in rows]
        if all(sample.finish for sample in samples):
            return
