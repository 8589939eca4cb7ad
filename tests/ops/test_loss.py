import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.ops import IGNORE_INDEX, cross_entropy_bwd, cross_entropy_fwd, target_weights
from tests.compare import assert_same_gradients, assert_same_sums, normal, vjp_of


def targets_in(vocab_size: int, n: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, n), jnp.int32)


def test_uniform_logits_cost_log_v():
    loss, _ = cross_entropy_fwd(jnp.zeros((4, 128)), targets_in(100, 4), jnp.full(4, 0.25), 100)
    assert loss == pytest.approx(np.log(100), rel=1e-15)


@given(
    n=st.integers(1, 6),
    vocab_size=st.integers(1, 9),
    padding=st.integers(0, 4),
    ignored=st.integers(0, 6),
)
def test_backward_equals_vjp(n, vocab_size, padding, ignored):
    logits = 3 * normal(0, n, vocab_size + padding)
    targets = targets_in(vocab_size, n).at[:ignored].set(IGNORE_INDEX)
    weights = target_weights(targets[None])[0].astype(jnp.float64)
    _, saved = cross_entropy_fwd(logits, targets, weights, vocab_size)
    (reference,) = vjp_of(
        lambda x: cross_entropy_fwd(x, targets, weights, vocab_size)[0], logits, dy=jnp.float64(0.7)
    )
    assert_same_gradients(cross_entropy_bwd(saved, vocab_size, 0.7), reference, logits)


def test_padding_is_excluded():
    """Whatever the pad logits are, the loss is that of the unpadded ones, and their gradient is
    exactly zero.
    """
    logits, targets, weights = normal(0, 3, 8), targets_in(5, 3), jnp.full(3, 1 / 3)
    padded = logits.at[:, 5:].set(1e4)
    loss, saved = cross_entropy_fwd(padded, targets, weights, 5)
    assert loss == cross_entropy_fwd(logits[:, :5], targets, weights, 5)[0]
    assert (cross_entropy_bwd(saved, 5)[:, 5:] == 0).all()


def test_padding_is_excluded_if_there_are_as_many_rows_as_ids():
    logits = normal(0, 5, 8).at[:, 5:].set(1e4)
    assert cross_entropy_fwd(logits, targets_in(5, 5), jnp.full(5, 0.2), 5)[0] < 10


def test_an_ignored_target_beside_padding_costs_nothing():
    loss, _ = cross_entropy_fwd(normal(0, 2, 8), jnp.array([-1, -1], jnp.int32), jnp.zeros(2), 5)
    assert loss == 0


def test_a_target_in_the_padding_costs_infinitely_much():
    loss, _ = cross_entropy_fwd(normal(0, 1, 8), jnp.array([6], jnp.int32), jnp.ones(1), 5)
    assert loss == np.inf


def test_scores_of_16_bits_are_the_only_numbers_that_are_rounded():
    """Their loss equals the loss of the same scores in float64, as float32 has it."""
    scores = 20 * normal(0, 64, 128)
    targets, weights = targets_in(100, 64), jnp.full(64, 1 / 64)
    rounded = scores.astype(jnp.bfloat16)
    exact, _ = cross_entropy_fwd(rounded.astype(jnp.float64), targets, weights, 100)
    loss, _ = cross_entropy_fwd(rounded, targets, weights, 100)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


def test_weights_sum_to_one_even_if_the_masks_sum_to_less():
    mask = jnp.array([[0.25, 0.0, 0.5]])
    np.testing.assert_allclose(
        target_weights(jnp.zeros((1, 3), jnp.int32), mask)[0], [1 / 3, 0, 2 / 3]
    )


def test_without_a_mask_each_target_weighs_one():
    weights = target_weights(jnp.array([[2, -1, 0]], jnp.int32), count=jnp.asarray(4.0))
    np.testing.assert_array_equal(weights[0], [0.25, 0, 0.25])


def test_ignored_and_masked_targets_do_not_count():
    targets = jnp.array([[3, IGNORE_INDEX, 2, 1]], jnp.int32)
    mask = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    np.testing.assert_allclose(target_weights(targets, mask)[0], [0.5, 0, 0, 0.5])
    np.testing.assert_allclose(target_weights(targets)[0], [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(
        target_weights(targets, mask, jnp.asarray(4.0))[0], [0.25, 0, 0, 0.25]
    )
    assert (target_weights(jnp.full((1, 2), IGNORE_INDEX, jnp.int32)) == 0).all()


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, 0.0, -1e4]], jnp.float32)
    loss, saved = cross_entropy_fwd(logits, jnp.array([1], jnp.int32), jnp.ones(1, jnp.float32), 3)
    assert loss == 1e4
    np.testing.assert_array_equal(cross_entropy_bwd(saved, 3), [[1, -1, 0]])


@pytest.mark.parametrize("margin", [5.0, 30.0, 200.0])
def test_the_loss_of_an_almost_certain_target_is_accurate(margin):
    """Loss and gradient are e^-margin, to float32's last digits, where log p and p - 1 would have
    lost them.
    """
    logits, targets = jnp.array([[0.0, margin, -1.0]], jnp.float32), jnp.array([1], jnp.int32)
    loss, saved = cross_entropy_fwd(logits, targets, jnp.ones(1, jnp.float32), 3)
    exact = np.exp(np.float64([[0.0, 0.0, -1.0]]) - margin)
    exact /= 1 + exact[:, [0, 2]].sum()
    exact[:, 1] = -exact[:, [0, 2]].sum()
    tiny = {"rtol": 1e-6, "atol": float(jnp.finfo(jnp.float32).tiny)}
    np.testing.assert_allclose(cross_entropy_bwd(saved, 3), exact, **tiny)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin) + np.exp(-1 - margin)), **tiny)


def test_each_row_of_the_gradient_sums_to_zero():
    logits, targets = normal(0, 5, 11), targets_in(11, 5)
    _, saved = cross_entropy_fwd(logits, targets, jnp.full(5, 0.2), 11)
    dlogits = cross_entropy_bwd(saved, 11)
    assert_same_sums(dlogits.sum(-1), np.zeros(5), dlogits)
