"""A conversation: messages, what the model sees of them, and its answers."""

from collections.abc import Iterator
from typing import Any

from gptjax.errors import DataError
from gptjax.generate.engine import CHUNK
from gptjax.generate.session import Session
from gptjax.generate.stream import TextStream
from gptjax.tokenizers import Tokenizer
from gptjax.tokenizers.chat_template import ChatTemplate, Endings, encode


class Conversation:
    """Messages of a user and a model in turn.

    What no longer fits the model's context is kept, but the model does not see it: the oldest turns
    go, until the rest takes half a context, so that it is read anew seldom.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        endings: Endings,
        system: str | None = None,
    ) -> None:
        """Nothing is said yet.

        Args:
            session: the model, whose rules end a text at the ids of ``endings``.
            tokenizer: the model's.
            template: how the model was trained to see conversations.
            endings: see `gptjax.tokenizers.chat_template.endings`.
            system: a message before all others, which stays in view.

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
        """How many of them, the oldest, the model no longer sees."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, those that the model no longer sees among them."""
        return self.system + self.said

    def answer(self, text: str, key: Any, new_tokens: int, chunk: int = CHUNK) -> Iterator[str]:
        """Say something: the answer in parts, as they become certain.

        An answer that is left before it ends remains as far as it came.

        Args:
            text: what the user says.
            key: see `gptjax.generate.engine.generate`.
            new_tokens: how many, at most.
            chunk: draw at most so many between two parts.

        Raises:
            DataError: it does not fit the context even alone, the vocabulary lacks one of its
                characters, or the template refuses it; nothing has then been said.
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
