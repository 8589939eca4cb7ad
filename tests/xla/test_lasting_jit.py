"""Programs that stay when JAX forgets what it compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.ops.quantized import Blocks
from gptjax.xla.lasting_jit import LastingJit


@pytest.fixture
def power():
    """``x**n + y``, and how often it was traced."""
    traced = []

    @partial(LastingJit, static="n", donate="x")
    def power(x, y, *, n):
        traced.append(n)
        return x**n + y

    return power, traced


def test_it_is_compiled_once_for_each_kind_of_arguments(power):
    power, traced = power
    for x in (2.0, 3.0):
        np.testing.assert_array_equal(power(jnp.full(3, x), 1, n=2), np.full(3, x**2 + 1))
    assert traced == [2]
    np.testing.assert_array_equal(power(jnp.full(3, 2.0), 1, n=3), np.full(3, 9.0))  # a constant,
    np.testing.assert_array_equal(power(jnp.full(2, 2.0), 1, n=3), np.full(2, 9.0))  # a shape,
    np.testing.assert_array_equal(power(jnp.full(2, 2), 1, n=3), np.full(2, 9))  # a dtype,
    np.testing.assert_array_equal(power(jnp.full(2, 2), jnp.ones(2), n=3), np.full(2, 9.0))
    assert traced == [2, 3, 3, 3, 3]
    assert len(power.programs) == 5


def test_another_tree_or_weaker_dtype_is_another_kind():
    second = partial(LastingJit, static="n", donate="x")(lambda x, y, *, n: (x + n, y))
    number = jnp.asarray(1.0)  # whose dtype yields to others'
    for tree in (tuple, list):
        assert isinstance(second(jnp.ones(2), tree([number]), n=0)[1], tree)
    second(jnp.ones(2), [number.astype(number.dtype)], n=0)
    assert len(second.programs) == 3


def test_jax_does_not_forget_it(power):
    power, traced = power
    power(jnp.ones(3), 1, n=2)
    jax.clear_caches()
    power(jnp.ones(3), 1, n=2)
    assert traced == [2]


def test_results_take_the_donated_memory(power):
    power, _ = power
    x = jnp.ones(3)
    power(x, 1, n=2)
    assert x.is_deleted()


def test_arguments_may_lie_elsewhere_the_next_time(power):
    power, _ = power
    auto = (AxisType.Auto,)  # whose arrays' types do not say where they lie
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec()):
        x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, spec))
        np.testing.assert_array_equal(power(x, 1, n=2), np.arange(4.0) ** 2 + 1)
    np.testing.assert_array_equal(power(jnp.arange(4.0), 1, n=2), np.arange(4.0) ** 2 + 1)


def test_a_tree_may_refuse_what_is_no_array():
    """As one whose types are checked does."""
    first = partial(LastingJit, static="n", donate="x")(lambda x, y, *, n: y.scale[n])
    q, scale = jnp.zeros((1, 1, 8, 8, 4), jnp.int8), jnp.ones((1, 1, 8), jnp.float16)
    assert first(q, Blocks(q, scale, None, (8, 32), 1), n=0).shape == (1, 8)
