"""How tests compare gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT64_TOLERANCE = 1e-12  # relative L2, every leaf


def relative_l2(ours: Any, reference: Any) -> float:
    """|ours - reference| / |reference| in float64; the absolute error where the reference is (all
    but) zero.
    """
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(ours - reference)) / (norm if norm > 1e-10 else 1.0)


def assert_same_sums(ours: Any, reference: Any, terms: Any) -> None:
    """Both are sums of ``terms`` over the last axis, added in any order, with or without fused
    multiply-adds.

    A sum of n rounded terms lies within n eps / 2 of sum |terms| of the exact one (Higham 2002,
    section 3.1), so two lie within n eps. Relative to the sum itself there is no bound, because
    terms cancel.
    """
    terms = np.asarray(terms)
    bound = terms.shape[-1] * np.finfo(terms.dtype).eps * np.abs(terms).sum(-1)
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape == bound.shape
    assert (np.abs(ours - reference) <= bound).all()


def assert_same_gradients(
    ours: Any, reference: Any, like: Any, tolerance: float = FLOAT64_TOLERANCE
) -> None:
    """Every leaf has the shape and dtype of ``like``'s (the parameter) and lies within
    ``tolerance`` of the reference.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(reference) == jax.tree.structure(like)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree.leaves(reference),
        jax.tree.leaves(like),
        strict=True,
    )
    for (path, mine), theirs, parameter in leaves:
        name = jax.tree_util.keystr(path)
        assert mine.shape == parameter.shape, name
        assert mine.dtype == parameter.dtype, name
        assert relative_l2(mine, theirs) <= tolerance, name


def vjp_of(f: Callable[..., Any], *primals: Any, dy: Any) -> Any:
    """JAX's own gradient of ``f`` at ``primals`` for the output gradient ``dy``."""
    return jax.vjp(f, *primals)[1](dy)


def normal(seed: int, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    """Standard normal numbers. NumPy's: `jax.random` compiles a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))
