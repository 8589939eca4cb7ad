import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import gpt2
from gptjax.models.scoring import token_losses
from gptjax.ops import IGNORE_INDEX
from tests.models import tiny

LOSSES = jax.jit(token_losses, static_argnums=2)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_each_token_has_the_logits_cross_entropy(layers):
    cfg = tiny.config(layers=layers, dropout=0.5)
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=3)
    batch = batch._replace(targets=batch.targets.at[1, 2].set(IGNORE_INDEX))
    scores = np.asarray(jax.jit(gpt2.logits, static_argnums=2)(params, batch.inputs, cfg))
    expected = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, np.asarray(batch.targets)[..., None], 2)[..., 0]
    expected[1, 2] = 0
    np.testing.assert_allclose(LOSSES(params, batch, cfg), expected, rtol=1e-12)


def test_their_mean_is_the_training_loss():
    cfg = tiny.CONFIG
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=4)
    expected = jax.jit(gpt2.loss, static_argnums=2)(params, batch, cfg)
    assert LOSSES(params, batch, cfg).mean() == pytest.approx(expected.item(), rel=1e-13)


def test_sixteen_bits_give_losses_in_thirty_two():
    cfg = tiny.config(dtype="bfloat16")
    params = tiny.params(tiny.CONFIG)
    losses = LOSSES(jax.tree.map(lambda x: x.astype(jnp.float32), params), tiny.batch(cfg), cfg)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, LOSSES(params, tiny.batch(cfg), tiny.CONFIG), atol=0.1)


def test_one_sequence_of_scores_is_held_at_a_time():
    """8 sequences would take 8 x 12 x 50304 x 4 bytes = 19 MB at once."""
    cfg = tiny.config(vocab_size=50257, dtype="float32")
    params, batch = tiny.params(cfg, jnp.float32), tiny.batch(cfg, B=8, T=12)
    compiled = jax.jit(lambda p, b: token_losses(p, b, cfg)).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 12 * 50304 * 4
