import functools
import itertools

import jax
import numpy as np
import pytest

pytest.importorskip("jinja2")

from gptjax.chat.conversation import Conversation
from gptjax.config import Sampler
from gptjax.errors import DataError
from gptjax.generate.engine import Rules, generate
from gptjax.generate.session import Session
from gptjax.tokenizers.chat_template import ChatTemplate, encode, endings, find
from tests.chatml import chatml_tokenizer, talk
from tests.models import tiny

TOKENIZER = chatml_tokenizer()
CFG = tiny.config(
    family="llama", num_heads=4, num_kv_heads=2, vocab_size=TOKENIZER.vocab_size, max_seq_len=192
)
CHATML, KEY = find("chatml"), jax.random.key(0)


@functools.cache
def params():
    return tiny.params(CFG)


def conversation(template=CHATML, system=None):
    ends = endings(template, TOKENIZER)
    rules = Rules(CFG, Sampler(0), TOKENIZER.vocab_size, ends.ids)
    return Conversation(Session(params(), rules), TOKENIZER, template, ends, system)


def answer(chat, text, new_tokens=6, chunk=32):
    return "".join(chat.answer(text, KEY, new_tokens, chunk))


def anew(chat, messages, new_tokens=6):
    """The answer of a model that reads all messages at once."""
    ids = encode(messages, chat.template, TOKENIZER)
    new = [x.tokens[0] for x in generate(params(), [ids], chat.session.rules, KEY, new_tokens)]
    said = [i for i in np.concatenate(new).tolist() if i not in chat.endings.ids]
    return TOKENIZER.decode(said)


def test_each_answer_is_that_of_reading_all_anew():
    chat, messages = conversation(system="S"), talk(system="S")
    for text in ("a", "b <|im_end|>", "c"):
        messages.append({"role": "user", "content": text})
        expected = anew(chat, messages)
        assert answer(chat, text) == expected
        messages.append({"role": "assistant", "content": expected})
        assert chat.messages == messages
    assert chat.hidden == 0


def test_a_reset_keeps_the_systems_message():
    chat = conversation(system="S")
    first = answer(chat, "a")
    answer(chat, "b")
    chat.reset()
    assert chat.messages == talk(system="S")
    assert answer(chat, "a") == first


def test_past_the_context_the_oldest_turns_go():
    """The system's message stays, and what is left takes at most half a context."""
    chat, hidden = conversation(system="SYS"), [0]
    for turn in range(6):
        before = list(chat.said)
        answer(chat, f"{turn}" * 20)
        hidden.append(chat.hidden)
        view = chat.system + [*before, chat.said[-2]][chat.hidden :]
        ids = encode(view, CHATML, TOKENIZER)
        assert chat.session.ids[: len(ids)] == ids
        most = CFG.max_seq_len - 6 if hidden[-1] == hidden[-2] else CFG.max_seq_len // 2
        assert len(ids) <= most
        assert chat.said[-1]["content"] == anew(chat, view)
    assert hidden[1] == 0
    assert hidden[-1] > hidden[1]
    assert all(n % 2 == 0 for n in hidden)
    assert len(chat.messages) == 13


def test_what_cannot_be_said_leaves_no_trace():
    chat = conversation()
    answer(chat, "a")
    messages = chat.messages
    with pytest.raises(DataError, match=r"takes \d+ tokens .* context of 192 .* shorten it"):
        answer(chat, "x" * 190)
    strict = ChatTemplate("{% if messages|length > 3 %}{{ raise_exception('no') }}{% endif %}x")
    with pytest.raises(DataError, match="refuses this conversation: no"):
        chat.template = strict
        answer(chat, "b") + answer(chat, "c")
    assert chat.messages[: len(messages)] == messages
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * (len(chat.said) // 2)


def test_an_answer_that_is_stopped_remains_as_far_as_it_came():
    chat = conversation()
    parts = list(itertools.islice(chat.answer("a", KEY, 20, 1), 3))
    assert chat.said[1]["content"] == "".join(parts)
    messages = [*chat.messages, {"role": "user", "content": "b"}]
    expected = anew(chat, messages)
    assert answer(chat, "b") == expected


def test_an_answer_ends_before_the_text_that_the_template_ends_answers_with():
    head = "{{ messages[0].content }}{% if messages|length > 1 %}{{ messages[1].content }}"
    free = answer(conversation(ChatTemplate(head + "{% endif %}")), "a", 12)
    stop = free[4]
    chat = conversation(ChatTemplate(head + stop + "{% endif %}"))
    assert chat.endings.texts == ((stop,) if stop.strip() else ())
    assert answer(chat, "a", 12) == (free[: free.index(stop)] if stop.strip() else free)


def test_control_ids_end_an_answer_and_are_not_shown():
    chat = conversation()
    free = [
        x.tokens[0]
        for x in generate(
            params(), [encode(talk("a"), CHATML, TOKENIZER)], chat.session.rules, KEY, 6
        )
    ]
    third = int(np.concatenate(free)[2])
    ends = chat.endings._replace(ids=(*chat.endings.ids, third))
    rules = chat.session.rules._replace(ends=ends.ids)
    ended = Conversation(Session(params(), rules), TOKENIZER, CHATML, ends)
    said = answer(ended, "a")
    assert answer(chat, "a").startswith(said)
    assert len(said.encode()) <= 2 * 3
