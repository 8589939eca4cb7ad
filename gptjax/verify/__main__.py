"""Check the hand-written backward: ``python -m gptjax.verify --config configs/124m.yaml``.

Takes the gradient that a training step of this configuration computes, over all its micro-batches
and on its mesh, and compares it tensor by tensor with JAX's gradient of the plain forward on one
device (autodiff), with differences of that forward (finite-difference), or with another program's
gradient (an llm.c debug state file). Then it compares loss and logits, Hessian-vector products, and
each op by itself. If something is wrong, it names the first op, going backward from the loss, whose
gradient differs from JAX's, or says that only the sharded or only the accumulated program differs.

The exit status is 0 if everything agrees, 1 if something is wrong, 2 for bad input.
"""

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cli
from gptjax.cli.options import last_value, parse
from gptjax.config import ModelConfig, VerifyConfig
from gptjax.convert.weights import dimension_options, load_weights, open_weights
from gptjax.datasets import vocabulary_without_corpus
from gptjax.errors import ConfigError
from gptjax.formats import llmc
from gptjax.models.batch import Batch
from gptjax.models.params import num_params, stack
from gptjax.ops import IGNORE_INDEX
from gptjax.parallel.mesh import describe_mesh, make_mesh
from gptjax.train.metrics import human_bytes
from gptjax.train.setup import set_up
from gptjax.verify import model, references
from gptjax.verify.explain import explain
from gptjax.verify.model import Subject
from gptjax.verify.ops import check_ops
from gptjax.verify.proof import Report
from gptjax.verify.saved_report import environment, write_report
from gptjax.xla.backend import platform_name, start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.verify"
WRONG = 1  # exit status


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status; bad input raises SystemExit(2)."""
    began = time.perf_counter()
    with cli.reported_errors(PROG):
        given = sys.argv[1:] if argv is None else argv
        checkpoint = last_value(given, "--checkpoint")
        if checkpoint and not last_value(given, "--config"):
            given = [*dimension_options(checkpoint), *given]
        cfg, _ = parse(VerifyConfig, PROG, __doc__ or "", given)
        cli.reuse_freed_memory()
        enable_compilation_cache()
        cli.quiet_libraries()
        check_writable(cfg)
        jax.config.update("jax_enable_x64", True)
        start_jax(cfg.model.dtype)
        subject, state, facts = make_subject(cfg)
        if cfg.explain:
            print(explain(subject))
            return 0
        print(
            "\n".join(f"{name:<10} {value}" for name, value in facts.items()),
            end="\n\n",
            flush=True,
        )
        name_stages()
        # By default, GPUs and TPUs round the inputs of float32 products
        with jax.default_matmul_precision("highest"):
            report = make_report(cfg, subject, state)
        seconds, peak = time.perf_counter() - began, peak_memory()
        report = dataclasses.replace(
            report, environment=facts | {"took": f"{seconds:.0f} s, {human_bytes(peak)} at most"}
        )
        print(report)
        print(f"took {report.environment['took']}")
        write_outputs(cfg, report, subject)
    return 0 if report else WRONG


def name_stages() -> None:
    """Print each stage of a check on stderr as it begins."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("checking   %(message)s"))
    references.LOG.handlers[:] = [handler]
    references.LOG.setLevel(logging.INFO)
    references.LOG.propagate = False


