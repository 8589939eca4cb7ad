import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import gpt2
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, param_shapes
from gptjax.models.scoring import token_losses
from gptjax.ops import IGNORE_INDEX
from tests.models import tiny

LOSSES = jax.jit(token_losses, static_argnums=2)


def test_each_token_has_the_logits_cross_entropy():
    """Without dropout, and their mean is the training loss."""
    cfg = tiny.config(dropout=0.5)
    params, batch = tiny.params(cfg), tiny.batch(cfg, B=3)
    batch = batch._replace(targets=batch.targets.at[1, 2].set(IGNORE_INDEX))
    scores = np.asarray(jax.jit(gpt2.logits, static_argnums=2)(params, batch.inputs, cfg))
    expected = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, np.asarray(batch.targets)[..., None], 2)[..., 0]
    expected[1, 2] = 0
    losses = LOSSES(params, batch, cfg)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    trained = jax.jit(gpt2.loss, static_argnums=2)(params, batch, cfg)
    assert losses.sum() / (batch.targets.size - 1) == pytest.approx(trained.item(), rel=1e-13)


def test_sixteen_bits_give_losses_in_thirty_two():
    cfg = tiny.config(dtype="bfloat16")
    params = tiny.params(tiny.CONFIG)
    losses = LOSSES(jax.tree.map(lambda x: x.astype(jnp.float32), params), tiny.batch(cfg), cfg)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, LOSSES(params, tiny.batch(cfg), tiny.CONFIG), atol=0.1)


def test_one_sequence_of_scores_is_held_at_a_time():
    """8 sequences would take 8 x 12 x 50304 x 4 bytes = 19 MB at once."""
    cfg = tiny.config(num_layers=1, vocab_size=50257, dtype="float32", layers="scan")
    params = Params(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in param_shapes(cfg)))
    ids = jax.ShapeDtypeStruct((8, 12), jnp.int32)
    compiled = LOSSES.lower(params, Batch(ids, ids), cfg).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 12 * 50304 * 4
