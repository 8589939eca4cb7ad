"""The effect of storing weights in fewer bits on a model's predictions."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.evaluate.statistics import Estimate, ratio
from gptjax.models.batch import Batch
from gptjax.models.layers import classifier_fwd
from gptjax.models.params import head_of
from gptjax.models.transformer import hidden


class StorageComparison(NamedTuple):
    """Predictions of stored weights against those of the same weights in float32."""

    loss: Estimate
    """Loss of the weights in float32, in nats per token."""
    divergence: Estimate
    """Mean of ``sum over v of p[v] log(p[v] / q[v])`` in nats, p in float32, q as stored
    (Kullback and Leibler 1951)."""
    agreement: Estimate
    """Fraction of positions at which both have the same likeliest next token."""


def compare(
    params: Any,
    stored: Any,
    batches: Iterable[Batch],
    cfg: ModelConfig,
    advance: Callable[[int, str], None] = lambda sequences, text: None,
) -> StorageComparison:
    """Compare the predictions at the targets of ``batches`` whose mask is not 0.

    Args:
        params: in float32.
        stored: the same, as `gptjax.models.decode.store` stores them.
        batches: NumPy arrays of one shape; masks cover whole sequences.
        cfg: resolved.
        advance: called with the number of sequences just done and the divergence so far as text.

    """
    sums: list[np.ndarray] = []
    for batch in batches:
        kept = batch.mask[:, 0] > 0
        found = compiled_figures(params, stored, batch._replace(mask=None), cfg)
        sums.append(np.stack([np.asarray(x, np.float64)[kept].sum(1) for x in found]))
        tokens = sum(x.shape[1] for x in sums) * batch.targets.shape[1]
        advance(int(kept.sum()), f"divergence {sum(x[1].sum() for x in sums) / tokens:.2g}")
    of_sequences = np.concatenate(sums, 1)
    return StorageComparison(
        *(ratio(x, np.full(len(x), batch.targets.shape[1])) for x in of_sequences)
    )


def figures(params: Any, stored: Any, batch: Batch, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """(float32's loss, divergence, whether the likeliest tokens agree) at each target, (B, T)."""
    outputs = tuple(hidden(p, batch.inputs, cfg, segments=batch.segments) for p in (params, stored))

    def one_sequence(
        x: tuple[Float[Array, "T C"], Float[Array, "T C"], Int[Array, " T"]],
    ) -> tuple[Array, Array, Array]:
        exact, rounded, targets = x
        logp, logq = (
            jax.nn.log_softmax(classifier_fwd(h, head_of(p, cfg))[:, : cfg.vocab_size])
            for h, p in ((exact, params), (rounded, stored))
        )
        loss = -jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
        divergence = (jnp.exp(logp) * (logp - logq)).sum(-1)
        return loss, divergence, logp.argmax(-1) == logq.argmax(-1)

    return lax.map(one_sequence, (*outputs, batch.targets))


compiled_figures = jax.jit(figures, static_argnames="cfg")
