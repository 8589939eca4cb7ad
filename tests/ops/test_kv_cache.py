import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.attention import materialised_fwd
from gptjax.ops.kv_cache import LayerCache, cached_attention
from gptjax.ops.stacks import InStack
from gptjax.xla import native

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


def test_a_token_sees_its_own_key_as_a_cache_in_float16_holds_it():
    """Reading two tokens at once, or one after the other, leaves the same cache and the same
    output: a token's own key is rounded as the others are. Numbers beyond float16's become its
    largest, but what is infinite or no number is not hidden.
    """
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 2, n, D)) for i, n in enumerate((H, 2, 2)))
    k, v = k.at[0, 0, 1, 2].set(1e6), v.at[0, 0, 0, 0].set(-1e6)
    cache = LayerCache(*(jnp.full((1, 2, S, D), x, jnp.float16) for x in (0.5, 0.25)))
    begin = jnp.zeros(1, jnp.int32)
    together, both = cached_attention(q, k, v, cache, jnp.int32(3), begin)
    for t in range(2):
        now = slice(t, t + 1)
        alone, cache = cached_attention(
            q[:, now], k[:, now], v[:, now], cache, jnp.int32(3 + t), begin
        )
        np.testing.assert_allclose(alone, together[:, now], rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, cache, both)
    largest = float(jnp.finfo(jnp.float16).max)
    assert (cache.k.max(), cache.v.min()) == (largest, -largest)
    assert cache.k.dtype == cache.v.dtype == jnp.float16
    assert not np.array_equal(cache.k[0, :, 3], k[0, 0])  # it is rounded
    for wrong in (jnp.inf, -jnp.inf, jnp.nan):
        _, spoilt = cached_attention(q, k.at[0, 1, 0, 0].set(wrong), v, cache, jnp.int32(3), begin)
        np.testing.assert_array_equal(spoilt.k[0, 0, 4, 0], wrong)


# --- In C++ ---


@pytest.fixture
def compiler():
    if not native.available("attention"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")


def make(T, K, D, size=1.0, slots=200, H=6):
    """(q, k, v, the cache) in float32, of 2 rows."""
    rng = np.random.default_rng(T + K + D)
    shapes = [(2, T, H, D), (2, T, K, D), (2, T, K, D), (2, K, slots, D), (2, K, slots, D)]
    q, k, v, *past = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in shapes)
    return size * q, k, v, LayerCache(*past)


ATTENTION = jax.jit(native.attention)


def in_half(k, v, cache):
    """The same, rounded to float16."""
    return jax.tree.map(lambda x: x.astype(jnp.float16), (k, v, cache))


def computed(q, k, v, cache, slot, begin):
    stack = jax.tree.map(lambda x: x[None], cache)
    return np.asarray(ATTENTION(q, k, v, stack, 0, slot, jnp.asarray(begin, jnp.int32)))


@pytest.mark.parametrize("kernels", ["native", "XLA"])
def test_a_cache_among_those_of_all_layers_is_read_and_written_there_alone(in_cpp, kernels):
    if kernels == "XLA":
        in_cpp(False)
    *new, cache = make(3, 2, 16)
    caches = [cache, jax.tree.map(jnp.cos, cache), jax.tree.map(jnp.sin, cache)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *caches)
    attend = jax.jit(cached_attention)
    slot, begin = jnp.int32(20), jnp.array([0, 7], jnp.int32)
    expected, written = attend(*new, caches[1], slot, begin)
    found, stack = attend(*new, InStack(stack, jnp.int32(1)), slot, begin)
    np.testing.assert_array_equal(found, expected)
    for i, layer in enumerate([caches[0], written, caches[2]]):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], stack), layer)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("T", "H", "K", "D"),
    [
        *[(1, 6, 6, 64), (1, 6, 2, 16), (3, 6, 1, 5), (8, 6, 3, 20), (2, 6, 6, 1)],
        *[(1, 8, 2, 64), (2, 5, 1, 33), (1, 7, 1, 40), (4, 18, 2, 32)],
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_cpp_equals_the_same_in_float64(T, H, K, D, half):
    """Of heads that are read together in many ways, over up to 4 chunks, with the cache in float32
    or in float16. A row that begins behind the first new positions has padding among them.
    """
    arrays = make(T, K, D, H=H)
    arrays = (arrays[0], *in_half(*arrays[1:])) if half else arrays
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
    attend = jax.jit(cached_attention)
    for slot, *begin in (0, 0, 0), (5, 0, 7), (62, 61, 3), (9, 40, 9), (190, 1, 64), (130, 67, -2):
        expected, _ = attend(*wide, jnp.int32(slot), jnp.asarray(begin, jnp.int32))
        found = computed(*arrays, slot, begin)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6, err_msg=f"{slot}")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_cpp_takes_scores_of_any_size(size):
    """Of 1e4, each query sees one key alone."""
    arrays = make(1, 2, 64, size)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
    expected, _ = cached_attention(*wide, jnp.int32(180), jnp.zeros(2, jnp.int32))
    found = computed(*arrays, 180, (0, 0))
    np.testing.assert_allclose(found, expected, atol=3e-7 * size)


