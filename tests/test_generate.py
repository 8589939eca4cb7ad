import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generate import choose, sample
from gptjax.models import gpt2
from tests.models import tiny

KEY = jax.random.key(0)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_greedy_is_the_argmax_of_the_uncached_model_at_every_step(layers):
    cfg = tiny.config(layers=layers)
    params, prompt = tiny.params(cfg), tiny.batch(cfg, B=3, T=4).inputs
    tokens = prompt
    for _ in range(6):
        best = gpt2.logits(params, tokens, cfg)[:, -1].argmax(-1).astype(jnp.int32)
        tokens = jnp.concatenate([tokens, best[:, None]], axis=1)
    ours = sample(params, prompt, KEY, cfg=cfg, new_tokens=6, temperature=0, allowed=cfg.vocab_size)
    np.testing.assert_array_equal(ours, tokens[:, 4:])


def test_same_seed_same_text_other_seed_other_text():
    cfg = tiny.CONFIG
    params, prompt = tiny.params(cfg), tiny.batch(cfg, B=8, T=2).inputs
    one, same, other = (sample(params, prompt, jax.random.key(s), cfg=cfg, new_tokens=8) for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_draws_follow_the_distribution_among_the_top_k_and_the_allowed():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2, 0.9]))[None].repeat(40_000, axis=0)
    drawn = np.bincount(choose(KEY, logits, 1.0, 2, 4), minlength=5) / 40_000
    np.testing.assert_allclose(drawn, [0, 4 / 7, 3 / 7, 0, 0], atol=0.012)  # five standard errors
    sharper = np.bincount(choose(KEY, logits, 0.5, 0, 4), minlength=5) / 40_000
    np.testing.assert_allclose(sharper, np.array([1, 16, 9, 4, 0]) / 30, atol=0.012)


@pytest.mark.parametrize(("length", "new_tokens"), [(4, 9), (0, 1)])
def test_a_sequence_that_does_not_fit(length, new_tokens):
    cfg = tiny.CONFIG
    with pytest.raises(ValueError, match=r"need 1\.\.12 positions"):
        sample(tiny.params(cfg), jnp.zeros((1, length), jnp.int32), KEY, cfg=cfg, new_tokens=new_tokens)
