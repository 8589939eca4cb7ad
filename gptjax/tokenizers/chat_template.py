"""Chat templates: a conversation as the ids that a model was trained on.

A template is Jinja, as Hugging Face's are, and runs in a sandbox. The control tokens that it writes
become control ids; the same text in a message remains text.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.files import read_text
from gptjax.tokenizers.interface import Tokenizer

LARGEST_FILE = 1 << 20  # bytes
PRIVATE = 0xF0000  # first of the 65,534 characters of a plane that Unicode gives no meaning

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """\
{% set start = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set start.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' %}
{% elif message.role == 'user' %}
{{ bos_token }}{{ '[INST] ' + (start.system + message.content).strip() + ' [/INST]' }}
{%- set start.system = '' %}
{% else %}
{{ ' ' + message.content.strip() + ' ' }}{{ eos_token }}
{%- endif %}
{% endfor %}
"""
BUILT_IN = {"chatml": CHATML, "llama2": LLAMA2}

Message = Mapping[str, str]
"""``role``, which is ``system``, ``user`` or ``assistant``, and ``content``."""


class ChatTemplate(NamedTuple):
    """A conversation's form, in Jinja."""

    source: str
    name: str = "the model's chat template"
    """For errors."""


class Endings(NamedTuple):
    """What ends an answer."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def find(which: str) -> ChatTemplate:
    """The template that ``chatml``, ``llama2`` or a file's name stands for.

    Raises:
        ConfigError: there is no such file, or it is no UTF-8 text.

    """
    if which in BUILT_IN:
        return ChatTemplate(BUILT_IN[which], f"the template {which}")
    if not Path(which).exists():
        raise ConfigError(
            f"there is no template {which}: {', '.join(BUILT_IN)} or a file in Jinja is expected"
        )
    try:
        return ChatTemplate(read_text(which, LARGEST_FILE), f"the template {which}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the template {which} cannot be read: {error}") from error


def encode(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation, up to where the model's answer begins.

    Raises:
        DataError: the template refuses the conversation, or the vocabulary lacks a character.
        FormatError: it is no valid template.
        ConfigError: jinja2 is not installed.

    """
    return _encoded(_rendered(messages, template, tokenizer, True), tokenizer)


def render(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> list[tuple[list[int], bool]]:
    """A whole conversation in parts, for training: (ids, whether the assistant said them).

    An answer extends to the control token that ends it.

    Raises:
        DataError: see `encode`; or the template changes earlier messages as later ones arrive.
        FormatError: see `encode`.
        ConfigError: see `encode`.

    """
    whole = _rendered(messages, template, tokenizer, False)
    ids, bounds = _encoded(whole, tokenizer), [0]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:i], template, tokenizer, True)
        after = _rendered(messages[: i + 1], template, tokenizer, False)
        end = _last_special(after, len(before), tokenizer)
        if not whole.startswith(before) or not whole.startswith(after[:end]):
            raise DataError(
                f"{template.name} renders message {i + 1} of {len(messages)} otherwise once more "
                "follow, so that its tokens cannot be told apart: end the conversation there, or "
                "name another template"
            )
        bounds += [
            max(bounds[-1], _common(ids, _encoded(part, tokenizer)))
            for part in (before, after[:end])
        ]
    spans = enumerate(itertools.pairwise([*bounds, len(ids)]))
    parts = [(ids[start:end], n % 2 == 1) for n, (start, end) in spans]
    return [part for part in parts if part[0]]


def endings(template: ChatTemplate, tokenizer: Tokenizer) -> Endings:
    """What ends an answer: begin- and end-of-text, the template's control tokens, and if it ends
    an answer with none, the text that it writes there.

    Raises:
        FormatError, DataError, ConfigError: see `encode`; a template that fails is found here.

    """
    probe = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "\ue000"}]
    text = _rendered(probe, template, tokenizer, False)
    after = text.rpartition("\ue000")[2]
    specials = _specials(tokenizer)
    ids = {specials[found] for found in re.findall(_any_of(specials), text)}
    texts = () if re.search(_any_of(specials), after) or not after.strip() else (after.strip(),)
    return Endings(tuple(sorted(ids.union(tokenizer.ends))), texts)


# --- Rendered text: control tokens as they are, those in messages with stand-ins ---


