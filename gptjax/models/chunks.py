"""Cut the classifier's rows into chunks; on a mesh, cut each device's share of the rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import ModelConfig
from gptjax.ops import target_weights
from gptjax.parallel.sharding import num_shards, sum_over_fsdp

# Least rows in a chunk. With fewer, adding to the head's gradient (4 bytes read and written per
# element) takes longer than its product (2 FLOPs per element and row) at the 240 FLOPs per byte of
# an H100.
LEAST_ROWS = 2048


def num_chunks(cfg: ModelConfig, tokens: int) -> int:
    """Chunks of ``tokens`` rows on one device.

    auto makes a chunk's logits as large as the hidden state of all rows, as Liger Kernel does (Hsu
    et al. 2024, arXiv:2410.10989), but no smaller than `LEAST_ROWS` rows.
    """
    if cfg.loss_chunks != "auto":
        return cfg.loss_chunks
    return -(-tokens // max(tokens * cfg.channels // cfg.padded_vocab_size, LEAST_ROWS))


def row_chunks(
    h: Float[Array, "B T C"], targets: Any, mask: Any, cfg: ModelConfig, count: Any
) -> list[tuple[Array, ...]]:
    """(rows of h, targets, weights), flattened to (B T, ...) and cut into `num_chunks`."""
    weights = target_weights(targets, mask, count)
    rows = h.reshape(-1, h.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    n = _shares()
    size = -(-targets.size // (n * num_chunks(cfg, targets.size // n)))
    if n == 1:
        return [tuple(r[i : i + size] for r in rows) for i in range(0, targets.size, size)]
    shares = [_split_shares(r) for r in rows]
    return [
        tuple(_merge_shares(r[:, i : i + size]) for r in shares)
        for i in range(0, targets.size // n, size)
    ]


def join_chunks(chunks: Sequence[Array], like: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    """Concatenate the rows of `row_chunks` into the shape of ``like``."""
    if _shares() == 1:
        return jnp.concatenate(chunks).reshape(like.shape)
    return jnp.concatenate([_split_shares(c) for c in chunks], 1).reshape(like.shape)


def sum_of_shares(f: Callable[..., Array], *rows: Array) -> Array:
    """``f(*rows)``, a sum over rows, kept as one term for each device's share: (n, ...).

    Keeping the terms separate lets `total` communicate once for all chunks.
    """
    if _shares() == 1:
        return f(*rows)
    return jax.vmap(f)(*(_split_shares(r) for r in rows))


def total(terms: Array) -> Float[Array, "*N Vp C"]:
    """The sum of `sum_of_shares`'s terms over fsdp, in the classifier's param layout: on a mesh one
    for each shard over data.
    """
    return terms if _shares() == 1 else sum_over_fsdp(terms, "Vp", "C")


def _shares() -> int:
    return num_shards("data", "fsdp")


def _split_shares(rows: Array) -> Array:
    """(n N, ...) -> (n, N, ...), where n is the number of shares."""
    return rows.reshape(_shares(), -1, *rows.shape[1:])


def _merge_shares(shares: Array) -> Array:
    return shares.reshape(-1, *shares.shape[2:])
