"""A GPT-2 small enough to differentiate in milliseconds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, init_params, param_shapes, unstack

CONFIG = GPT2Config(
    num_layers=2, num_heads=2, channels=8, vocab_size=11, max_seq_len=12, dtype="float64", attention="materialised"
)


def config(**changes: Any) -> GPT2Config:
    """`CONFIG` with changes."""
    return dataclasses.replace(CONFIG, **changes)


def params(cfg: GPT2Config, dtype: Any = jnp.float64) -> Params:
    """Initial parameters with noise on every one but the vocabulary's pad rows, so that no gradient vanishes by symmetry."""
    leaves, tree = jax.tree.flatten(init_params(jax.random.key(0), dataclasses.replace(cfg, layers="scan"), dtype))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape, dtype) for x, k in zip(leaves, keys, strict=True)])
    noisy = noisy._replace(wte=noisy.wte.at[cfg.vocab_size :].set(0))
    return noisy if cfg.layers == "scan" else unstack(noisy)


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
