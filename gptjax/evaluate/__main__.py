"""Evaluate a model: ``python -m gptjax.evaluate --checkpoint runs/124m --dataset tinyshakespeare``.

On a corpus: loss, perplexity and bits per byte over the first ``--tokens`` of a split, in
consecutive windows of ``--seq_len``; each token is predicted from its window alone. On HellaSwag
(``--dataset hellaswag``, llm.c's ``hellaswag_val.bin`` or a ``.jsonl`` like the original's): acc
and acc_norm as llm.c computes them. Standard errors are over windows or questions. With ``--text
TEXT`` instead of a dataset: id, loss and text of each token, and last the mean of the losses.
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import cli, datasets
from gptjax.cli.options import parse
from gptjax.cli.progress import counting
from gptjax.config import Config, DataConfig, EvaluateConfig, ModelConfig, Storage
from gptjax.convert.weights import (
    Source,
    load_for_decoding,
    load_params,
    open_weights,
    with_named_tokenizer,
)
from gptjax.datasets import Corpus
from gptjax.datasets.batches import Sequences, in_order
from gptjax.errors import ConfigError, DataError, naming
from gptjax.evaluate import hellaswag
from gptjax.evaluate.corpus import score, score_corpus
from gptjax.evaluate.statistics import Estimate
from gptjax.evaluate.storage import compare
from gptjax.models.batch import Batch
from gptjax.models.params import num_params
from gptjax.tokenizers import Tokenizer, as_text, is_gpt2
from gptjax.tokenizers.chat_template import ChatTemplate
from gptjax.xla.backend import platform_name, start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.evaluate"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    began = time.perf_counter()
    with cli.reported_errors(PROG, "lower batch_size"):
        cfg, _ = parse(EvaluateConfig, PROG, __doc__ or "", argv)
        cli.reuse_freed_memory()
        enable_compilation_cache()
        cli.quiet_libraries()
        cli.replace_unprintable()
        source = open_weights(cfg.checkpoint)
        if cfg.text is not None and _names_a_file(cfg.text):
            raise ConfigError(
                f"text {cfg.text!r} is the name of a file: evaluate on it with --dataset {cfg.text}"
            )
        source = with_named_tokenizer(source, cfg.checkpoint, cfg.tokenizer)
        tokenizer = source.tokenizer
        how: dict[str, Any] = {
            "attention": "auto",
            "dropout": 0.0,
            "layers": "unroll",
            "recompute": "none",
        }
        model = dataclasses.replace(source.cfg, dtype=cfg.dtype, **how)
        start_jax(model.dtype)
        print_line(
            "device", f"{platform_name()} ({jax.devices()[0].device_kind}), jax {jax.__version__}"
        )
        of = "" if cfg.checkpoint in source.format else f"{cfg.checkpoint}, "
        print_line("model", f"{of}{source.format}, {num_params(model):,} parameters")
        if cfg.text is not None:
            figures = evaluate_text(cfg, source, model, cfg.text)
        elif file := hellaswag.find_questions(cfg.dataset, Path(cfg.root)):
            figures = evaluate_questions(cfg, source, model, tokenizer, file)
        else:
            figures = evaluate_corpus(cfg, source, model, tokenizer)
        seconds = time.perf_counter() - began
        print_line("took", f"{seconds:.1f} s")
        if cfg.json:
            settings = {
                "checkpoint": cfg.checkpoint,
                **({"text": cfg.text} if cfg.text is not None else {"dataset": cfg.dataset}),
                "dtype": model.resolve(platform_name(), 1).dtype,
                "weights": cfg.weights,
            }
            with naming(cfg.json):
                Path(cfg.json).write_text(
                    json.dumps(settings | figures | {"seconds": seconds}, indent=1) + "\n"
                )
            print_line("wrote", cfg.json)
        if cfg.text is not None:
            print_line("loss", f"{figures['loss']:.4f} nats a token")
    return 0


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or no name
        return False


def print_line(name: str, value: str) -> None:
    """Print a line of the report at once."""
    print(f"{name:<10} {value}", flush=True)


# --- A corpus ---


def evaluate_corpus(
    cfg: EvaluateConfig, source: Source, model: ModelConfig, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Score a corpus, print the figures and return them.

    Raises:
        GptjaxError: the corpus cannot be read, is too short, or was tokenized with a tokenizer
            other than the model's.

    """
    if cfg.examples is not None:
        raise ConfigError("examples applies to HellaSwag only: limit a corpus with tokens")
    seq_len = cfg.seq_len or model.max_seq_len
    model = model.resolve(
        platform_name(), seq_len, packed=datasets.holds_conversations(cfg.dataset)
    )
    template = ChatTemplate(source.chat_template) if source.chat_template else None
    corpus = open_corpus(cfg, tokenizer, source.note, template)
    corpus = datasets.fitted(common_tokenizer(corpus, tokenizer), model.vocab_size)
    windows = Sequences(
        corpus.val if cfg.split == "val" else corpus.train, seq_len, 1, model.vocab_size
    )
    if not len(windows):
        raise DataError(
            f"no {cfg.split} shard of {corpus.folder} holds the {seq_len + 1} tokens of one "
            "window: lower seq_len or use more text"
        )
    count = min(len(windows), -(-cfg.wanted // seq_len)) if cfg.wanted else len(windows)
    rows = min(cfg.batch_size, count)
    print_line("corpus", f"{corpus.folder}, its {cfg.split} part, sha256 {corpus.sha256[:16]}")
    print_line("tokenizer", describe_tokenizer(corpus, tokenizer, source.note))
    params = load_for_scoring(source, model, cfg.weights)
    with counting("scoring", count) as advance:
        found = score_corpus(
            params, in_order(windows, count, rows), model, corpus.tokenizer, advance
        )
    size = f", {found.bytes:,} bytes" if found.bytes is not None else ""
    print_line(
        "scored",
        f"{found.tokens:,} tokens{size}, {found.sequences:,} windows of {seq_len}, {model.dtype}",
    )
    print_line("loss", f"{plus_minus(found.loss)} nats a token")
    print_line("perplexity", plus_minus(found.perplexity, 3))
    if found.bits_per_byte:
        print_line("bits/byte", plus_minus(found.bits_per_byte))
    else:
        print_line("bits/byte", "unknown without the tokenizer that made the ids: give --tokenizer")
    against: dict[str, Any] = {}
    if cfg.weights != "float32":
        exact = load_params(source, model)
        with counting("comparing", count) as advance:
            batches = in_order(windows, count, rows)
            compared = compare(exact, params, batches, model, advance)
        print_line("float32", f"loss {plus_minus(compared.loss)}")
        print_line("divergence", f"{plus_minus(compared.divergence, 6)} nats a token from float32")
        print_line("agreement", f"{plus_minus(compared.agreement)} have float32's likeliest token")
        against = {
            **as_json("float32_loss", compared.loss),
            **as_json("divergence", compared.divergence),
            **as_json("agreement", compared.agreement),
        }
    counts = {
        "split": cfg.split,
        "sha256": corpus.sha256,
        "seq_len": seq_len,
        "tokens": found.tokens,
        "bytes": found.bytes,
    }
    return counts | {
        "windows": found.sequences,
        **as_json("loss", found.loss),
        **as_json("perplexity", found.perplexity),
        **as_json("bits_per_byte", found.bits_per_byte),
        **against,
    }


def open_corpus(
    cfg: EvaluateConfig, tokenizer: Tokenizer | None, note: str, template: ChatTemplate | None
) -> Corpus:
    """Open the corpus; text is tokenized with the model's tokenizer if it is known.

    The corpus that a run was trained on is opened as the run prepared it, so that it is not
    prepared twice. ``note`` is the reason that the checkpoint's tokenizer is missing.

    Raises:
        GptjaxError: see `gptjax.datasets.find_corpus` and `data_of_run`; or there is no tokenizer
            for the text.

    """
    trained = data_of_run(Path(cfg.checkpoint))
    if (
        trained
        and trained.dataset == cfg.dataset
        and not cfg.tokenizer
        and cfg.column in (None, trained.column)
    ):
        return datasets.find_corpus(
            cfg.dataset, cfg.root, trained.tokenizer, trained.column, trained.tokens
        )
    # If the corpus comes in parts, prepare no more than is scored.
    wanted = cfg.wanted if cfg.split == "train" else 1
    are_ids = datasets.holds_shards(Path(cfg.dataset))
    if note and not tokenizer and not are_ids:
        raise ConfigError(
            f"{cfg.checkpoint} has no tokenizer ({note}): name one, as in --tokenizer gpt2"
        )
    if tokenizer is None or are_ids:
        return datasets.find_corpus(cfg.dataset, cfg.root, None, cfg.column, wanted)
    which = "gpt2" if is_gpt2(tokenizer) else tokenizer
    return datasets.find_corpus(cfg.dataset, cfg.root, which, cfg.column, wanted, template)


def data_of_run(folder: Path) -> DataConfig | None:
    """The ``data`` section of a run's ``config.yaml``; None if this is not a run or has no such
    file.

    Raises:
        ConfigError: the file is not the configuration of a run.

    """
    file = folder / "config.yaml"
    if not (folder / "checkpoints").is_dir() or not os.path.lexists(file):
        return None
    try:
        return parse(Config, PROG, "", ["--config", str(file)])[0].data
    except ConfigError as error:
        raise ConfigError(
            f"{error}: correct {file}, or remove it to evaluate without it"
        ) from error


def common_tokenizer(corpus: Corpus, tokenizer: Tokenizer | None) -> Corpus:
    """The corpus with the model's tokenizer, if that is known; shards that do not name their
    tokenizer are assumed to be made with it.

    Raises:
        DataError: the shards were made with another tokenizer.

    """
    if tokenizer is None:
        return corpus
    known = corpus.tokenizer
    if corpus.tokenizer_is_kept and known and not known.same_as(tokenizer):
        raise DataError(
            f"{corpus.folder} was tokenized with {known.name} of {known.vocab_size} ids, but the "
            f"model's tokenizer is {tokenizer.name} of {tokenizer.vocab_size}: give the text "
            "itself, or shards made with that tokenizer"
        )
    return corpus._replace(tokenizer=tokenizer)


def describe_tokenizer(corpus: Corpus, of_model: Tokenizer | None, note: str) -> str:
    """The corpus's tokenizer and where it comes from; ``note`` is the reason that the checkpoint
    has none.
    """
    if not corpus.tokenizer:
        return "unknown" + f" ({note})" * bool(note)
    named = f"{corpus.tokenizer.name}, {corpus.tokenizer.vocab_size} ids"
    if corpus.tokenizer_is_kept:
        return named
    origin = "taken from the model" if of_model else "assumed"
    return f"{named}, {origin}, as the shards do not name theirs"


# --- HellaSwag ---


def evaluate_questions(
    cfg: EvaluateConfig, source: Source, model: ModelConfig, tokenizer: Tokenizer | None, file: Path
) -> dict[str, Any]:
    """Answer the questions, print the accuracies and return them.

    Raises:
        GptjaxError: the questions are damaged, or made with a tokenizer other than the model's.

    """
    if (cfg.tokens, cfg.seq_len, cfg.split, cfg.column) != (None, None, "val", None):
        raise ConfigError(
            "tokens, seq_len, split and column apply to a corpus only: limit HellaSwag with "
            "examples"
        )
    questions = hellaswag.load_questions(file, tokenizer)[: cfg.examples]
    rows = hellaswag.make_rows(questions, model.max_seq_len, model.vocab_size)
    model = model.resolve(platform_name(), rows.scored.shape[1])
    print_line(
        "questions", f"{len(questions):,} of {file}, at most {rows.scored.shape[1] + 1} tokens"
    )
    if rows.cut:
        print_line(
            "cut",
            f"{rows.cut:,} contexts at the start, to fit the model's {model.max_seq_len} positions",
        )
    params = load_for_scoring(source, model, cfg.weights)
    with counting("scoring", len(rows.ids)) as advance:
        found = hellaswag.score_questions(params, rows, model, cfg.batch_size, advance)
    print_line("acc", plus_minus(found.acc))
    print_line("acc_norm", plus_minus(found.acc_norm))
    figures = {"questions": found.questions, "cut": rows.cut}
    return figures | as_json("acc", found.acc) | as_json("acc_norm", found.acc_norm)


# --- A text ---


def load_for_scoring(source: Source, model: ModelConfig, how: Storage) -> Any:
    """The parameters, stored as ``how`` says."""
    return load_params(source, model) if how == "float32" else load_for_decoding(source, model, how)


def evaluate_text(
    cfg: EvaluateConfig, source: Source, model: ModelConfig, text: str
) -> dict[str, Any]:
    """Print the loss of each token of a text, given those before it, and return the figures.

    Raises:
        GptjaxError: the model's tokenizer is not known or cannot encode the text, or the text is
            too short or too long for the model.

    """
    tokenizer = source.tokenizer
    if tokenizer is None:
        reason = f" ({source.note})" if source.note else ""
        raise ConfigError(
            f"{cfg.checkpoint} has no tokenizer{reason}: name one, as in --tokenizer gpt2"
        )
    begin = tokenizer.begin_of_text
    if begin is None and cfg.bos:
        begin = tokenizer.end_of_text
        if begin is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} has no token that begins a text: leave bos out"
            )
    encoded = tokenizer.encode(text)
    ids = encoded if begin is None or cfg.bos is False else [begin, *encoded]
    if not 2 <= len(ids) <= model.max_seq_len + 1:
        raise DataError(
            f"the text has {len(ids)} tokens, but it takes 2 to {model.max_seq_len + 1}: give "
            "another, or a file of it as --dataset"
        )
    model = model.resolve(platform_name(), len(ids) - 1)
    row = np.asarray([ids], np.int32)
    batch = Batch(row[:, :-1], row[:, 1:])
    ((_, losses),) = score(load_for_scoring(source, model, cfg.weights), [batch], model)
    scored = losses[0].tolist()
    shown = ["first", *(f"{loss:.4f}" for loss in scored)]
    print(f"{'id':>6}, {'nats':>9}, token", flush=True)
    for token, loss in zip(ids, shown, strict=True):
        print(f"{token:>6}, {loss:>9}, {as_text(tokenizer.decode_bytes([token]))}", flush=True)
    return {"ids": ids, "losses": scored, "tokens": len(scored), "loss": float(np.mean(scored))}


def plus_minus(estimate: Estimate, digits: int = 4) -> str:
    """``1.2345 ± 0.0067``."""
    error = f" ± {estimate.error:.{digits}f}" if estimate.error is not None else ""
    return f"{estimate.value:.{digits}f}{error}"


def as_json(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Value and standard error under their names; None if unknown or not finite."""
    value, error = estimate or (None, None)
    found = {name: value, f"{name}_stderr": error}
    return {key: x if x is not None and math.isfinite(x) else None for key, x in found.items()}


if __name__ == "__main__":
    sys.exit(main())
