"""A model small enough to differentiate in milliseconds: GPT-2, or any family by its weight
table.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.models.batch import Batch
from gptjax.models.params import is_weight, param_shapes, unstack, weight_table

SETTINGS: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "channels": 8,
    "vocab_size": 11,
    "max_seq_len": 12,
    "dtype": "float64",
    "attention": "materialised",
}
CONFIG = ModelConfig(**SETTINGS)


def config(**changes: Any) -> ModelConfig:
    """`CONFIG` with changes; the hidden units follow the channels."""
    return ModelConfig(**SETTINGS | changes)


def params(cfg: ModelConfig, dtype: Any = jnp.float64) -> Any:
    """Noise on every parameter but the pad rows, gains around 1: no gradient vanishes by symmetry.

    It is NumPy's: `jax.random` compiles a program for every shape.
    """
    generator = np.random.default_rng(0)

    def noise(weight: Any, shape: tuple[int, ...]) -> np.ndarray:
        x = ((weight.init == "ones") + 0.1 * generator.standard_normal(shape)).astype(dtype)
        if weight.axes[0] == "Vp":
            x[cfg.vocab_size :] = 0
        return x

    stacked: Any = jax.tree.map(noise, weight_table(cfg), param_shapes(cfg), is_leaf=is_weight)
    return in_layout(stacked, cfg)


def batch(cfg: ModelConfig, B: int = 2, T: int = 7, seed: int = 0) -> Batch:
    """Random ids; with 11 of them, most rows hold duplicates."""
    ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (B, T + 1)).astype(np.int32)
    return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))


def unigram(cfg: ModelConfig, probabilities: Any) -> Any:
    """GPT-2's parameters under which each id has its probability everywhere.

    The last LayerNorm gives a constant. An id that is left out has next to no probability.
    """
    logits = np.full(cfg.padded_vocab_size, -1e4, np.float32)
    logits[: len(probabilities)] = np.log(probabilities)
    stacked: Any = jax.tree.map(
        lambda _, shape: np.zeros(shape, np.float32),
        weight_table(cfg),
        param_shapes(cfg),
        is_leaf=is_weight,
    )
    stacked.wte[:, 1] = logits
    stacked.lnfb[1] = 1
    return in_layout(stacked, cfg)


def in_layout(stacked: Any, cfg: ModelConfig) -> Any:
    """Stacked NumPy parameters as JAX's, in the layout that ``cfg.layers`` runs on."""
    return jax.tree.map(jnp.asarray, stacked if cfg.layers == "scan" else unstack(stacked))
