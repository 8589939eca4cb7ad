import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import dropout_bwd, dropout_fwd
from tests.compare import assert_same_gradients, normal, vjp_of

KEY = jax.random.key(7)


@pytest.mark.parametrize(("rate", "key"), [(0.0, KEY), (0.5, None)])
def test_identity_without_key_or_rate(rate, key):
    x = normal(0, 3, 4)
    y, saved = dropout_fwd(x, rate, key)
    assert saved is None
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(dropout_bwd(saved, rate, x), x)


def test_keeps_the_stated_share_and_the_mean():
    x = jnp.ones(100_000)
    y, _ = dropout_fwd(x, 0.25, KEY)
    np.testing.assert_array_equal(np.unique(np.asarray(y)), [0, 1 / 0.75])
    assert abs(float(y.mean()) - 1) < 5 * (0.25 / 0.75 / x.size) ** 0.5  # five standard errors


def test_same_key_same_mask_other_key_other_mask():
    x = jnp.ones(1000)
    assert (dropout_fwd(x, 0.5, KEY)[0] == dropout_fwd(x, 0.5, KEY)[0]).all()
    assert (dropout_fwd(x, 0.5, KEY)[0] != dropout_fwd(x, 0.5, jax.random.key(8))[0]).any()


def test_backward_equals_vjp():
    x, dy = normal(0, 3, 40), normal(1, 3, 40)
    _, saved = dropout_fwd(x, 0.3, KEY)
    (reference,) = vjp_of(lambda x: dropout_fwd(x, 0.3, KEY)[0], x, dy=dy)
    assert_same_gradients(dropout_bwd(saved, 0.3, dy), reference, x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_rate_outside_its_range(rate):
    with pytest.raises(ValueError, match="dropout rate"):
        dropout_fwd(jnp.ones(3), rate, KEY)
