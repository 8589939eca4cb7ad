"""Text samples during training."""

from typing import Any

import jax
import numpy as np

from gptjax.config import Sampler
from gptjax.generate import sample
from gptjax.generate.stream import prompt_ids
from gptjax.parallel.mesh import whole
from gptjax.train.setup import Run


def sample_text(run: Run, params: Any, step: int) -> str:
    """The configured prompt with its continuation: text, or ids if there is no tokenizer. The
    draws depend on the run's key and ``step``.
    """
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
