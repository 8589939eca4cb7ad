import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.verify.exercises import matches

X = np.arange(6.0).reshape(2, 3)


def test_an_exercise_that_is_not_done_is_not_right():
    assert repr(matches(..., X, "dx")) == "dx  not done yet"
    verdict = matches((X, ...), (X, X), "dx, dw")
    assert not verdict
    assert repr(verdict).splitlines() == ["dx  right: relative error 0.0e+00", "dw  not done yet"]
    assert repr(matches(..., (X, X), "dx, db2")).splitlines() == [
        "dx   not done yet",
        "db2  not done yet",
    ]


def test_rounding_is_right_and_more_is_not():
    assert matches(X * (1 + 1e-9), X)
    assert not matches(X * (1 + 1e-7), X)
    assert matches(jnp.asarray(X * (1 + 1e-6), jnp.float32), X)
    assert not matches(jnp.asarray(X * (1 + 1e-3), jnp.float32), X)
    assert not matches(np.full_like(X, np.nan), X)
    assert matches(X.astype(int), X)
    assert matches(np.zeros(3), np.zeros(3))
    assert not matches(np.ones(3), np.zeros(3))


@pytest.mark.parametrize(
    ("answer", "remark"),
    [
        (-X, "it is -1 times what it should be"),
        (X / 2, "it is 0.5 times what it should be"),
        (X.T, "its shape is (3, 2), it should be (2, 3), transposed"),
        (X[0], "its shape is (3,), it should be (2, 3)"),
        (X + np.eye(2, 3)[::-1], "[0, 1] is 2, it should be 1"),
        ("x", "it should be numbers, not str"),
        (np.zeros((2, 3)), "[1, 2] is 0, it should be 5"),
    ],
)
def test_what_is_wrong_is_said(answer, remark):
    verdict = matches(answer, X)
    assert not verdict
    assert repr(verdict).startswith("answer  wrong: ")
    assert repr(verdict).endswith(remark)


def test_a_square_matrix_can_be_transposed():
    assert repr(matches(X.T @ X + np.eye(3, k=1), X.T @ X + np.eye(3, k=-1))).endswith(
        "it is transposed"
    )


def test_shapes_and_words_have_to_be_equal():
    assert matches((2, 3), X.shape, "shape")
    assert repr(matches((3, 2), X.shape, "shape")) == "shape  wrong: it is not (3, 2)"
    assert matches({"b", "a"}, {"a", "b"}, "names")
    assert not matches({"a"}, {"a", "b"}, "names")
    assert matches(((2,), (3,)), [(2,), (3,)], "first, second")


def test_a_wrong_number_of_results_is_said():
    assert repr(matches(X, (X, X), "dx, dw")) == "answer  wrong: it should be dx, dw"
