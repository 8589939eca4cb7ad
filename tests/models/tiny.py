"""A GPT-2 small enough to differentiate in milliseconds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import WEIGHTS, Params, param_shapes, unstack

CONFIG = GPT2Config(
    num_layers=2, num_heads=2, channels=8, vocab_size=11, max_seq_len=12, dtype="float64", attention="materialised"
)


def config(**changes: Any) -> GPT2Config:
    """`CONFIG` with changes."""
    return dataclasses.replace(CONFIG, **changes)


def params(cfg: GPT2Config, dtype: Any = jnp.float64) -> Params:
    """Noise on every parameter but the vocabulary's pad rows, gains around 1, so that no gradient vanishes by symmetry.

    NumPy's: `jax.random` compiles a program for every shape.
    """
    generator = np.random.default_rng(0)
    noisy: list[Any] = [
        ((weight.init == "ones") + 0.1 * generator.standard_normal(shape)).astype(dtype)
        for weight, shape in zip(WEIGHTS, param_shapes(cfg), strict=True)
    ]
    noisy[0][cfg.vocab_size :] = 0  # wte's pad rows
    tree = Params(*noisy)
    return jax.tree.map(jnp.asarray, tree if cfg.layers == "scan" else unstack(tree))


def batch(cfg: GPT2Config, B: int = 2, T: int = 7, seed: int = 0) -> Batch:
    """Random ids; with 11 of them, most rows hold duplicates."""
    ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (B, T + 1)).astype(np.int32)
    return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))


def unigram(cfg: GPT2Config, probabilities: Any) -> Params:
    """Parameters under which each id has its probability wherever it stands: the last LayerNorm gives a constant.

    An id that is left out has next to none.
    """
    logits = np.full(cfg.padded_vocab_size, -1e4, np.float32)
    logits[: len(probabilities)] = np.log(probabilities)
    tensors = Params(*(np.zeros(shape, np.float32) for shape in param_shapes(cfg)))
    tensors.wte[:, 1] = logits
    tensors.lnfb[1] = 1
    stacked = jax.tree.map(jnp.asarray, tensors)
    return stacked if cfg.layers == "scan" else unstack(stacked)
