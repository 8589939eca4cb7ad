from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.verify import compare
from gptjax.verify.comparison import ulp
from tests.compare import normal


def test_what_a_row_tells():
    reference = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    (row,) = compare({"w": reference.at[1, 0].add(0.5)}, {"w": reference}).rows
    assert (row.tensor, row.layer, row.shape) == ("w", None, (2, 2))
    assert row.norm == 5
    assert row.relative_l2 == pytest.approx(0.1)
    assert (row.max_error, row.place) == (0.5, (1, 0))
    assert row.cosine == pytest.approx(25 / (5 * np.sqrt(25.25)))
    assert row.ulps == 0.5 / 2**-50  # of 4, in float64
    assert not row.ok


def test_equal_gradients_agree_exactly():
    found = compare([jnp.ones(3), jnp.zeros(2)], [jnp.ones(3), jnp.zeros(2)])
    assert found
    assert [row.relative_l2 for row in found.rows] == [0, 0]
    assert [row.cosine for row in found.rows] == [pytest.approx(1), None]


def test_layers_are_told_apart_and_put_together():
    """A tensor of L arrays has the row that one stacked array has, and one more for each layer."""
    ours, reference = normal(0, 3, 4, 5), normal(1, 3, 4, 5)
    found = compare({"a": tuple(ours), "b": ours[0]}, {"a": tuple(reference), "b": reference[0]})
    assert [(row.tensor, row.layer) for row in found.rows] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", None),
    ]
    stacked = compare({"a": ours}, {"a": reference}).rows[0]
    together, alone = found.tensors
    assert together.shape == stacked.shape
    assert together.place == stacked.place
    assert together[3:6] + together[7:10] == pytest.approx(stacked[3:6] + stacked[7:10], rel=1e-12)
    assert alone == found.rows[3]


def test_the_layer_is_the_first_index_of_a_sequence_on_the_way():
    tree = [{"attention": (jnp.ones(1), jnp.ones(2))}, {"attention": (jnp.ones(1), jnp.ones(2))}]
    names = [(row.tensor, row.layer) for row in compare(tree, tree).rows]
    assert names == [("attention.0", 0), ("attention.1", 0), ("attention.0", 1), ("attention.1", 1)]


def test_entries_of_different_shapes_are_no_layers():
    shapes = {"affine": (jnp.ones((2, 3)), jnp.ones(3)), "same": (jnp.ones(2), jnp.ones(2))}
    names = [(row.tensor, row.layer) for row in compare(shapes, shapes).rows]
    assert names == [("affine.0", None), ("affine.1", None), ("same", 0), ("same", 1)]
    # The entries of a tuple are what they are: weight and bias, say
    pair = (jnp.ones(3), jnp.ones(3))
    assert [(row.tensor, row.layer) for row in compare(pair, pair).rows] == [
        ("0", None),
        ("1", None),
    ]


