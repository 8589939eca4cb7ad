"""A conversation: its messages, the part that the model sees, and the model's answers."""

from collections.abc import Iterator
from typing import Any

from gptjax.errors import DataError
from gptjax.generate.engine import CHUNK
from gptjax.generate.session import Session
from gptjax.generate.stream import TextStream
from gptjax.tokenizers import Tokenizer
from gptjax.tokenizers.chat_template import ChatTemplate, Endings, encode


class Conversation:
    """Alternating messages of a user and a model.

    If they outgrow the model's context, the model no longer sees the oldest turns. They are hidden
    until the rest takes half a context, so that it is seldom read again.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        endings: Endings,
        system: str | None = None,
    ) -> None:
        """Start an empty conversation.

        Args:
            session: the model, whose rules end a text at the ids of ``endings``.
            tokenizer: the model's tokenizer.
            template: the model's chat template.
            endings: see `gptjax.tokenizers.chat_template.endings`.
            system: a first message, which the model always sees.

        """
        self.session, self.tokenizer = session, tokenizer
        self.template, self.endings = template, endings
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.said: list[dict[str, str]] = []
        """The user's messages and the answers."""
        self.hidden = 0
        """The number of oldest messages that the model no longer sees."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, including those that the model no longer sees."""
        return self.system + self.said

    def answer(self, text: str, key: Any, new_tokens: int, chunk: int = CHUNK) -> Iterator[str]:
        """Add the user's message and yield the answer in parts, as they become final.

        An iteration that is abandoned leaves the answer as far as it came.

        Args:
            text: the user's message.
            key: see `gptjax.generate.engine.generate`.
            new_tokens: the most tokens to draw.
            chunk: the most tokens to draw for a part.

        Raises:
            DataError: the message alone does not fit the context, the vocabulary lacks one of its
                characters, or the template rejects it; the conversation is then unchanged.
            CheckpointError: the model's probabilities are not finite.

        """
        said = [*self.said, {"role": "user", "content": text}]
        ids, self.hidden = self._in_view(said, new_tokens)
        answer = {"role": "assistant", "content": ""}
        self.said = [*said, answer]
        return self._continued(answer, ids, key, new_tokens, chunk)

    def _continued(
        self, answer: dict[str, str], ids: list[int], key: Any, new_tokens: int, chunk: int
    ) -> Iterator[str]:
        stream = TextStream(self.tokenizer, self.endings.texts, ids[-1])
        for new in self.session.continued(ids, key, new_tokens, chunk):
            tokens = [i for i in new.tokens[0].tolist() if i not in self.endings.ids]
            part = stream.feed(tokens)
            answer["content"] = stream.text
            yield part
            if stream.stopped:
                return
        rest = stream.feed([], last=True)
        answer["content"] = stream.text
        yield rest

    def _in_view(self, said: list[dict[str, str]], new_tokens: int) -> tuple[list[int], int]:
        """The ids of what the model is to see, and how many messages it is not to."""
        context = self.session.rules.cfg.max_seq_len
        most = context - min(new_tokens, context // 4)
        hidden = self.hidden
        ids = self._ids(said[hidden:])
        if len(ids) > most:
            while len(ids) > context // 2 and hidden + 1 < len(said):
                hidden += 2  # a message and its answer
                ids = self._ids(said[hidden:])
        if len(ids) > most:
            raise DataError(
                f"that takes {len(ids)} tokens with all that belongs to it, and {most} of the "
                f"model's context of {context} are there for it: shorten it"
            )
        return ids, hidden

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        return encode(self.system + said, self.template, self.tokenizer)
