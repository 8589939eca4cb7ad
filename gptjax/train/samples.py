"""Samples of text on the way through training."""

from typing import Any

import jax
import numpy as np

from gptjax.errors import DataError
from gptjax.generate import Sampler, sample
from gptjax.parallel.mesh import whole
from gptjax.tokenizers import Tokenizer
from gptjax.train.setup import Run


def sample_text(run: Run, params: Any, step: int) -> str:
    """The configured prompt and what the model makes of it; ids where no tokenizer is known."""
    cfg, tokenizer = run.cfg.train, run.corpus.tokenizer
    prompt = prompt_ids(tokenizer, cfg.sample_prompt)
    ids = sample(
        params,
        [prompt],
        jax.random.fold_in(run.key, step),
        cfg=run.model,
        new_tokens=cfg.sample_tokens,
        sampler=Sampler(cfg.sample_temperature, cfg.sample_top_k),
        allowed=tokenizer.vocab_size if tokenizer else None,
        fetch=lambda x: np.asarray(whole(run.mesh, x)),
    )[0].tolist()
    return tokenizer.decode(prompt + ids) if tokenizer else " ".join(map(str, ids))


def prompt_ids(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """At least one id to start a sample from.

    Those of the prompt; if it is empty, end-of-text, or a line end where there is none. Without a tokenizer, or where its
    vocabulary has no line end, the first id.

    Raises:
        DataError: the vocabulary lacks a character of the prompt, other than a line end.

    """
    if not tokenizer:
        return [0]
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode(prompt or "\n")
    except DataError:
        if prompt.strip("\n"):
            raise
        return [0]