def write_outputs(cfg: VerifyConfig, report: Report, subject: Subject) -> None:
    """Write the requested files.

    Raises:
        OSError: a file cannot be written. If the gradient is wrong, that is only printed, so that
            the exit status reports the gradient.

    """
    try:
        write_report(report, cfg.json, cfg.html)
        for path in filter(None, (cfg.json, cfg.html)):
            print(f"wrote {path}")
        if cfg.export and report:
            export(Path(cfg.export), subject)
        elif cfg.export:
            print("nothing was exported, as the gradient is wrong")
    except OSError as error:
        if report:
            raise
        print(f"{PROG}: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)


def check_writable(cfg: VerifyConfig) -> None:
    """Check before the work that the results can be written.

    Raises:
        ConfigError: an output file is a folder, or its folder does not exist or is not writable.
        OSError: the export folder cannot be made.

    """
    for path in map(Path, filter(None, (cfg.json, cfg.html))):
        if path.is_dir():
            raise ConfigError(f"{path} cannot be written: it is a folder")
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written: permission denied")
    if cfg.json and cfg.html and Path(cfg.json).resolve() == Path(cfg.html).resolve():
        raise ConfigError(f"json and html are both {cfg.html}: name two files")
    if cfg.export and Path(cfg.export).exists() and not Path(cfg.export).is_dir():
        raise ConfigError(f"export {cfg.export} is a file, not a folder")
    if cfg.export:
        Path(cfg.export).mkdir(parents=True, exist_ok=True)


def make_subject(cfg: VerifyConfig) -> tuple[Subject, llmc.DebugState | None, dict[str, str]]:
    """The model, parameters and batch to check; the reference file's contents, if there is one; and
    a description.

    Raises:
        GptjaxError: a file does not exist, or the parts do not fit together.

    """
    settings, whose = known_vocabulary(cfg)
    cfg, settings = (
        dataclasses.replace(cfg, model=settings),
        dataclasses.replace(settings, dtype=cfg.dtype),
    )
    from_file = cfg.reference not in ("autodiff", "finite-difference")
    if from_file or cfg.export:
        settings = dataclasses.replace(settings, dropout=0.0, dropout_mlp=0.0)
    if from_file and not Path(cfg.reference).is_file():
        raise ConfigError(
            "reference must be autodiff, finite-difference or a file: there is no file "
            f"{cfg.reference}"
        )
    if from_file and cfg.checkpoint is None:
        raise ConfigError(
            f"the gradients in {cfg.reference} need the parameters that they were taken at: give "
            "their file as --checkpoint"
        )
    state = llmc.read_debug_state(cfg.reference, settings) if from_file else None
    seq_len = state.inputs.shape[1] if state else cfg.data.seq_len
    resolved = settings.resolve(platform_name(), seq_len)
    key = jax.random.key(cfg.seed)
    if cfg.checkpoint is not None:
        _, params = load_weights(cfg.checkpoint, resolved)
    else:
        params = jax.jit(lambda: model.noisy_params(key, resolved))()
    if state:
        batch, tokens = (
            Batch(jnp.asarray(state.inputs)[None], jnp.asarray(state.targets)[None]),
            "from the reference",
        )
    elif cfg.batch == "corpus":
        batch, tokens = (
            jax.tree.map(jnp.asarray, next(set_up(cfg).batches)),
            f"the first of {cfg.data.dataset}",
        )
    else:
        size = (
            1 if cfg.export else cfg.optim.accumulate,
            cfg.data.batch_size,
            cfg.data.seq_len + 1,
        )
        generator = np.random.default_rng(cfg.seed)
        ids = generator.integers(0, resolved.vocab_size, size, np.int32)
        left_out = generator.random(size) < (0 if cfg.export else 1 / 8)
        targets = np.where(left_out, IGNORE_INDEX, ids)[..., 1:]
        batch = Batch(jnp.asarray(ids[..., :-1]), jnp.asarray(targets))
        tokens = (
            f"random, seed {cfg.seed}, {np.count_nonzero(targets != IGNORE_INDEX)} of them are "
            "targets"
        )
    mesh = make_mesh(cfg.mesh, resolved.axis_sizes, batch.inputs.shape[1])
    subject = Subject(
        resolved, params, batch, key if resolved.dropout or resolved.dropout_mlp else None, mesh
    )
    return subject, state, describe(cfg, subject, tokens, whose)


def known_vocabulary(cfg: VerifyConfig) -> tuple[ModelConfig, str]:
    """The model with its vocabulary size, and where that comes from as text; "" if it is
    configured.

    Raises:
        GptjaxError: the checkpoint, the corpus or the tokenizer cannot be read.

    """
    if cfg.model.vocab_size:
        return cfg.model, ""
    if cfg.checkpoint is not None:
        size, whose = open_weights(cfg.checkpoint).cfg.vocab_size, "the checkpoint"
    elif cfg.batch == "corpus":
        size, whose = set_up(cfg).model.vocab_size, "the corpus"
    else:
        size, whose = vocabulary_without_corpus(cfg.data.dataset, cfg.data.tokenizer)
    return cfg.model.with_vocabulary(size), whose


def describe(cfg: VerifyConfig, subject: Subject, tokens: str, whose: str) -> dict[str, str]:
    """The facts about a check by name; ``whose`` is the origin of an unconfigured vocabulary."""
    resolved, (A, B, T) = subject.cfg, subject.batch.inputs.shape
    dropouts = f"dropout {resolved.dropout}"
    if resolved.dropout_mlp:
        dropouts += f", in the MLP {resolved.dropout_mlp}"
    vocabulary = f"vocabulary {resolved.vocab_size:,}" + (f" of {whose}" if whose else "")
    parts = {
        "model": [
            f"{num_params(resolved):,} parameters",
            f"{resolved.num_layers} layers",
            dropouts,
            vocabulary,
        ],
        "compute": [
            resolved.dtype,
            f"attention {resolved.attention}",
            f"layers {resolved.layers}",
            f"recompute {resolved.recompute}",
            f"loss_chunks {resolved.loss_chunks}",
            *([describe_mesh(subject.mesh)] if subject.mesh else []),
        ],
        "parameters": [cfg.checkpoint or f"initial with noise, seed {cfg.seed}"],
        "batch": [
            f"{B} x {T} tokens, {tokens}"
            if A == 1
            else f"{A} micro-batches of {B} x {T} tokens, {tokens}"
        ],
        "reference": [cfg.reference],
    }
    checked = dataclasses.replace(
        cfg, model=resolved, layers=False, explain=False, json=None, html=None, export=None
    )
    return {name: ", ".join(part) for name, part in parts.items()} | environment(checked)


def make_report(cfg: VerifyConfig, subject: Subject, state: llmc.DebugState | None) -> Report:
    """Run the configured comparison and the checks of the ops."""
    if state:
        report = references.against_file(subject, state)
    elif cfg.reference == "autodiff":
        report = references.against_autodiff(subject)
    else:
        report = references.against_differences(subject, cfg.layers)
    references.LOG.info("each op by itself")
    return dataclasses.replace(report, ops=tuple(check_ops(cfg.dtype)), layers=cfg.layers)


def export(folder: Path, subject: Subject) -> None:
    """Write ``gpt2_124M.bin`` and ``gpt2_124M_debug_state.bin``, the names that llm.c's test
    reads.
    """
    found = model.by_hand(subject)
    inputs, targets, logits = (
        np.asarray(x) for x in (subject.batch.inputs[0], subject.batch.targets[0], found.logits)
    )
    state = llmc.DebugState(inputs, targets, logits, float(found.loss), stack(found.params))
    llmc.write_model(folder / "gpt2_124M.bin", subject.params, subject.cfg)
    llmc.write_debug_state(folder / "gpt2_124M_debug_state.bin", state, subject.cfg)
    print(f"wrote {folder / 'gpt2_124M.bin'} and {folder / 'gpt2_124M_debug_state.bin'}")


def peak_memory() -> int:
    """Peak memory in bytes: an accelerator's own, or on CPU the process's."""
    stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", cli.peak_memory())


if __name__ == "__main__":
    sys.exit(main())
