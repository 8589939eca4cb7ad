"""Compare two gradients: one row of errors for each tensor, or for each tensor and layer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptjax.verify.rows import Comparison, Row, quotient
from gptjax.verify.tolerance import LAMBDA, unit_roundoff
from gptjax.verify.tolerance import tolerance as tolerance_of

# Roundings on the way to a gradient if their number is unknown; GPT-2 124M has some 300,000
DEEP = 1_000_000


def compare(
    ours: Any, reference: Any, tolerance: Any = None, autodiff: Any = None, dtype: Any = None
) -> Comparison:
    """Compare two gradients leaf by leaf.

    Args:
        ours: any pytree of floating-point arrays or numbers.
        reference: the same tree, in any dtype at least as precise.
        tolerance: largest relative L2 error, as one number or a tree with one for each leaf; by
            default what `DEEP` roundings in each gradient explain.
        autodiff: JAX's gradient in the precision of ``ours``, to judge 16-bit results: ours may be
            no further from the reference than this one, apart from the scatter of two random
            errors. That is taken as the scatter of norms of as many independent numbers as the
            last axis has.
        dtype: dtype whose units in the last place (ulps) measure the errors; by default each leaf's
            own in ``ours``.

    Returns:
        A row for each leaf, named by `leaf_names`. Errors are relative to the leaf's norm. A
        reference leaf smaller than the rounding of the whole gradient counts as zero, and its
        error is relative to the norm of the whole. The bias of attention's keys is such a leaf: it
        shifts all scores of a query alike, so its gradient is zero up to rounding.

    Raises:
        ValueError: the trees or shapes differ, a leaf is not floating-point (the message names the
            first one), or there is no leaf.

    """
    tree: Any = jax.tree.structure(ours)
    if jax.tree.structure(reference) != tree:
        raise ValueError(
            f"the gradients have different structures: {tree} and {jax.tree.structure(reference)}"
        )
    if not tree.num_leaves:
        raise ValueError("there is nothing to compare: the gradients have no arrays")
    ours, reference = jax.tree.map(jnp.asarray, (ours, reference))
    names, pairs = (
        leaf_names(ours),
        list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)),
    )
    for (tensor, _), (a, b) in zip(names, pairs, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{tensor} has shape {a.shape} in one gradient and {b.shape} in the other"
            )
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
            raise ValueError(
                f"{tensor} is {a.dtype} in one gradient and {b.dtype} in the other, not "
                "floating-point"
            )
    if tolerance is None or isinstance(tolerance, float):
        limits = [_default_tolerance(a, b) if tolerance is None else tolerance for a, b in pairs]
    else:
        limits = jax.tree.leaves(tolerance)
    rivals = [None] * len(pairs) if autodiff is None else jax.tree.leaves(autodiff)
    measured = [
        _measure(name, a, b, limit, rival, dtype)
        for name, (a, b), limit, rival in zip(names, pairs, limits, rivals, strict=True)
    ]
    groups: dict[str, list[_Measured]] = {}
    for leaf in measured:
        groups.setdefault(leaf.tensor, []).append(leaf)
    whole = math.hypot(*(leaf.reference for leaf in measured))
    rows = tuple(_row(leaf, whole) for leaf in measured)
    wrong = {row.tensor for row in rows if not row.ok and row.layer is not None}
    return Comparison(
        rows,
        tuple(_row(_together(group), whole, name not in wrong) for name, group in groups.items()),
    )


def _default_tolerance(ours: Any, reference: Any) -> float:
    u, v = unit_roundoff(ours.dtype), unit_roundoff(reference.dtype)
    return tolerance_of(DEEP * u * u, DEEP * v * v)


class _Measured(NamedTuple):
    """L2 norms and other sums over the elements of one leaf or of several."""

    tensor: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: Any
    tolerance: float
    reference: float
    ours: float
    product: float
    error: float
    autodiff_error: float | None
    max_error: float
    place: tuple[int, ...]
    largest: float
    """The reference's largest element."""
    unit: float
    """The unit roundoff of the reference."""


class _Sums(NamedTuple):
    """Sums over two arrays. Squared L2 norms come with a power of two as their unit, so that none
    under- or overflows.
    """

    reference: tuple[Array, Array]
    ours: tuple[Array, Array]
    product: Array
    error: tuple[Array, Array]
    max_error: Array
    at: Array
    largest: Array


@jax.jit
def _sums(ours: Array, reference: Array) -> _Sums:
    wide = jnp.promote_types(jnp.promote_types(ours.dtype, reference.dtype), jnp.float32)
    a, b = ours.astype(wide).ravel(), reference.astype(wide).ravel()
    error = jnp.abs(a - b)
    at = jnp.argmax(error)
    (a, a_unit), (b, b_unit), (e, e_unit) = map(_in_units, (a, b, error))
    squares = (
        (jnp.vdot(b, b), b_unit),
        (jnp.vdot(a, a), a_unit),
        jnp.vdot(a, b),
        (jnp.vdot(e, e), e_unit),
    )
    return _Sums(*squares, error[at], at, jnp.abs(b).max() * b_unit)


