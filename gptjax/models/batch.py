"""Batches of token ids, and their validation.

JAX clamps an index outside a table, so an invalid id would silently be read as another.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptjax.config import ModelConfig
from gptjax.ops import IGNORE_INDEX

NAMED = 3  # most invalid ids that an error lists
Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]


class Batch(NamedTuple):
    """Token ids and, at each position, the next id: JAX or NumPy arrays, (B, T) int32.

    A target of `IGNORE_INDEX` does not count. The optional ``mask``, (B, T) float, weights each
    target; 0 excludes it. The optional ``segments``, (B, T) int32, numbers the documents that are
    packed one after the other into a sequence: positions restart at 0 in each, and a token attends
    only to its own document.
    """

    inputs: Any
    targets: Any
    mask: Any = None
    segments: Any = None


def checked_ids(name: str, ids: Any, cfg: ModelConfig, ignored: bool = False) -> Int[Array, "B T"]:
    """Validate ids and return them as a JAX array, (B, T).

    The shape is always checked, even under `jax.jit`. The ids are checked only in a NumPy array,
    where reading them needs no transfer from the device.

    Args:
        name: the ids' name in errors.
        ids: a JAX or NumPy array.
        cfg: the model's dimensions.
        ignored: whether `IGNORE_INDEX` is allowed.

    Raises:
        ValueError: the ids are not (B, T) integers, T exceeds ``cfg.max_seq_len``, or an id is
            outside the vocabulary.

    """
    if len(ids.shape) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape (B, T), not {ids.dtype} of shape {ids.shape}"
        )
    if ids.shape[1] > cfg.max_seq_len:
        raise ValueError(
            f"{name} are {ids.shape[1]} tokens long, but the model reads at most "
            f"max_seq_len {cfg.max_seq_len}: shorten them"
        )
    if isinstance(ids, np.ndarray):
        outside = (ids < 0) | (ids >= cfg.vocab_size)
        if ignored:
            outside &= ids != IGNORE_INDEX
        places = np.argwhere(outside).tolist()
        if places:
            named = ", ".join(
                f"{ids[row, column]} at [{row}, {column}]" for row, column in places[:NAMED]
            )
            more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
            raise ValueError(
                f"{name} must be ids from 0 to {cfg.vocab_size - 1}, not {named}{more}"
            )
    return jnp.asarray(ids)


def checked_batch(batch: Batch, cfg: ModelConfig) -> Batch:
    """Validate a batch and return it as JAX arrays.

    Raises:
        ValueError: `checked_ids` rejects an array, or the shapes differ.

    """
    inputs, targets = (
        checked_ids("inputs", batch.inputs, cfg),
        checked_ids("targets", batch.targets, cfg, ignored=True),
    )
    others = {"targets": targets, "mask": batch.mask, "segments": batch.segments}
    for name, x in others.items():
        if x is not None and x.shape != inputs.shape:
            raise ValueError(f"{name} must have the inputs' shape {inputs.shape}, not {x.shape}")
    return batch._replace(inputs=inputs, targets=targets)
