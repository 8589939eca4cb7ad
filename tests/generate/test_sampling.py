"""Each sampler against its distribution, as a sort of all probabilities gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import Sampler
from gptjax.errors import ConfigError
from gptjax.generate.sampling import BLOCK, choose, filtered

VOCAB = 3 * BLOCK + 5
DRAWS = 20_000
chosen = jax.jit(choose, static_argnums=2)
RANDOM = np.random.default_rng(0).normal(size=VOCAB) * 2


def expected(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    """Probabilities by sorting; a token as likely as the last one kept is kept."""
    logits = logits / sampler.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    if 0 < sampler.top_k < len(p):
        p = np.where(p >= np.sort(p)[-sampler.top_k], p, 0)
        p /= p.sum()
    if sampler.top_p < 1:
        falling = np.sort(p)[::-1]
        p = np.where(p >= falling[np.searchsorted(np.cumsum(falling), sampler.top_p)], p, 0)
        p /= p.sum()
    p = np.where(p >= sampler.min_p * p.max(), p, 0)
    return p / p.sum()


SAMPLERS = [
    Sampler(1.0, 0),
    Sampler(0.5, 0),
    Sampler(1.0, 7),
    Sampler(1.0, 0, 0.6),
    Sampler(1.0, 0, 1.0, 0.2),
    Sampler(1.3, 60, 0.8, 0.05),
    Sampler(),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_follow_the_distribution(sampler):
    keys = jax.random.split(jax.random.key(1), DRAWS)
    drawn = chosen(keys, jnp.broadcast_to(RANDOM, (DRAWS, VOCAB)), sampler)
    counts, p = np.bincount(drawn, minlength=VOCAB), expected(RANDOM, sampler)
    assert not counts[p == 0].any()
    # A chi-square test wants five expected draws in each class: the rare ones are one class
    rare = p * DRAWS < 5
    seen, due = (np.append(x[~rare], x[rare].sum()) for x in (counts, p * DRAWS))
    kept = due > 0
    assert scipy.stats.chisquare(seen[kept], due[kept]).pvalue > 1e-3


@given(
    st.lists(st.integers(-6, 6), min_size=20, max_size=20),  # whole numbers, so that many are equal
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_keep_what_a_sort_keeps(logits, top_k, top_p, min_p):
    sampler = Sampler(1.0, top_k, top_p, min_p)
    row = np.array(logits) / np.pi  # whose probabilities meet no limit by chance
    kept = np.isfinite(jax.jit(filtered, static_argnums=1)(jnp.array([row]), sampler)[0])
    np.testing.assert_array_equal(kept, expected(row, sampler) > 0)


@pytest.mark.parametrize("top_k", [1, 2, 7, 19, 20, 300])
def test_top_k_wherever_the_largest_lie(top_k):
    """All in one block, spread over all, or equal to many others, which are kept too."""
    rng, size = np.random.default_rng(top_k), 20 * BLOCK - 3  # in 20 blocks
    spread = rng.normal(size=size)
    together, equal = spread - 9, rng.integers(0, 5, size) / np.pi
    together[5 * BLOCK : 6 * BLOCK] += 9
    rows, sampler = np.stack([spread, together, equal]), Sampler(1.0, top_k)
    kept = np.isfinite(jax.jit(filtered, static_argnums=1)(jnp.array(rows), sampler))
    for row, found in zip(rows, kept, strict=True):
        np.testing.assert_array_equal(found, expected(row, sampler) > 0)


def test_a_temperature_of_zero_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0], [1.0, 2.0, 4.0]])
    assert choose(jax.random.split(jax.random.key(0), 3), logits, Sampler(0, 2, 0.5)).tolist() == [
        1,
        0,
        2,
    ]


@pytest.mark.parametrize(
    "sampler",
    [Sampler(1e-6, 0), Sampler(1.0, 0, 1e-6), Sampler(1.0, 1), Sampler(1.0, 0, 1.0, 1.0)],
    ids=str,
)
def test_the_narrowest_settings_take_the_best(sampler):
    """In float32, where the rounding of large logits must not be magnified."""
    logits = jnp.asarray(RANDOM[None] * 100, jnp.float32).repeat(50, 0)
    assert set(chosen(jax.random.split(jax.random.key(4), 50), logits, sampler).tolist()) == {
        int(RANDOM.argmax())
    }


def test_rows_are_drawn_with_their_own_keys():
    keys = jax.random.split(jax.random.key(2), 4)
    logits = jnp.broadcast_to(RANDOM, (4, VOCAB))
    together = chosen(keys, logits, Sampler(1.0, 0))
    alone = [chosen(keys[i : i + 1], logits[:1], Sampler(1.0, 0))[0] for i in range(4)]
    assert together.tolist() == [int(x) for x in alone]
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0, or from 1e-06 to 1e.06, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0, or from 1e-06 to 1e.06, not nan"),
        ({"temperature": 1e-9}, "temperature must be 0, or from 1e-06 to 1e.06, not 1e-09"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0.0}, "top_p must be from 1e-06 to 1, not 0.0"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
    ],
)
def test_numbers_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**values)