@pytest.mark.usefixtures("compiler")
def test_a_querys_bits_do_not_depend_on_those_beside_it():
    """So that reading several tokens at once changes no token that is drawn, nor do other rows or
    padding. The new positions reach over the end of a chunk.
    """
    q, k, v, cache = make(4, 3, 64)
    together = computed(q, k, v, cache, 126, (0, 5))
    later = LayerCache(*(jnp.roll(x, 9, 2) for x in cache))
    np.testing.assert_array_equal(computed(q, k, v, later, 135, (9, 14)), together)
    past = cache
    for t in range(4):
        now = slice(t, t + 1)
        for row in range(2):
            one = slice(row, row + 1)
            alone = computed(
                q[one, now],
                k[one, now],
                v[one, now],
                LayerCache(*(x[one] for x in past)),
                126 + t,
                ((0, 5)[row],),
            )
            np.testing.assert_array_equal(alone[0], together[row, now])
        past = LayerCache(
            *(x.at[:, :, 126 + t].set(new[:, t]) for x, new in zip(past, (k, v), strict=True))
        )


@pytest.mark.usefixtures("compiler")
def test_a_number_that_is_not_finite_spoils_only_its_row():
    q, k, v, cache = make(1, 3, 16)
    cache = cache._replace(k=cache.k.at[1, :, 70, 3].set(jnp.nan))
    found = computed(q, k, v, cache, 180, (0, 0))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.usefixtures("compiler")
def test_a_score_beyond_float32_hides_only_its_key():
    """As a softmax has it: minus infinity has the weight 0, even if a whole chunk has it."""
    q, k, v, cache = make(1, 1, 8, H=1)
    q, hidden = jnp.full_like(q, 1e20), -jnp.full((2, 1, 64, 8), 1e20)
    cache = cache._replace(k=jnp.zeros_like(cache.k).at[:, :, 64:128].set(hidden))
    found = computed(q, jnp.zeros_like(k), v, cache, 150, (0, 0))
    seen = jnp.concatenate([cache.v[:, 0, :64], cache.v[:, 0, 128:150], v[:, 0]], 1)
    np.testing.assert_allclose(found[:, 0, 0], seen.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiler")
def test_arrays_that_do_not_fit_are_rejected():
    q, k, v, cache = make(1, 3, 16)
    half, other = k.astype(jnp.float16), cache._replace(v=cache.v.astype(jnp.float16))
    for wrong, slot, past in (
        ((q[:1], k, v), 0, cache),
        ((q, k[..., :8], v), 0, cache),
        ((q, k, v), 201, cache),
        ((q, half, half), 0, cache),
        ((q, half, v), 0, cache),
        ((q, k, v), 0, other),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="do not fit"):
            computed(*wrong, past, slot, (0, 0))
    stack = jax.tree.map(lambda x: x[None], cache)
    for layer in (-1, 1):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="do not fit"):
            np.asarray(ATTENTION(q, k, v, stack, layer, 0, jnp.zeros(2, jnp.int32)))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa):
    """In another process, since the environment is read once."""
    if isa not in native.instruction_sets(native.registered("product")):
        pytest.skip(f"this processor has no {isa}")
    script = (
        "import sys; from tests.ops.test_kv_cache import of_many_sizes, native;"
        "native.available('attention');"
        "sys.stdout.buffer.write(of_many_sizes())"
    )
    environment = {**os.environ, native.ISA: isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert done.stdout == of_many_sizes()


def of_many_sizes():
    """The bytes of some results."""
    sizes = [(3, 6, 2, 20), (1, 4, 4, 64), (2, 5, 1, 33)]
    found = []
    for T, H, K, D in sizes:
        q, *others = make(T, K, D, H=H)
        k, v, cache = in_half(*others)
        tiny, infinite = (cache._replace(v=cache.v.at[0].set(x)) for x in (3e-7, jnp.inf))
        found += [
            computed(q, *arrays, 150, (0, 9))
            for arrays in (others, (k, v, cache), (k, v, tiny), (k, v, infinite))
        ]
    return b"".join(x.tobytes() for x in found)
