import math

import jax.numpy as jnp
import pytest

from gptjax.verify import Comparison, Row, compare
from gptjax.verify.rows import quotient


def row(error, **changes):
    return Row("w", None, (2,), 1.0, error, None, None, None, None, 1e-3)._replace(**changes)


def test_a_row_is_right_within_its_tolerance_and_within_its_ratio():
    assert row(1e-3).ok
    assert not row(1.1e-3).ok
    assert not row(math.nan).ok
    assert row(1e-4, ratio=1.1, ratio_tolerance=1.1).ok
    assert not row(1e-4, ratio=1.2, ratio_tolerance=1.1).ok
    assert not row(1e-4, ratio=math.nan, ratio_tolerance=1.1).ok
    assert not row(1e-4, layers_ok=False).ok


def test_the_worst_is_furthest_beyond_what_it_is_allowed():
    strict, loose, lost = row(1e-4, tolerance=1e-5), row(1e-2, tolerance=1.0), row(math.nan)
    assert Comparison((loose, strict), ()).worst is strict
    assert Comparison((loose, lost, strict), ()).worst is lost
    assert not Comparison((loose, strict), ())
    assert Comparison((loose,), ())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, math.inf), (math.nan, 0.0, math.nan)],
)
def test_nothing_of_nothing_is_nothing_wrong(a, b, expected):
    assert quotient(a, b) == pytest.approx(expected, nan_ok=True)


def test_the_table_leaves_out_what_was_not_measured():
    text = str(compare({"w": jnp.ones((2, 3))}, {"w": jnp.ones((2, 3))}))
    head, line = text.splitlines()
    assert head.split() == [
        "tensor",
        "shape",
        "norm",
        "rel",
        "L2",
        "max",
        "abs",
        "at",
        "cosine",
        "ulps",
        "tolerance",
    ]
    assert line.split()[:2] == ["w", "2x3"]
    assert line.endswith("ok")
    assert "WRONG" in str(compare(jnp.ones(1), 2 * jnp.ones(1)))