class Block(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_a_layers_tensors_are_named_by_the_path_after_the_layer():
    """Where that tells them from all others: here w is also outside the layers."""
    blocks = tuple(Block(jnp.ones(2), jnp.ones(3)) for _ in range(2))
    names = [
        (row.tensor, row.layer)
        for row in compare(
            {"blocks": blocks, "w": jnp.ones(2)}, {"blocks": blocks, "w": jnp.ones(2)}
        ).rows
    ]
    assert names == [("blocks.w", 0), ("b", 0), ("blocks.w", 1), ("b", 1), ("w", None)]


@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_gradient_that_is_zero_up_to_rounding_is_judged_by_the_whole(size):
    """As of a bias that moves all scores of a softmax alike: what is left of it is rounding in
    both, and may differ wholly.
    """
    whole, noise = size * normal(0, 50), 1e-18 * size * normal(1, 5)
    reference, ours = {"w": whole, "b": noise}, {"w": whole, "b": -3 * noise}
    found = compare(ours, reference, 1e-14)
    assert found
    row = next(row for row in found.rows if row.tensor == "b")
    assert row.relative_l2 == pytest.approx(
        4 * float(jnp.linalg.norm(noise) / jnp.linalg.norm(jnp.concatenate([whole, noise])))
    )
    assert (row.cosine, row.ulps) == (None, None)
    assert not compare(ours | {"b": 1e-13 * whole[:5]}, reference, 1e-14)
    # B's, of noise to noise
    assert compare(ours, reference, 1e-14, {"w": whole * 1.01, "b": noise}).rows[0].ratio is None


def test_a_tensor_is_wrong_if_one_of_its_layers_is():
    """Also where the whole, in which the others are larger, is within its tolerance."""
    reference = (jnp.full(3, 1e6), jnp.full(3, 1.0))
    found = compare({"w": (reference[0], 1.01 * reference[1])}, {"w": reference}, 1e-6)
    assert [row.ok for row in found.rows] == [True, False]
    (together,) = found.tensors
    assert together.relative_l2 < 1e-7
    assert not together.ok
    assert "WRONG" in str(found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_that_the_dtype_does_not_hold_are_no_error(dtype, size):
    reference = (size * normal(0, 100)).astype(dtype)
    error = size * 1e-3 * jnp.ones(100, dtype)
    row = compare(reference + error, reference, 1.0).rows[0]
    assert row.relative_l2 == pytest.approx(1e-3 * 10 * size / row.norm, rel=1e-3)
    assert row.norm == pytest.approx(np.linalg.norm(np.float64(reference)), rel=1e-6)
    assert row.cosine == pytest.approx(1, abs=1e-5)
    assert not compare(reference + error, reference)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_wrong(bad):
    found = compare(
        {"a": jnp.array([1.0, bad]), "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": jnp.ones(1)}
    )
    assert not found
    assert found.worst.tensor == "a"
    assert found.worst.place == (1,)


def test_zero_against_nonzero_is_wrong_either_way():
    assert not compare([jnp.zeros(3)], [jnp.full(3, 1e-30)])
    assert not compare([jnp.full(3, 1e-30)], [jnp.zeros(3)])


@pytest.mark.parametrize(
    ("dtype", "seen", "unseen"), [(jnp.float64, 1e-11, 1e-14), (jnp.float32, 1e-3, 1e-6)]
)
def test_default_tolerance_follows_the_dtype(dtype, seen, unseen):
    x = normal(0, 50).astype(dtype)
    assert compare(x * (1 + dtype(unseen)), x)
    assert not compare(x * (1 + dtype(seen)), x)


def test_a_tolerance_may_be_given_for_all_or_for_each():
    ours, reference = (
        {"a": jnp.array([1.01]), "b": jnp.array([1.01])},
        {"a": jnp.ones(1), "b": jnp.ones(1)},
    )
    assert compare(ours, reference, 0.02)
    assert [row.ok for row in compare(ours, reference, {"a": 0.02, "b": 0.001}).rows] == [
        True,
        False,
    ]


def test_sixteen_bits_are_judged_by_autodiffs_distance():
    """Ours may be no further from the reference, but for scatter: of 10,000 numbers, 1 + 4 /
    sqrt(20,000).
    """
    reference, noise = normal(0, 10_000), normal(1, 10_000)
    rival = reference + 1e-3 * noise
    near, far = (
        compare(reference + size * noise, reference, 1.0, rival).rows[0]
        for size in (1.01e-3, 1.05e-3)
    )
    assert near.ratio == pytest.approx(1.01)
    assert near.ratio_tolerance == pytest.approx(1 + 4 / np.sqrt(20_000))
    assert near.ok
    assert not far.ok


def test_the_ratio_of_all_layers_is_that_of_the_whole():
    reference, noise = normal(0, 2, 50), normal(1, 2, 50)
    rival, ours = reference + noise, reference + noise * jnp.array([[1.0], [3.0]])
    whole = compare({"a": tuple(ours)}, {"a": tuple(reference)}, 1.0, {"a": tuple(rival)}).tensors[
        0
    ]
    assert whole.ratio == pytest.approx(
        float(jnp.linalg.norm(ours - reference) / jnp.linalg.norm(noise))
    )


def test_trees_that_do_not_match():
    with pytest.raises(ValueError, match="different structures"):
        compare({"a": jnp.ones(1)}, {"b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"b has shape \(2,\) in one gradient and \(3,\)"):
        compare({"b": jnp.ones(2)}, {"b": jnp.ones(3)})
    with pytest.raises(
        ValueError, match="b is int64 in one gradient and float64 in the other, not floating-point"
    ):
        compare({"b": jnp.ones(2, int)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, {})


def test_numbers_are_gradients_too():
    assert compare({"a": 1.0, "b": np.ones(2)}, {"a": 1.0, "b": jnp.ones(2)})
    assert not compare(1.0, 1.1)


@pytest.mark.parametrize("x", [1.0, 1.5, 4.0, 1e-30, 0.1])
def test_ulp_is_numpys_spacing(x):
    assert ulp(x, jnp.float64) == np.spacing(x)
    assert ulp(float(np.float32(x)), jnp.float32) == np.spacing(np.float32(x))


def test_any_dtype_of_ours_against_a_wider_reference():
    x = normal(0, 100)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), x)
    row = compare(rounded, x, dtype=jnp.bfloat16).rows[0]
    assert row.ok
    assert 1e-4 < row.relative_l2 < 4e-3
    assert row.ulps <= 0.5
