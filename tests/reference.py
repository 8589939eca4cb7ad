"""GPT-2's forward in plain NumPy, float64, one sequence at a time: an independent statement of what the model computes."""

import math

import numpy as np

from gptjax.models.params import Params


def logits(params: Params, tokens: np.ndarray, num_heads: int, vocab_size: int) -> np.ndarray:
    """(T,) ids -> (T, V), from stacked float64 parameters."""
    p = Params(*(np.asarray(x, np.float64) for x in params))
    x = p.wte[tokens] + p.wpe[: len(tokens)]
    for i in range(p.qkvw.shape[0]):
        x = x + attention(layernorm(x, p.ln1w[i], p.ln1b[i]) @ p.qkvw[i] + p.qkvb[i], num_heads) @ p.attprojw[i] + p.attprojb[i]
        x = x + gelu(layernorm(x, p.ln2w[i], p.ln2b[i]) @ p.fcw[i] + p.fcb[i]) @ p.fcprojw[i] + p.fcprojb[i]
    return layernorm(x, p.lnfw, p.lnfb) @ p.wte[:vocab_size].T


def loss(params: Params, inputs: np.ndarray, targets: np.ndarray, num_heads: int, vocab_size: int) -> float:
    """Mean cross-entropy over (B, T) ids."""
    nll = []
    for row, wanted in zip(inputs, targets, strict=True):
        scores = logits(params, row, num_heads, vocab_size)
        log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        nll.append(-log_p[np.arange(len(row)), wanted])
    return float(np.mean(nll))


def layernorm(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis, eps 1e-5."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(qkv: np.ndarray, num_heads: int) -> np.ndarray:
    """(T, 3C) -> (T, C), causal."""
    T, C = qkv.shape[0], qkv.shape[1] // 3
    out = []
    for q, k, v in zip(*(np.split(part, num_heads, axis=1) for part in np.split(qkv, 3, axis=1)), strict=True):
        scores = q @ k.T / math.sqrt(C // num_heads)
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(p / p.sum(-1, keepdims=True) @ v)
    return np.concatenate(out, axis=1)