def _rendered(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, answer: bool
) -> str:
    """The template's text. Where a message holds a control token's text, a character of a private
    plane stands for its first character: see `_plain`.
    """
    specials = _specials(tokenizer)
    stand_ins = _stand_ins(specials)
    # Also an end of a message that the template's text could complete
    starts = re.compile(rf"(?={_any_of(specials)}|{_beginning_of(specials)})(.)", re.DOTALL)

    def shielded(content: str) -> str:
        if any(ord(c) >= PRIVATE for c in content):
            content = re.sub("[\U000f0000-\U000fffff]", "\N{REPLACEMENT CHARACTER}", content)
        return starts.sub(lambda found: stand_ins[found[1]], content) if specials else content

    conversation = [
        {key: value if key == "role" else shielded(value) for key, value in message.items()}
        for message in messages
    ]
    named = {
        "bos_token": _text_of(tokenizer.begin_of_text, specials),
        "eos_token": _text_of(tokenizer.end_of_text, specials),
    }
    return _run(template, conversation, answer, {k: v for k, v in named.items() if v})


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of rendered text."""
    specials = _specials(tokenizer)
    ids: list[int] = []
    for part in re.split(f"({_any_of(specials)})", text):
        if part in specials:
            ids.append(specials[part])
        elif part:
            begins = not ids or ids[-1] == tokenizer.begin_of_text
            encode = tokenizer.encode if begins else tokenizer.encode_more
            ids += encode(_plain(part, specials))
    return ids


def _plain(text: str, specials: Mapping[str, int]) -> str:
    """Rendered text without stand-ins."""
    return text.translate({ord(b): a for a, b in _stand_ins(specials).items()})


def _stand_ins(specials: Mapping[str, int]) -> dict[str, str]:
    firsts = sorted({text[0] for text in specials})
    return {first: chr(PRIVATE + i) for i, first in enumerate(firsts)}


def _any_of(specials: Mapping[str, int]) -> str:
    """A pattern of the control tokens, the longest first; it never matches if there are none."""
    return "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"


def _beginning_of(specials: Mapping[str, int]) -> str:
    """A pattern of a proper beginning of a control token at the end of a text."""
    beginnings = {text[:n] for text in specials for n in range(1, len(text))}
    return f"(?:{_any_of(dict.fromkeys(beginnings, 0))})" + r"\s*\Z"


@functools.lru_cache
def _specials(tokenizer: Tokenizer) -> dict[str, int]:
    """Its control tokens, with begin- and end-of-text, by their text."""
    found = {text: i for text, i in tokenizer.special_tokens.items() if text}
    for i, usual in ((tokenizer.begin_of_text, "<s>"), (tokenizer.end_of_text, "</s>")):
        if i is not None and i not in found.values():
            found[tokenizer.decode([i]) or usual] = i
    return found


def _text_of(token: int | None, specials: Mapping[str, int]) -> str | None:
    return next((text for text, i in specials.items() if i == token), None)


def _last_special(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Where the last control token of text[start:] ends; the end of the text if there is none."""
    found = list(re.finditer(_any_of(_specials(tokenizer)), text[start:]))
    return start + found[-1].end() if found else len(text)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# --- Jinja ---


class _RefusalError(Exception):
    """What a template's raise_exception raises."""


def _run(
    template: ChatTemplate,
    messages: list[dict[str, str]],
    answer: bool,
    named: dict[str, str],
) -> str:
    compiled = _compiled(template)
    import jinja2

    try:
        text: str = compiled.render(messages=messages, add_generation_prompt=answer, **named)
        return text
    except _RefusalError as error:
        raise DataError(f"{template.name} refuses this conversation: {error}") from error
    except jinja2.exceptions.SecurityError as error:
        raise FormatError(f"{template.name} does what no template may: {error}") from error
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a template can raise whatever Python can
        reason = str(error) or type(error).__name__
        raise FormatError(f"{template.name} fails on this conversation: {reason}") from error


@functools.lru_cache
def _compiled(template: ChatTemplate) -> Any:
    """The template, compiled in the environment that ``transformers`` gives it."""
    environment = _environment()
    import jinja2

    try:
        return environment.from_string(template.source)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(
            f"{template.name} is no Jinja template: {error.message} in line {error.lineno}"
        ) from error


def _environment() -> Any:
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError(
            "chat templates need the package jinja2: pip install 'gptjax[llama]'"
        ) from error

    class Generation(Extension):
        """``{% generation %}``, with which templates mark what the assistant says: nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    def refuse(message: str) -> NoReturn:
        raise _RefusalError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found
