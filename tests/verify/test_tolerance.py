import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from gptjax.verify.tolerance import LAMBDA, gradient_variances, tolerance, unit_roundoff
from gptjax.xla.barrier import barrier, cpu_barrier
from tests.compare import normal, relative_l2

U = unit_roundoff(jnp.float32)
f32 = lambda *shape: jnp.ones(shape, jnp.float32)  # noqa: E731


def roundings(f, *args):
    """In units of u^2 of float32."""
    return gradient_variances(f, *args) / U**2


@pytest.mark.parametrize(
    ("dtype", "u"), [("float64", 2**-53), ("float32", 2**-24), ("bfloat16", 2**-8), ("int32", 0)]
)
def test_unit_roundoff(dtype, u):
    assert unit_roundoff(jnp.dtype(dtype)) == u


@pytest.mark.parametrize("wait", [barrier, cpu_barrier])
def test_what_only_orders_a_computation_does_not_count(wait):
    assert roundings(lambda x: wait(x.sum(), x), f32(3, 100)) == 0
    assert roundings(lambda x: wait(x, x.sum(0)), f32(3, 100)) == 3


def test_terms_of_sums_count_and_movement_does_not():
    assert roundings(lambda x, y: x @ y, f32(3, 100), f32(100, 2)) == 100
    assert roundings(lambda x: x.sum(), f32(3, 100)) == 300
    assert roundings(lambda x: x.sum(0), f32(3, 100)) == 3
    assert roundings(lambda x: -x.T[::-1].reshape(-1)[3:], f32(3, 100)) == 0
    assert roundings(lambda x: x * 3, f32(3)) == 1
    assert roundings(lambda x: jnp.cumsum(x), f32(7)) == 7
    assert (
        roundings(lambda x: jnp.zeros(3, jnp.float32).at[jnp.zeros(10, jnp.int32)].add(x), f32(10))
        == 10
    )


def test_the_longest_way_counts():
    assert roundings(lambda x: (x @ x).sum() + x[0, 0], f32(10, 10)) == 10 + 100 + 1


def test_sixteen_bits_are_summed_in_float32_and_rounded_once():
    x = jnp.ones((100, 100), jnp.bfloat16)
    assert gradient_variances(lambda x: x @ x, x) == pytest.approx(
        100 * U**2 + unit_roundoff(jnp.bfloat16) ** 2
    )
    assert gradient_variances(lambda x: x.astype(jnp.float32), x) == 0
    assert (
        gradient_variances(lambda x: x.astype(jnp.bfloat16), f32(3))
        == unit_roundoff(jnp.bfloat16) ** 2
    )


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_a_scan_counts_like_the_same_unrolled(length):
    w, shift = f32(length, 5, 5), jnp.arange(5.0, dtype=jnp.float32)  # the body's constant

    def scanned(x, w):
        return lax.scan(lambda x, w: (x @ w + shift, x.sum()), x, w)

    def unrolled(x, w):
        sums = []
        for layer in w:
            sums.append(x.sum())
            x = x @ layer + shift
        return x, sums[-1]

    assert gradient_variances(scanned, f32(2, 5), w) == gradient_variances(unrolled, f32(2, 5), w)


def test_a_choice_counts_as_its_longest_branch():
    def f(x):
        return lax.cond(x[0] > 0, lambda x: x.sum(), lambda x: x[0], x)

    assert roundings(f, f32(50)) == 50
    assert roundings(jax.jit(jax.checkpoint(lambda x: x.sum())), f32(50)) == 50
    assert roundings(lambda x: lax.while_loop(lambda c: c[0] > 0, lambda c: c * 2, x), f32(5)) == 1


@given(depth=st.integers(1, 6), width=st.sampled_from([8, 64, 256]))
def test_real_errors_stay_below_and_within_reach(depth, width):
    """A chain of random matrix products in float32: the bound holds, and is not so wide that it
    says nothing.
    """
    ws = [normal(i, width, width) / np.sqrt(width) for i in range(depth)]
    ws = [w.astype(jnp.float32) for w in ws]

    def chain(x, *ws):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x

    x = normal(9, 4, width).astype(jnp.float32)
    error = relative_l2(
        chain(x, *ws), chain(x.astype(jnp.float64), *(w.astype(jnp.float64) for w in ws))
    )
    bound = tolerance(gradient_variances(chain, x, *ws))
    assert error < bound < 300 * error


def test_tolerance_adds_variances():
    assert tolerance(9e-16, 16e-16) == pytest.approx(LAMBDA * 5e-8)
