"""The loss of each token by itself, for evaluation and for a look at where a model is surprised."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptjax.models import gpt2
from gptjax.models.batch import checked_batch
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params
from gptjax.ops import IGNORE_INDEX, contract, cross_entropy_fwd


def token_losses(params: Params, batch: Batch, cfg: GPT2Config) -> Float[Array, "B T"]:
    """-log p of each target in nats, without dropout; 0 at `IGNORE_INDEX`. Their mean is `gpt2.loss`.

    The mask has no part in it. One sequence's scores of the whole vocabulary are in memory at a time.

    Args:
        params: in the layout of ``cfg.layers``.
        batch: ids below ``cfg.vocab_size``; at most ``cfg.max_seq_len`` long.
        cfg: resolved; static under jit.

    Raises:
        ValueError: a sequence is too long, or a NumPy array holds an id outside the vocabulary; see `checked_batch`.

    """
    batch = checked_batch(batch, cfg)
    x = gpt2.hidden(params, batch.inputs, cfg)
    wte = params.wte.astype(x.dtype)

    def one_token(scores: Array, target: Array) -> Array:
        return cross_entropy_fwd(scores[None], target[None], jnp.ones(1, scores.dtype), cfg.vocab_size)[0]

    def one_sequence(x_targets: tuple[Array, Array]) -> Array:
        x, targets = x_targets
        losses = jax.vmap(one_token)(contract("tc,vc->tv", x, wte), targets)
        return jnp.where(targets == IGNORE_INDEX, jnp.zeros((), losses.dtype), losses)

    return lax.map(one_sequence, (x, batch.targets))
