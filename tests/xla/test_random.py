"""Against `jax.random`, number by number, and against the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.xla.random import bernoulli, normal, random_bits

KEY = jax.random.key(7)
SHAPES = [(), (1,), (1000,), (30, 7), (2, 5, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_jax(shape):
    drawn = jax.jit(random_bits, static_argnums=1)(KEY, shape)
    np.testing.assert_array_equal(drawn, jax.random.bits(KEY, shape, jnp.uint32), strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_numbers_are_those_of_jax(shape, dtype):
    drawn = jax.jit(normal, static_argnums=(1, 2))(KEY, shape, dtype)
    expected = jax.jit(jax.random.normal, static_argnums=(1, 2))(KEY, shape, dtype)
    np.testing.assert_array_equal(drawn, expected, strict=True)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9, 1.0])
def test_bernoulli_is_true_as_often_as_it_says(p):
    n = 200_000
    drawn = bernoulli(KEY, p, (n,))
    assert abs(float(drawn.mean()) - p) <= 4 * np.sqrt(p * (1 - p) / n)


def test_keys_of_another_generator_draw_what_it_does():
    key = jax.random.key(7, impl="rbg")
    np.testing.assert_array_equal(random_bits(key, (5,)), jax.random.bits(key, (5,), jnp.uint32))


def test_more_numbers_than_the_counter_holds_are_left_to_jax():
    shape = 2**16, 2**17
    ours = jax.make_jaxpr(random_bits, static_argnums=1)(KEY, shape)
    assert str(ours) == str(
        jax.make_jaxpr(jax.random.bits, static_argnums=(1, 2))(KEY, shape, jnp.uint32)
    )
