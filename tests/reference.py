"""GPT-2's forward in plain NumPy, float64, one sequence at a time.

An independent statement of what the model computes.
"""

import math
from typing import Any

import jax
import numpy as np

from gptjax.models.params import unstack


def logits(params: Any, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(T,) ids -> (T, V), from parameters in either layout."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), unstack(params))
    x = p.wte[tokens] + p.wpe[: len(tokens)]
    for w in p.blocks:
        x = x + attention(layernorm(x, w.ln1w, w.ln1b), w)
        x = x + gelu(layernorm(x, w.ln2w, w.ln2b) @ w.fcw + w.fcb) @ w.fcprojw + w.fcprojb
    return layernorm(x, p.lnfw, p.lnfb) @ p.wte[:vocab_size].T


def loss(params: Any, inputs: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Mean cross-entropy over (B, T) ids."""
    nll = []
    for row, wanted in zip(inputs, targets, strict=True):
        scores = logits(params, row, vocab_size)
        log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        nll.append(-log_p[np.arange(len(row)), wanted])
    return float(np.mean(nll))


def layernorm(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis, eps 1e-5."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x: np.ndarray, w: Any) -> np.ndarray:
    """(T, C) -> (T, C), causal, with its four products: head by head, summed as they are projected
    back.
    """
    T = len(x)
    out = np.zeros_like(x) + w.attprojb
    for h in range(w.qw.shape[1]):
        q, k, v = (x @ m[:, h] + b[h] for m, b in ((w.qw, w.qb), (w.kw, w.kb), (w.vw, w.vb)))
        scores = q @ k.T / math.sqrt(q.shape[-1])
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out += p / p.sum(-1, keepdims=True) @ v @ w.attprojw[h]
    return out
