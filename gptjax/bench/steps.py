"""Contenders of this package: the training step in every configuration, and decoding."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from gptjax.bench.timing import Contender
from gptjax.config import Config, ModelConfig, Sampler, Storage
from gptjax.errors import ConfigError
from gptjax.generate import sample
from gptjax.models.batch import Batch
from gptjax.models.decode import reads_stacks, store_for_decoding
from gptjax.models.params import init_params
from gptjax.ops import ATTENTION_IMPLEMENTATIONS
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.xla.backend import platform_name

PROMPT_TOKENS, NEW_TOKENS = 16, 256
STORAGES: tuple[Storage, ...] = ("as_stored", "bfloat16", "q8_0", "q4_0", "q4_1")
GREEDY, FILTERED = Sampler(temperature=0), Sampler(0.8, top_k=50, top_p=0.95)


def random_batch(cfg: Config) -> Batch:
    """A batch of (A, B, T) random ids, on the host."""
    shape = cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len + 1
    ids = np.random.default_rng(cfg.seed).integers(0, cfg.model.vocab_size, shape, np.int32)
    return Batch(ids[..., :-1], ids[..., 1:])


def variants(model: ModelConfig, backward: Any) -> list[tuple[str, ModelConfig, Any]]:
    """(name, configuration, backward): first as configured, then with each choice changed."""
    other = "autodiff" if backward == "manual" else "manual"
    layers = "scan" if model.layers == "unroll" else "unroll"
    found = [(f"{backward}, {model.layers}", model, backward)]
    others: list[tuple[str, dict[str, Any], Any]] = [
        (f"{backward}, {layers}", {"layers": layers}, backward),
        (f"{other}, {model.layers}", {}, other),
        (f"{other}, {layers}", {"layers": layers}, other),
        *(
            (f"recompute {r}", {"recompute": r}, backward)
            for r in ("none", "gelu", "block")
            if r != model.recompute
        ),
        *(
            (f"attention {a}", {"attention": a}, backward)
            for a in ATTENTION_IMPLEMENTATIONS
            if a != model.attention
        ),
    ]
    for name, changed, way in others:
        found.append((name, dataclasses.replace(model, **changed), way))
    return found


def step_contenders(cfg: Config, compare: bool) -> Iterator[Contender]:
    """The configured training step, and with ``compare`` all its `variants`; variants with the same
    layout share a state.
    """
    platform, seq_len = platform_name(), cfg.data.seq_len
    batch = jax.device_put(random_batch(cfg))
    key = jax.random.key(cfg.seed)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, cfg.model)
    states: dict[str, steps.TrainState] = {}
    buffers: dict[str, Any] = {}
    known = variants(cfg.model.resolve(platform, seq_len), cfg.train.backward)
    for name, choice, backward in known if compare else known[:1]:
        try:
            model = choice.resolve(platform, seq_len)
        except ConfigError:
            continue  # attention kernel unavailable for this platform or shape
        if model.layers not in states:
            states[model.layers] = jax.block_until_ready(steps.make_state(key, model, optimizer))
            buffers[model.layers] = steps.gradient_buffer(states[model.layers].params)
        began = time.perf_counter()
        compiled = steps.compile_step(model, optimizer, backward, states[model.layers], batch, key)
        facts = {
            "compile_s": time.perf_counter() - began,
            "temporary_bytes": compiled.memory["temporaries"],
            "total_bytes": sum(compiled.memory.values()),
        }

        def run(compiled: Any = compiled, layers: str = model.layers) -> None:
            states[layers], buffers[layers], metrics = steps.run_step(
                compiled, states[layers], buffers[layers], batch, key, 1
            )
            jax.block_until_ready((states[layers], metrics))

        yield Contender(name, run, facts, (compiled.gradient, *compiled.updates))


def decode_contenders(cfg: Config, storages: tuple[Storage, ...] = STORAGES) -> Iterator[Contender]:
    """Decoding of `NEW_TOKENS` after `PROMPT_TOKENS`: greedy, with top-k and top-p, and greedy with
    the weights stored in other ways; ``storages`` begins with ``as_stored``.

    Raises:
        ConfigError: the model has too few positions for the tokens.

    """
    model = cfg.model.resolve(platform_name(), min(cfg.data.seq_len, cfg.model.max_seq_len))
    if model.max_seq_len < PROMPT_TOKENS + NEW_TOKENS:
        raise ConfigError(
            f"decoding {NEW_TOKENS} tokens after {PROMPT_TOKENS} needs model.max_seq_len "
            f"{PROMPT_TOKENS + NEW_TOKENS}"
        )

    def stored(how: Storage) -> tuple[ModelConfig, Any]:
        laid_out = dataclasses.replace(
            model, layers="scan" if reads_stacks(how, model) else "unroll"
        )
        fresh = jax.jit(partial(init_params, cfg=laid_out))(jax.random.key(cfg.seed))
        return laid_out, store_for_decoding(fresh, laid_out, how)

    weights = {how: stored(how) for how in storages}
    prompts = random_prompt(cfg).tolist()
    drawn = f"top {FILTERED.top_k}, top p {FILTERED.top_p}"
    rows: list[tuple[str, Storage, Sampler]] = [
        ("greedy", "as_stored", GREEDY),
        (drawn, "as_stored", FILTERED),
        *((f"greedy, {how}", how, GREEDY) for how in storages[1:]),
    ]
    for name, how, sampler in rows:

        def run(weights: Any = weights[how], sampler: Sampler = sampler) -> None:
            laid_out, params = weights
            sample(
                params,
                prompts,
                jax.random.key(0),
                cfg=laid_out,
                new_tokens=NEW_TOKENS,
                sampler=sampler,
            )

        began = time.perf_counter()
        run()
        yield Contender(name, run, {"compile_s": time.perf_counter() - began})


def random_prompt(cfg: Config) -> np.ndarray:
    """(1, `PROMPT_TOKENS`) random ids."""
    return np.random.default_rng(cfg.seed).integers(
        0, cfg.model.vocab_size, (1, PROMPT_TOKENS), np.int32
    )
