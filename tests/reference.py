"""GPT-2's and Llama's forward in plain NumPy, float64, one sequence at a time.

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


def llama_logits(params: Any, tokens: np.ndarray, cfg: Any) -> np.ndarray:
    """Llama's, (T,) ids -> (T, V), from parameters in either layout."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), unstack(params))
    x = p.tok_emb[tokens]
    for w in p.blocks:
        x = x + llama_attention(rmsnorm(x, w.att_norm, cfg.norm_eps), w, cfg.rope_theta)
        h = rmsnorm(x, w.ffn_norm, cfg.norm_eps)
        gate = h @ w.w1
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w.w3)) @ w.w2
    head = p.tok_emb if p.wcls is None else p.wcls
    return rmsnorm(x, p.final_norm, cfg.norm_eps) @ head[: cfg.vocab_size].T


def rmsnorm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def llama_attention(x: np.ndarray, w: Any, theta: float) -> np.ndarray:
    """(T, C) -> (T, C), causal: query head h attends to key head h // (H / K)."""
    T, (_, H, D), K = len(x), w.wq.shape, w.wk.shape[1]
    turn = np.exp(1j * np.arange(T)[:, None] * theta ** (-2 * np.arange(D // 2) / D))

    def rotate(y: np.ndarray) -> np.ndarray:
        z = (y[:, : D // 2] + 1j * y[:, D // 2 :]) * turn
        return np.concatenate([z.real, z.imag], 1)

    out = np.zeros_like(x)
    for h in range(H):
        g = h // (H // K)
        q, k, v = rotate(x @ w.wq[:, h]), rotate(x @ w.wk[:, g]), x @ w.wv[:, g]
        scores = q @ k.T / math.sqrt(D)
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out += p / p.sum(-1, keepdims=True) @ v @ w.wo[h]
    return out
