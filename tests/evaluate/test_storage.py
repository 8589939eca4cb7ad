import math

import jax
import numpy as np
import pytest

from gptjax.datasets.batches import Sequences, in_order
from gptjax.evaluate.storage import compare, compiled_figures
from gptjax.models import transformer
from gptjax.models.decode import store_for_decoding
from tests.datasets.test_batches import shard
from tests.models import tiny

CFG = tiny.config(num_layers=1, vocab_size=5, dtype="float32")
FIRST, SECOND = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], [1 / 8, 1 / 2, 1 / 4, 1 / 16, 1 / 16]


def test_models_whose_divergence_is_known():
    """Bits 1/2 log2(4) + 1/4 log2(1/2) + 1/8 log2(1/2) wherever a token stands; the losses of the
    ids are 1, 2, 3, 4, 4 bits, and the likeliest never agree.
    """
    ids = np.array([3, 0, 1, 0, 2, 4, 0], np.uint16)
    windows = Sequences([shard(1)._replace(tokens=ids)], 3, 1, CFG.vocab_size)
    one, other = (tiny.unigram(CFG, p) for p in (FIRST, SECOND))
    seen = []
    for batch_size in (1, 2, 3):
        batches = in_order(windows, len(windows), batch_size)
        found = compare(one, other, batches, CFG, lambda n, text: seen.append(n))
        assert found.loss.value == pytest.approx(2 * math.log(2), rel=1e-5)
        assert found.divergence.value == pytest.approx((1 - 1 / 4 - 1 / 8) * math.log(2), rel=1e-5)
        assert found.agreement.value == 0
    assert seen == [1, 1, 2, 2]
    same = compare(one, one, in_order(windows, 2, 2), CFG)
    assert (same.divergence.value, same.agreement.value) == (pytest.approx(0, abs=1e-6), 1)


def test_stored_weights_give_losses_of_their_own():
    """Of `transformer.token_losses`, too; fewer bits diverge more."""
    cfg = tiny.config(channels=32, num_heads=4, dtype="float32")
    params, batch = tiny.params(cfg, np.float32), tiny.batch(cfg)
    losses_of = jax.jit(transformer.token_losses, static_argnames="cfg")
    exact = losses_of(params, batch, cfg=cfg)
    divergences = []
    for how in ("as_stored", "q8_0", "q4_1"):
        stored = store_for_decoding(params, cfg, how)
        losses, divergence, _ = compiled_figures(params, stored, batch, cfg)
        np.testing.assert_allclose(losses, exact, rtol=1e-5)
        rounded = losses_of(stored, batch, cfg=cfg)
        assert np.abs(rounded - exact).max() < 0.4
        divergences.append(float(divergence.mean()))
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert 1e-7 < divergences[1] < divergences[2] / 10
