import jax
import jax.numpy as jnp
import numpy as np

from gptjax.ops.attention import materialised_fwd
from gptjax.ops.kv_cache import LayerCache, cached_attention

B, H, S, D = 2, 3, 8, 4


def test_it_is_attention_of_the_last_position_over_what_was_seen():
    """Rows of 6 and 4 positions end in slot 5; what lies in the slots that are not seen does not
    matter.
    """
    q, k, v = (jax.random.normal(jax.random.key(i), (B, S, H, D)) for i in range(3))
    begin, slot = np.array([0, 2]), 5
    cache = LayerCache(*(x.transpose(0, 2, 1, 3) for x in (k, v)))  # unseen slots are not empty
    seen = (jnp.arange(S)[None] >= begin[:, None]) & (jnp.arange(S)[None] < slot)
    now = slice(slot, slot + 1)
    o, new = cached_attention(q[:, now], 2 * k[:, now], 3 * v[:, now], cache, jnp.int32(slot), seen)
    for row, first in enumerate(begin):
        ks = k[row : row + 1, first : slot + 1].at[:, -1].multiply(2)
        vs = v[row : row + 1, first : slot + 1].at[:, -1].multiply(3)
        whole, _ = materialised_fwd(q[row : row + 1, first : slot + 1], ks, vs)
        np.testing.assert_allclose(o[row], whole[0, -1:], rtol=1e-12)
    np.testing.assert_array_equal(new.k[:, :, slot], 2 * k[:, slot])
    np.testing.assert_array_equal(new.v[:, :, slot], 3 * v[:, slot])
    others = jnp.arange(S) != slot
    np.testing.assert_array_equal(new.k[:, :, others], cache.k[:, :, others])
