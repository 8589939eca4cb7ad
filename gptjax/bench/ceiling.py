"""Measured rates of matrix products and memory on this device, and the time bounds they imply."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.models.params import flops_per_token, num_params, num_untied_params
from gptjax.parallel.devices import Device, device_of
from gptjax.plan.kernels import REACHED
from gptjax.train.metrics import peak_flops
from gptjax.xla.products import contract

ROUNDS = 7
STREAM_BYTES = 512_000_000  # beyond any cache
ADAMW_PASSES = 7  # over float32 arrays like the parameters: AdamW reads four and writes three


class Ceiling(NamedTuple):
    """Measured rates of this device."""

    flops: float
    """FLOP/s of a block's largest matrix product, in the compute dtype."""
    bandwidth: float
    """Bytes a second, reading and writing an array in place."""
    reading: float
    """Bytes a second, only reading an array."""


def measure(cfg: ModelConfig, tokens: int) -> Ceiling:
    """Time the product of (tokens, C) and (C, 4 C) in the compute dtype, and passes over
    `STREAM_BYTES` of memory.
    """
    C = cfg.channels
    x, w = jnp.ones((tokens, C), cfg.compute_dtype), jnp.ones((C, 4 * C), cfg.compute_dtype)
    repeats = max(1, round(2e10 / (8 * tokens * C * C)))

    @jax.jit
    def products(x: Any, w: Any) -> Any:
        return jax.lax.fori_loop(
            0,
            repeats,
            lambda _, x: contract("tc,cf->tf", x, w)[:, :C] * jnp.asarray(1e-3, x.dtype),
            x,
        )

    stream = jnp.ones(STREAM_BYTES // 4, jnp.float32)
    scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    flops = (
        repeats
        * 8
        * tokens
        * C
        * C
        / _median_seconds(lambda: jax.block_until_ready(products(x, w)))
    )

    def once() -> None:
        nonlocal stream
        stream = jax.block_until_ready(scale(stream))

    written = 2 * STREAM_BYTES / _median_seconds(once)
    return Ceiling(flops, written, STREAM_BYTES / _median_seconds(reader(stream)))


def device_rates(cfg: ModelConfig, tokens: int) -> Device:
    """The data sheet's rates of this device or, if they are unknown, those that `measure` finds."""
    if known := device_of(jax.devices()[0].device_kind):
        return known
    best = measure(cfg, tokens)
    return Device(best.flops / REACHED, math.inf, best.bandwidth, math.inf, 1)


def reader(stream: Any) -> Callable[[], Any]:
    """Reads an array of whole thousands of numbers once when called."""
    rows = jax.jit(lambda x: x.reshape(-1, 1000).sum(1))
    return lambda: jax.block_until_ready(rows(stream))


def read_rate() -> Callable[[], float]:
    """Measures, when called, the bytes a second at which `STREAM_BYTES` are read."""
    read = reader(jnp.ones(STREAM_BYTES // 4, jnp.float32))
    return lambda: STREAM_BYTES / _median_seconds(read)


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def step_floor(cfg: ModelConfig, tokens: int, seq_len: int, ceiling: Ceiling) -> float:
    """Lower bound in seconds for a training step: its matrix products plus one AdamW pass over
    memory.
    """
    return (
        tokens * flops_per_token(cfg, seq_len) / ceiling.flops
        + ADAMW_PASSES * 4 * num_params(cfg) / ceiling.bandwidth
    )


def peak_seconds(cfg: ModelConfig, tokens: int, seq_len: int) -> float | None:
    """Seconds of a training step's products at the data sheet's rate of this device, for model
    FLOPs utilisation; None if that is unknown.
    """
    peak = peak_flops(jax.devices()[0].device_kind, cfg.dtype)
    return tokens * flops_per_token(cfg, seq_len) / peak if peak else None


def decode_floor(cfg: ModelConfig, ceiling: Ceiling) -> float:
    """Lower bound in seconds for decoding a token: one read of every weight. Of an untied embedding
    it reads a row.
    """
    return (num_params(cfg) - num_untied_params(cfg)) * cfg.compute_dtype.itemsize / ceiling.reading
