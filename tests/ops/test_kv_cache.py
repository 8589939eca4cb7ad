import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.attention import materialised_fwd
from gptjax.ops.kv_cache import LayerCache, cached_attention

B, H, S, D = 2, 4, 8, 4


@pytest.mark.parametrize(("T", "K"), [(1, 4), (3, 4), (3, 2), (2, 1)])
def test_cached_attention_is_attention_of_the_new_queries_over_the_visible_keys(T, K):
    """Rows of 5 + T and 3 + T positions; what lies in the slots that are not seen does not
    matter.
    """
    q, k, v = (jax.random.normal(jax.random.key(i), (B, S, n, D)) for i, n in enumerate((H, K, K)))
    begin, slot = np.array([0, 2], np.int32), 5
    cache = LayerCache(*(x.transpose(0, 2, 1, 3) for x in (k, v)))  # unseen slots are not empty
    now = slice(slot, slot + T)
    o, new = cached_attention(
        q[:, now], 2 * k[:, now], 3 * v[:, now], cache, jnp.int32(slot), jnp.array(begin)
    )
    for row, first in enumerate(begin):
        ks = k[row : row + 1, first : slot + T].at[:, -T:].multiply(2)
        vs = v[row : row + 1, first : slot + T].at[:, -T:].multiply(3)
        whole, _ = materialised_fwd(q[row : row + 1, first : slot + T], ks, vs)
        np.testing.assert_allclose(o[row], whole[0, -T:], rtol=1e-12)
    for mine, old, given in zip(new, cache, (2 * k, 3 * v), strict=True):
        np.testing.assert_array_equal(mine[:, :, now], given[:, now].swapaxes(1, 2))
        others = (jnp.arange(S) < slot) | (jnp.arange(S) >= slot + T)
        np.testing.assert_array_equal(mine[:, :, others], old[:, :, others])


def test_padding_sees_itself_alone():
    """So that nothing is divided by zero, and no position sees it."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 3, H, D)) for i in range(3))
    cache = LayerCache(*(jnp.zeros((1, H, S, D)) for _ in "kv"))
    o, _ = cached_attention(q, k, v, cache, jnp.int32(0), jnp.array([2], jnp.int32))
    np.testing.assert_allclose(o, v, rtol=1e-12)
