import jax
import jax.numpy as jnp
import pytest

from gptjax import ops as package
from gptjax.verify import ops
from gptjax.verify.ops import OpError


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_op_is_right_in_every_precision(dtype):
    rows = [ops.op_against_autodiff(case, dtype) for case in ops.op_cases()]
    assert all(row.ok for row in rows)
    assert (
        max(row.relative_l2 for row in rows)
        > {"float64": 0, "float32": 1e-9, "bfloat16": 1e-4}[dtype]
    )


def test_every_op_agrees_with_differences_of_its_forward():
    errors = [ops.op_against_differences(case).relative_l2 for case in ops.op_cases()]
    assert max(errors) < 1e-11


def test_both_comparisons_find_a_wrong_op(monkeypatch):
    right = package.gelu_bwd
    monkeypatch.setattr(package, "gelu_bwd", lambda saved, dy: right(saved, dy) * (1 + 1e-7))
    gelu = next(case for case in ops.op_cases() if case.name == "gelu")
    assert ops.op_against_autodiff(gelu).relative_l2 == pytest.approx(1e-7)
    assert ops.op_against_differences(gelu).relative_l2 == pytest.approx(1e-7, rel=1e-3)
    error = ops.check_op(gelu)
    assert not error.ok
    assert ops.ops_table([error]).splitlines()[1].endswith("WRONG")


def test_a_verdict_needs_both():
    assert OpError("x", 1.0, 1.0, 1.0, 1.0).ok
    assert not OpError("x", 1.1, 1.0, 1.0, 1.0).ok
    assert not OpError("x", 1.0, 1.0, 1.1, 1.0).ok
    assert not OpError("x", float("nan"), 1.0, 1.0, 1.0).ok


def test_every_pair_of_the_package_is_among_the_cases():
    pairs = {
        name.removesuffix("_bwd").replace("_", "-")
        for name in package.__all__
        if name.endswith("_bwd")
    }
    assert pairs == {case.name.split()[0] for case in ops.op_cases()}


def test_arguments_are_exact_in_every_dtype():
    for x in ops._arguments(ops.op_cases()[1])[0]:
        assert (x.astype(jnp.bfloat16).astype(jnp.float64) == x).all()
        assert x.dtype == jax.dtypes.canonicalize_dtype(jnp.float64)
