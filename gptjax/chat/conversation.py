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

    If they outgrow the model's context, the oldest turns are hidden from the model, until the rest
    fills at most half the context: the model must read the rest anew, and so seldom has to.
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
            system: the system message, which comes first and which the model always sees.

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

        If the iteration is abandoned, the answer remains as far as it was generated.

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
        """(ids of the messages that the model sees, number of oldest messages that it does not)."""
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
                f"the message takes {len(ids)} tokens with its template, but only {most} of the "
                f"model's context of {context} are free for it: shorten it"
            )
        return ids, hidden

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        return encode(self.system + said, self.template, self.tokenizer)
