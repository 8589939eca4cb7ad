"""Sampling text from a model: one compiled loop over a cache of keys and values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gptjax.models.config import GPT2Config
from gptjax.models.decode import decode, init_cache
from gptjax.models.params import Params
from gptjax.ops.precision import accumulation_dtype


def choose(key: Key[Array, ""], logits: Float[Array, "B V"], temperature: float, top_k: int, allowed: int) -> Int[Array, " B"]:
    """Draw the next id of each row from softmax(logits / temperature), among the ``top_k`` best and the first ``allowed``.

    A temperature of 0 takes the best; a ``top_k`` of 0 leaves all ids in.
    """
    logits = logits[:, :allowed].astype(accumulation_dtype(logits))
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    if 0 < top_k < allowed:
        worst = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


@partial(jax.jit, static_argnames=("cfg", "new_tokens", "temperature", "top_k", "allowed"))
def sample(
    params: Params,
    prompt: Int[Array, "B P"],
    key: Key[Array, ""],
    *,
    cfg: GPT2Config,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    allowed: int | None = None,
) -> Int[Array, "B N"]:
    """Continue each prompt by ``new_tokens`` ids: (B, P) -> (B, new_tokens).

    Args:
        params: in the layout of ``cfg.layers``.
        prompt: ids, at least one a row.
        key: the same key gives the same ids.
        cfg: resolved; P + new_tokens must not exceed ``cfg.max_seq_len``.
        new_tokens: how many ids to draw.
        temperature: divides the logits; 0 is greedy.
        top_k: draw among this many best ids; 0 for all.
        allowed: draw among the first ids only, for a tokenizer smaller than the model's vocabulary.

    Raises:
        ValueError: the prompt is empty, or the sequence would not fit the model.

    """
    B, P = prompt.shape
    if P < 1 or P + new_tokens > cfg.max_seq_len:
        raise ValueError(f"a prompt of {P} and {new_tokens} new tokens need 1..{cfg.max_seq_len} positions in all")
    draw = partial(choose, temperature=temperature, top_k=top_k, allowed=allowed or cfg.vocab_size)
    logits, cache = decode(params, prompt, init_cache(cfg, B, P + new_tokens), jnp.int32(0), cfg)

    def step(carry: Any, key_position: Any) -> tuple[Any, Array]:
        logits, cache = carry
        key, position = key_position
        token = draw(key, logits)
        logits, cache = decode(params, token[:, None], cache, position, cfg)
        return (logits[:, -1], cache), token

    positions = P + jnp.arange(new_tokens, dtype=jnp.int32)
    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), (jax.random.split(key, new_tokens), positions))
    return tokens.T
