"""Train GPT-2: ``python -m gptjax.train --config configs/124m.yaml``.

Every option of the config file is also an option here, as in ``--optim.learning_rate 1e-3``; the command line wins.
A run is kept in ``runs/NAME``: ``config.yaml`` as resolved, ``metrics.jsonl``, ``tokenizer.json``, ``checkpoints/``.
Ctrl-C or SIGTERM saves a checkpoint and ends; ``--resume auto`` goes on from the newest one as if never interrupted.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
import yaml

from gptjax import cli, datasets, steps
from gptjax.checkpoint import CheckpointWriter, restore_newest
from gptjax.config import Config
from gptjax.data import BatchShape, TrainingBatches, validation_batches
from gptjax.datasets import TOKENIZER_FILE, Corpus
from gptjax.errors import CheckpointError, DataError
from gptjax.generate import sample
from gptjax.metrics import Display, Meter, MetricsFile, human_bytes, peak_flops
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import flops_per_token, num_params
from gptjax.optim import Optimizer, StepMetrics, make_optimizer
from gptjax.steps import CompiledStep, TrainState

PROG = "python -m gptjax.train"
DIVERGED = 1  # exit status
RESUME_KEYS = ("data.batch_size", "data.seq_len", "data.order", "optim.accumulate", "seed")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0 when done or stopped by a signal, 1 when diverged; bad input exits with 2."""
    with cli.reported_errors(PROG):
        cfg, file = cli.parse(Config, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
        if cfg.model.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        return train(dataclasses.replace(cfg, name=cfg.name or (file.stem if file else "run")))


class Run(NamedTuple):
    """What a run is made of, all of it checked, before anything is computed."""

    cfg: Config
    model: GPT2Config
    shape: BatchShape
    corpus: Corpus
    batches: TrainingBatches
    val: list[Batch]
    optimizer: Optimizer
    key: Any
    folder: Path
    display: Display


def train(cfg: Config) -> int:
    """Train as configured. Returns the exit status.

    Raises:
        GptjaxError: anything about the configuration, corpus, checkpoint or disk that a person can mend.
    """
    run = set_up(cfg)
    run.display.print(_header(run))
    began = time.perf_counter()
    init = jax.jit(lambda key: steps.init_state(key, run.model, run.optimizer))
    batch = jax.ShapeDtypeStruct((run.shape.accumulate, run.shape.batch_size, run.shape.seq_len), jnp.int32)
    compiled = steps.compile_step(
        run.model, run.optimizer, cfg.train.backward, cfg.train.steps, jax.eval_shape(init, run.key), Batch(batch, batch), run.key
    )
    run.display.print(_memory_line(compiled, time.perf_counter() - began))
    state, done = _start(run, init)
    if done >= cfg.train.steps:
        run.display.print(f"{run.folder} already has {done} steps: raise train.steps above {cfg.train.steps} to go on")
        return 0
    return fit(run, compiled, state, done)


def set_up(cfg: Config) -> Run:
    """Decide every ``auto``, open the corpus and choose the run's folder."""
    model = cfg.model.resolve(platform_name(), cfg.data.seq_len)
    corpus = datasets.find_corpus(cfg.data.dataset, cfg.data.root)
    if corpus.tokenizer and corpus.tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer of {corpus.folder} has {corpus.tokenizer.vocab_size} ids, "
            f"but model.vocab_size is {model.vocab_size}: raise it to at least that"
        )
    shape = BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len)
    return Run(
        cfg=cfg,
        model=model,
        shape=shape,
        corpus=corpus,
        batches=TrainingBatches(corpus.train, shape, cfg.data.order, cfg.seed, model.vocab_size),
        val=validation_batches(corpus.val, cfg.train.eval_tokens, shape.batch_size, shape.seq_len, model.vocab_size),
        optimizer=make_optimizer(cfg.optim, cfg.train.steps),
        key=jax.random.key(cfg.seed),
        folder=run_folder(Path(cfg.runs), cfg.name or "run", cfg.resume),
        display=Display(cfg.train.steps),
    )


