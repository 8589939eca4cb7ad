"""The library form: anybody's function, anybody's gradient."""

import math

import jax
import jax.numpy as jnp
import pytest

from gptjax.verify import check
from tests.compare import FLOAT64_TOLERANCE, normal

X, LABELS = normal(0, 20, 4), jax.nn.one_hot(jnp.arange(20) % 3, 3)


@jax.jit
def affine_fwd(x, w, b):
    return x @ w + jnp.broadcast_to(b, (20, 3)), x


@jax.jit
def affine_bwd(x, w, dy):
    return dy @ w.T, x.T @ dy, dy.sum(0)


@jax.jit
def softmax_loss_fwd(y, labels):
    p = jax.nn.log_softmax(y)
    return -(labels * p).sum() / 20, p


@jax.jit
def softmax_loss_bwd(p, labels):
    return (jnp.exp(p) - labels) / 20


def loss(params, x, labels):
    """A linear classifier, which is not GPT-2."""
    return softmax_loss_fwd(affine_fwd(x, params["w"], params["b"])[0], labels)[0]


def loss_and_grad(params, x, labels, affine_bwd=affine_bwd):
    y, saved = affine_fwd(x, params["w"], params["b"])
    value, p = softmax_loss_fwd(y, labels)
    _, dw, db = affine_bwd(saved, params["w"], softmax_loss_bwd(p, labels))
    return value, {"w": dw, "b": db}


PARAMS = {"w": normal(1, 4, 3), "b": normal(2, 3)}


def wrong(*args):
    return loss_and_grad(
        *args, affine_bwd=jax.jit(lambda x, w, dy: (dy @ w.T, x.T @ dy, dy[0]), inline=True)
    )


@pytest.mark.parametrize("reference", ["autodiff", "finite-difference"])
def test_a_right_gradient(reference):
    report = check(loss, loss_and_grad, PARAMS, X, LABELS, reference=reference)
    assert report
    assert report.mismatch is None
    assert report.forward
    assert (
        report.gradient.worst.relative_l2
        < {"autodiff": FLOAT64_TOLERANCE, "finite-difference": 1e-9}[reference]
    )
    assert report.closing.startswith(
        f"all {len(report.gradient.rows)} gradients agree with {reference}: the worst, "
    )


@pytest.mark.parametrize("reference", ["autodiff", "finite-difference"])
def test_a_wrong_gradient(reference):
    report = check(loss, wrong, PARAMS, X, LABELS, reference=reference)
    assert not report
    assert {row.tensor: row.ok for row in report.gradient.rows[-2:]} == {"w": True, "b": False}


def test_the_wrong_op_is_named():
    def affine_bwd(x, w, dy):
        return dy @ w.T, x.T @ dy, dy[0]

    report = check(
        loss, lambda *a: loss_and_grad(*a, affine_bwd=jax.jit(affine_bwd)), PARAMS, X, LABELS
    )
    assert report.mismatch.place == "affine (w)"
    assert "first at affine (w): affine_bwd gives a wrong gradient" in report.closing
    assert str(report).endswith(report.closing)


def test_a_wrong_loss_beside_a_right_gradient():
    report = check(
        loss, lambda *a: (loss(*a) * (1 + 1e-9), loss_and_grad(*a)[1]), PARAMS, X, LABELS
    )
    assert not report
    assert report.gradient
    assert report.closing == "THE FORWARD IS WRONG, though the gradients agree with autodiff"


def test_a_given_error_bound():
    slightly = lambda *a: jax.tree.map(lambda x: x * (1 + 1e-6), loss_and_grad(*a))  # noqa: E731
    assert not check(loss, slightly, PARAMS, X, LABELS)
    assert check(loss, slightly, PARAMS, X, LABELS, largest_error=1e-5)


def test_a_bound_of_zero_is_one_and_holds_for_differences_too():
    assert not check(loss, loss_and_grad, PARAMS, X, LABELS, largest_error=0.0)
    slightly = lambda *a: jax.tree.map(lambda x: x * (1 + 1e-7), loss_and_grad(*a))  # noqa: E731
    found = {
        bound: check(
            loss, slightly, PARAMS, X, LABELS, reference="finite-difference", largest_error=bound
        )
        for bound in (None, 1e-6)
    }
    assert not found[None].gradient
    assert found[1e-6].gradient


def test_results_of_another_form_are_named():
    value = X.sum()
    for wrong, message in (
        (lambda w: jnp.ones_like(w), "must return the pair .loss, gradient., not Array"),
        (lambda w: {"loss": value, "dw": w}, "must return the pair .loss, gradient., not dict"),
        (lambda w: (w, w), "the loss must be one number, not an array of "),
        (lambda w: (value, [w]), "the gradient, a list of .*, is not built like the parameters"),
        (lambda w: (value, w.T), "the gradient of value has shape .*, its parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            check(lambda w: jnp.sin(w).sum(), wrong, X)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the loss must be one number, not an array of shape"):
        check(jnp.sin, lambda w: (jnp.sin(w).sum(), jnp.cos(w)), X)


def test_an_unknown_reference():
    with pytest.raises(ValueError, match="must be one of autodiff, finite-difference, not torch"):
        check(loss, loss_and_grad, PARAMS, X, LABELS, reference="torch")


def test_without_named_ops_only_the_tensor_is_named():
    report = check(lambda w: jnp.sin(w).sum(), lambda w: (jnp.sin(w).sum(), 2 * jnp.cos(w)), X)
    assert str(report.mismatch).startswith("gradient of value: wrong, in an op that is not named ")


def test_float32_is_held_to_float32():
    args = jax.tree.map(lambda x: x.astype(jnp.float32), (PARAMS, X, LABELS))
    report = check(loss, loss_and_grad, *args)
    assert report
    assert 1e-7 < report.gradient.rows[0].tolerance < 1e-4
    with pytest.raises(ValueError, match="differences need float64"):
        check(loss, loss_and_grad, *args, reference="finite-difference")


def test_a_gradient_of_another_shape():
    with pytest.raises(
        ValueError, match="a dict of w, is not built like the parameters, a dict of b, w"
    ):
        check(loss, lambda *a: (loss(*a), {"w": a[0]["w"]}), PARAMS, X, LABELS)


def test_nan_is_wrong():
    report = check(
        loss, lambda *a: (loss(*a), jax.tree.map(lambda x: x * math.nan, a[0])), PARAMS, X, LABELS
    )
    assert not report
    assert "2 OF 2 GRADIENTS ARE WRONG" in report.closing