def _in_units(x: Array) -> tuple[Array, Array]:
    """``x`` divided by a power of two near its largest element, and that power."""
    info = jnp.finfo(x.dtype)
    exponent = jnp.clip(jnp.frexp(jnp.abs(x).max())[1], info.minexp, info.maxexp - 1)
    unit = jnp.ldexp(jnp.ones((), x.dtype), exponent)
    return x / unit, unit


def _measure(
    name: tuple[str, int | None],
    ours: Array,
    reference: Array,
    tolerance: float,
    autodiff: Any,
    dtype: Any,
) -> _Measured:
    def norm(square: Any, unit: Any) -> float:
        return math.sqrt(square) * float(unit)

    sums = jax.device_get(_sums(ours, reference))
    product = float(sums.product) * float(sums.reference[1]) * float(sums.ours[1])
    rival = (
        None
        if autodiff is None
        else norm(*jax.device_get(_sums(jnp.asarray(autodiff), reference).error))
    )
    return _Measured(
        *name,
        ours.shape,
        dtype or ours.dtype,
        tolerance,
        reference=norm(*sums.reference),
        ours=norm(*sums.ours),
        product=product,
        error=norm(*sums.error),
        autodiff_error=rival,
        max_error=float(sums.max_error),
        place=tuple(int(i) for i in np.unravel_index(sums.at, ours.shape)),
        largest=float(sums.largest),
        unit=unit_roundoff(reference.dtype),
    )


def _together(leaves: list[_Measured]) -> _Measured:
    """Merge all layers of a tensor; the layer becomes the first index."""
    first = leaves[0]
    if len(leaves) == 1:
        return first
    worst = max(leaves, key=lambda leaf: math.inf if math.isnan(leaf.max_error) else leaf.max_error)
    rivals = [leaf.autodiff_error for leaf in leaves if leaf.autodiff_error is not None]
    return first._replace(
        layer=None,
        shape=(len(leaves), *first.shape),
        tolerance=max(leaf.tolerance for leaf in leaves),
        product=sum(leaf.product for leaf in leaves),
        autodiff_error=math.hypot(*rivals) if rivals else None,
        max_error=worst.max_error,
        place=(worst.layer or 0, *worst.place),
        largest=max(leaf.largest for leaf in leaves),
        reference=math.hypot(*(leaf.reference for leaf in leaves)),
        ours=math.hypot(*(leaf.ours for leaf in leaves)),
        error=math.hypot(*(leaf.error for leaf in leaves)),
    )


def _row(m: _Measured, whole: float, layers_ok: bool = True) -> Row:
    norms = m.reference * m.ours
    zero = m.reference <= m.unit * whole  # up to rounding
    rival = None if zero else m.autodiff_error
    return Row(
        tensor=m.tensor,
        layer=m.layer,
        shape=m.shape,
        norm=m.reference,
        relative_l2=quotient(m.error, whole if zero else m.reference),
        max_error=m.max_error,
        place=m.place,
        cosine=None if zero else m.product / norms if norms else float(m.reference == m.ours),
        ulps=None if zero else quotient(m.max_error, ulp(m.largest, m.dtype)),
        tolerance=m.tolerance,
        ratio=None if rival is None else quotient(m.error, rival),
        ratio_tolerance=None
        if rival is None
        else 1 + LAMBDA / math.sqrt(2 * (m.shape or (1,))[-1]),
        layers_ok=layers_ok,
    )


def ulp(x: float, dtype: Any) -> float:
    """The distance from |x| to the next larger number in ``dtype``; for 0, the smallest normal
    number.
    """
    info = jnp.finfo(dtype)
    return (
        float(info.eps) * 2.0 ** math.floor(math.log2(abs(x)))
        if math.isfinite(x) and x
        else float(info.tiny)
    )


def leaf_names(tree: Any) -> list[tuple[str, int | None]]:
    """The (tensor, layer) of each leaf.

    The first sequence index in a leaf's path is its layer, if the leaves at that place have the
    same shape in all layers. The tensor's name is then the path after the layer if that is unique,
    else the whole path without the index. Without layers, and for entries of a plain tuple or list,
    the index is part of the name.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    layers = [_layer(path) for path in paths]
    shapes: dict[str, set[Any]] = {}
    for path, at, leaf in zip(paths, layers, leaves, strict=True):
        shapes.setdefault(_tensor(path, at), set()).add(jnp.shape(leaf))
    layers = [
        at if len(path) > 1 and len(shapes[_tensor(path, at)]) == 1 else None
        for path, at in zip(paths, layers, strict=True)
    ]
    full = [_tensor(path, at) for path, at in zip(paths, layers, strict=True)]
    short = [
        name if at is None or at + 1 == len(path) else _joined(path[at + 1 :])
        for name, path, at in zip(full, paths, layers, strict=True)
    ]
    meant: dict[str, set[str]] = {}
    for name, whole in zip(short, full, strict=True):
        meant.setdefault(name, set()).add(whole)
    return [
        (name if len(meant[name]) == 1 else whole, None if at is None else path[at].idx)
        for name, whole, path, at in zip(short, full, paths, layers, strict=True)
    ]


def _layer(path: Any) -> int | None:
    """The position of the first sequence index in a path."""
    return next(
        (i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)), None
    )


def _tensor(path: Any, at: int | None) -> str:
    return _joined(path if at is None else path[:at] + path[at + 1 :])


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".") or "value"