def platform_name() -> str:
    """The platform that JAX computes on: cpu, cuda, rocm or tpu."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return backend.platform
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"


def run_folder(runs: Path, name: str, resume: str | None) -> Path:
    """The folder of a run: the one to resume, or a new one, ``NAME``, then ``NAME-2``, ``NAME-3``...

    Raises:
        CheckpointError: a folder to resume is named but does not exist.
    """
    if resume and resume != "auto":
        if not (Path(resume) / "checkpoints").is_dir():
            raise CheckpointError(f"--resume {resume} is not the folder of a run: it has no checkpoints/ in it")
        return Path(resume)
    number, newest = 1, None
    while (folder := runs / (name if number == 1 else f"{name}-{number}")).exists():
        number, newest = number + 1, folder
    return newest if resume and newest else folder


def _start(run: Run, init: Any) -> tuple[TrainState, int]:
    """The state to go on from and the steps it has behind it; the batches are moved there too."""
    if run.cfg.resume:
        restored = restore_newest(run.folder / "checkpoints", run.model, run.optimizer)
        if restored:
            now = _identity(run)
            for key, value in restored.meta["identity"].items():
                if now[key] != value:
                    raise CheckpointError(f"{run.folder} was trained with {key} {value}, not {now[key]}: give it that value to resume")
            run.batches.seek(restored.meta["position"])
            run.display.print(f"resumed from {run.folder} after step {restored.step}")
            return restored.state, restored.step
    return jax.block_until_ready(init(run.key)), 0


def _identity(run: Run) -> dict[str, Any]:
    """What must stay the same for a resumed run to see the batches that it would have seen."""
    settings = dataclasses.asdict(run.cfg)
    sections = ((key, *key.rpartition(".")[::2]) for key in RESUME_KEYS)
    return {key: settings[s][k] if s else settings[k] for key, s, k in sections} | {"corpus": run.corpus.sha256}


class Diverged(Exception):
    """Too many steps in a row were not finite."""


def fit(run: Run, compiled: CompiledStep, state: TrainState, done: int) -> int:
    """The loop, from ``done`` steps on. Returns the exit status.

    A step's numbers are fetched after the next step was dispatched, so that the device never waits for the host.
    """
    cfg, display = run.cfg.train, run.display
    _prepare_folder(run)
    metrics_file = MetricsFile(run.folder / "metrics.jsonl", done)
    writer = CheckpointWriter(run.folder / "checkpoints", cfg.keep_checkpoints)
    eval_loss = steps.make_eval_loss(run.model)
    flops = flops_per_token(run.model, run.shape.seq_len) * run.shape.tokens
    meter = Meter(run.shape.tokens, flops, peak_flops(jax.devices()[0].device_kind, run.model.dtype))

    def report(record: dict[str, Any]) -> None:
        metrics_file.write(record)
        display.step(record, line=record["step"] % cfg.log_every == 0 or record["step"] == cfg.steps or "val_loss" in record)
        writer.check()
        if meter.nonfinite >= cfg.max_nonfinite:
            raise Diverged

    pending: tuple[int, StepMetrics] | None = None
    saved = done
    display.start(done)
    try:
        with stop_signals() as stop:
            for step in range(done + 1, cfg.steps + 1):
                state, metrics = steps.run_step(compiled, state, next(run.batches), run.key, step)
                if pending:
                    report(meter.record(*pending))
                pending = step, metrics
                final = step == cfg.steps
                evaluate, show, save = (
                    every > 0 and step % every == 0 for every in (cfg.eval_every, cfg.sample_every, cfg.checkpoint_every)
                )
                if not (evaluate or show or save or final or stop):
                    continue
                record, pending = meter.record(*pending), None
                if (evaluate or final and cfg.eval_every) and not stop:
                    record["val_loss"] = steps.evaluate(eval_loss, state.params, run.val)
                report(record)
                if (show or final) and cfg.sample_tokens and not stop:
                    display.print(f"--- sample after step {step} ---\n{_sample(run, state, step)}\n---")
                if save or final or stop:
                    meta = {"identity": _identity(run), "position": run.batches.position()}
                    writer.save(step, state, run.model, meta)
                    saved = step
                if stop:
                    break
                meter.restart()
            writer.close()
    except Diverged:
        writer.close()
        display.stop()
        last = f"the last good checkpoint is after step {saved}" if saved else "there is no checkpoint yet"
        message = f"{meter.nonfinite} steps in a row were not finite: stopped; {last}. Lower optim.learning_rate, or raise optim.warmup_steps"
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return DIVERGED
    finally:
        display.stop()
        metrics_file.close()
    if saved < cfg.steps:
        display.print(f"stopped by {stop[0]} after step {saved}; go on with --resume auto")
    display.print(f"saved in {run.folder}")
    return 0


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that is empty until Ctrl-C or SIGTERM arrives, then holds the signal's name; a second Ctrl-C interrupts at once."""
    received: list[str] = []

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _prepare_folder(run: Run) -> None:
    """Make the run's folder, with the configuration as resolved and the tokenizer in it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    resolved = dataclasses.asdict(dataclasses.replace(run.cfg, model=run.model, resume=None))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    if run.corpus.tokenizer:
        run.corpus.tokenizer.save(run.folder / TOKENIZER_FILE)


def _sample(run: Run, state: TrainState, step: int) -> str:
    """The configured prompt and what the model makes of it; ids where no tokenizer is known."""
    cfg, tokenizer = run.cfg.train, run.corpus.tokenizer
    prompt = tokenizer.encode(cfg.sample_prompt) or [tokenizer.end_of_text] if tokenizer else [0]
    room = run.model.max_seq_len - cfg.sample_tokens
    if room < 1:
        prompt, count = prompt[-1:], run.model.max_seq_len - 1
    else:
        prompt, count = prompt[-room:], cfg.sample_tokens
    ids = sample(
        state.params,
        jnp.array([prompt], jnp.int32),
        jax.random.fold_in(run.key, step),
        cfg=run.model,
        new_tokens=count,
        temperature=cfg.sample_temperature,
        top_k=cfg.sample_top_k,
        allowed=tokenizer.vocab_size if tokenizer else None,
    )[0].tolist()
    return tokenizer.decode(prompt + ids) if tokenizer else " ".join(map(str, ids))


def _header(run: Run) -> str:
    """What will be trained, on what."""
    model, data, device = run.model, run.cfg.data, jax.devices()[0]
    counts = [sum(shard.tokens.size for shard in shards) for shards in (run.corpus.train, run.corpus.val)]
    tokenizer = f"{run.corpus.tokenizer.vocab_size} ids" if run.corpus.tokenizer else "unknown: samples show ids"
    lines = {
        "device": f"{platform_name()} ({device.device_kind}), jax {jax.__version__}",
        "model": f"{num_params(model):,} parameters: {model.num_layers} layers, {model.num_heads} heads, {model.channels} channels, "
        f"vocabulary {model.vocab_size}",
        "compute": f"{model.dtype}, attention {model.attention}, layers {model.layers}, recompute {model.recompute}, "
        f"backward {run.cfg.train.backward}",
        "corpus": f"{run.corpus.folder}: {counts[0]:,} training and {counts[1]:,} validation tokens, sha256 {run.corpus.sha256[:12]}",
        "tokenizer": tokenizer,
        "step": f"{run.shape.tokens:,} tokens ({run.shape.accumulate} x {data.batch_size} x {data.seq_len}, {data.order}), "
        f"{flops_per_token(model, data.seq_len) * run.shape.tokens / 1e9:,.1f} GFLOP",
        "run": f"{run.folder}, steps up to {run.cfg.train.steps}, seed {run.cfg.seed}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _memory_line(compiled: CompiledStep, seconds: float) -> str:
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in compiled.memory.items())
    return f"{'memory':<10} {human_bytes(sum(compiled.memory.values()))} predicted: {parts} (compiled in {seconds:.1f} s)"


if __name__ == "__main__":
    sys.exit(main())
