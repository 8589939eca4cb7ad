import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.verify.finite_difference import (
    TOLERANCE,
    check_directions,
    directional,
    elementwise,
    extrapolate,
)
from tests.compare import normal, relative_l2


def test_extrapolation_removes_one_even_power_after_another():
    """Differences with errors in h^2, h^4 and h^6 only: four of them give the value exactly."""
    steps = [0.5 / 2**level for level in range(4)]
    value, error = extrapolate([7 + 3 * h**2 - 2 * h**4 + 5 * h**6 for h in steps])
    assert value == pytest.approx(7, abs=1e-14)
    assert error < 0.1


@pytest.mark.parametrize(
    ("f", "derivative"),
    [(jnp.exp, jnp.exp), (jnp.sin, jnp.cos), (jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2)],
)
def test_derivatives_of_known_functions(f, derivative):
    x = jnp.array([0.3, -1.2])
    found = directional(lambda x: f(x).sum(), x, jnp.array([1.0, 2.0]))
    expected = float(derivative(x) @ jnp.array([1.0, 2.0]))
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert abs(found.value - expected) <= 10 * found.error


def test_a_direction_of_none_stays():
    assert directional(
        lambda p: p["a"] * p["b"],
        {"a": jnp.array(2.0), "b": jnp.array(3.0)},
        {"a": jnp.array(1.0), "b": None},
    )[0] == pytest.approx(3)


def test_element_by_element():
    x, w, dy = normal(0, 3, 4), normal(1, 4, 2), normal(2, 3, 2)
    for found, exact in zip(
        elementwise(lambda x, w: jnp.tanh(x @ w), (x, w), dy), reference(x, w, dy), strict=True
    ):
        assert found.shape == exact.shape
        assert relative_l2(found, exact) < 1e-11


def reference(x, w, dy):
    slope = np.asarray(dy) * (1 - np.tanh(np.asarray(x) @ np.asarray(w)) ** 2)
    return slope @ np.asarray(w).T, np.asarray(x).T @ slope


PARAMS = {"w": tuple(normal(0, 2, 4, 3)), "b": normal(1, 3)}


def loss(p):
    x = normal(5, 6, 4)
    return sum(jnp.tanh(x @ w + p["b"]).sum() for w in p["w"]) * p["b"].sum()


def test_directions_over_all_tensors_then_each_tensor_and_layer():
    gradient = jax.grad(loss)(PARAMS)
    found = check_directions(loss, PARAMS, gradient)
    assert found
    assert [row.tensor for row in found.rows[3:]] == ["b", "w"]
    assert [row.shape for row in found.rows] == [(27,), (27,), (27,), (3,), (2, 4, 3)]
    by_layer = check_directions(loss, PARAMS, gradient, layers=True)
    assert [(row.tensor, row.layer) for row in by_layer.rows[3:]] == [
        ("b", None),
        ("w", 0),
        ("w", 1),
    ]
    assert max(row.relative_l2 for row in by_layer.rows) < 1e-9


@pytest.mark.parametrize("tensor", ["w", "b"])
def test_an_error_of_one_in_a_million_is_found_and_only_where_it_is(tensor):
    gradient = jax.grad(loss)(PARAMS)
    wrong = gradient | {tensor: jax.tree.map(lambda g: g * (1 + 1e-6), gradient[tensor])}
    found = check_directions(loss, PARAMS, wrong)
    assert {row.tensor: row.ok for row in found.rows[3:]} == {
        "w": tensor != "w",
        "b": tensor != "b",
    }


def test_a_gradient_of_zero_or_nan_is_found():
    for wrong in (jnp.zeros(3), jnp.full(3, jnp.nan)):
        assert not check_directions(loss, PARAMS, jax.grad(loss)(PARAMS) | {"b": wrong})


def test_a_difference_is_trusted_to_its_estimated_error():
    """A term that is rounded to float32 on the way: what is allowed is more, in that row alone."""
    f = lambda p: jnp.sin(p["rounded"].astype(jnp.float32)).sum() + jnp.sin(p["exact"]).sum()  # noqa: E731
    x = {"rounded": jnp.ones(50), "exact": jnp.ones(50)}
    rows = check_directions(f, x, jax.tree.map(jnp.cos, x)).rows[3:]
    assert {row.tensor: row.tolerance > TOLERANCE for row in rows} == {
        "rounded": True,
        "exact": False,
    }
    assert {row.tensor: row.relative_l2 > TOLERANCE for row in rows} == {
        "rounded": True,
        "exact": False,
    }
    assert all(row.ok for row in rows)


def test_tolerance_is_the_root_of_float64s_unit_roundoff():
    assert pytest.approx(2**-26.5) == TOLERANCE
