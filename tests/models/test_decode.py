import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import gpt2
from gptjax.models.decode import decode, init_cache
from tests.models import tiny


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_cached_logits_equal_uncached_at_every_position(layers):
    """A prompt of 4, then a piece of 2, then one token at a time, in a cache longer than the sequence."""
    cfg = tiny.config(layers=layers)
    params, tokens = tiny.params(cfg), tiny.batch(cfg, B=3, T=9).inputs
    cache, out, start = init_cache(cfg, 3, 12), [], 0
    for size in (4, 2, 1, 1, 1):
        piece, cache = decode(params, tokens[:, start : start + size], cache, jnp.int32(start), cfg)
        out.append(piece)
        start += size
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), gpt2.logits(params, tokens, cfg), rtol=1e-12, atol=1e-14)


def test_cache_is_kept_in_the_compute_dtype():
    cfg = dataclasses.replace(tiny.CONFIG, dtype="bfloat16", layers="scan")
    cache = init_cache(cfg, 2, 5)
    assert {(x.shape, x.dtype.name) for x in jax.tree.leaves(cache)} == {((2, 2, 5, 2, 4), "bfloat16")}
