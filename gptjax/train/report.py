"""What a run prints before its first step."""

import jax

from gptjax.models.params import flops_per_token, num_params
from gptjax.parallel.mesh import describe_mesh
from gptjax.train.metrics import human_bytes
from gptjax.train.setup import Run
from gptjax.train.step import CompiledStep
from gptjax.xla.backend import platform_name


def describe(run: Run) -> str:
    """The lines that describe the run: device, model, data and steps."""
    model, shape, corpus = run.model, run.shape, run.corpus
    train, val = (
        sum(shard.tokens.size for shard in shards) for shards in (corpus.train, corpus.val)
    )
    vocabulary = "unknown, so samples show ids: name it as --data.tokenizer"
    if corpus.tokenizer:
        vocabulary = f"{corpus.tokenizer.vocab_size} ids"
        if corpus.tokenizer.vocab_size < model.vocab_size:
            vocabulary += f", fewer than the model's {model.vocab_size}"
    gflop = flops_per_token(model, shape.seq_len) * shape.tokens / 1e9
    processes = (
        f"{jax.process_count()} processes; if one is lost, all end within "
        f"{run.cfg.distributed.timeout} s"
    )
    idle = jax.device_count() - (run.mesh.size if run.mesh else 1)
    lines = {
        "device": [
            f"{platform_name()} ({jax.devices()[0].device_kind})",
            f"jax {jax.__version__}",
            *([f"{idle} more devices idle: --mesh.data -1 uses all"] if idle else []),
        ],
        **({"mesh": [describe_mesh(run.mesh)]} if run.mesh else {}),
        **({"processes": [processes]} if jax.process_count() > 1 else {}),
        "model": [
            f"{num_params(model):,} parameters",
            f"{model.num_layers} layers",
            f"{model.num_heads} heads",
            f"{model.channels} channels",
            f"vocabulary {model.vocab_size}",
        ],
        "compute": [
            model.dtype,
            f"attention {model.attention}",
            f"layers {model.layers}",
            f"recompute {model.recompute}",
            f"backward {run.cfg.train.backward}",
        ],
        "corpus": [
            str(corpus.folder),
            f"{train:,} training and {val:,} validation tokens",
            f"sha256 {corpus.sha256[:16]}",
        ],
        "tokenizer": [vocabulary],
        "step": [
            f"{shape.tokens:,} tokens ({shape.accumulate} x {shape.batch_size} x {shape.seq_len})",
            run.cfg.data.order,
            f"{gflop:,.1f} GFLOP",
        ],
        "run": [str(run.folder), f"{run.cfg.train.steps} steps", f"seed {run.cfg.seed}"],
    }
    return "\n".join(f"{name:<10} {', '.join(parts)}" for name, parts in lines.items())


def describe_memory(compiled: CompiledStep, seconds: float) -> str:
    """The memory that a step needs, as the compiler reports it."""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in compiled.memory.items())
    total = human_bytes(sum(compiled.memory.values()))
    native = ", AdamW in C++" if compiled.native_code else ""
    return f"{'memory':<10} {total} predicted: {parts}; compiled in {seconds:.1f} s{native}"
