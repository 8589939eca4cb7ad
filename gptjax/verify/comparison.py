"""Two gradients side by side: one row of errors for each tensor, or for each tensor and layer."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptjax.verify.tolerance import LAMBDA, unit_roundoff
from gptjax.verify.tolerance import tolerance as tolerance_of

DEEP = 1_000_000  # roundings on the way to a gradient, where nothing tells how many: GPT-2 124M has some 300,000


class Row(NamedTuple):
    """How far one tensor of a gradient is from the reference's."""

    tensor: str
    layer: int | None
    shape: tuple[int, ...]
    norm: float
    """The reference's L2 norm."""
    relative_l2: float
    """|ours - reference| / |reference|, L2 norms; 0 where both are all zero."""
    max_error: float | None
    """Largest |ours - reference| of an element, None where only the whole tensor was compared, as are the next three."""
    place: tuple[int, ...] | None
    """Where that element is; in a tensor of all layers, the layer comes first."""
    cosine: float | None
    """Cosine of the angle between the two."""
    ulps: float | None
    """max_error in units in the last place of the reference's largest element, in the checked dtype."""
    tolerance: float
    """Largest relative_l2 that rounding explains."""
    ratio: float | None = None
    """relative_l2 over that of JAX's gradient in the same 16-bit dtype."""
    ratio_tolerance: float | None = None

    @property
    def ok(self) -> bool:
        """Within tolerance; a number that is not finite never is."""
        return self.excess <= 1

    @property
    def excess(self) -> float:
        """The error, or the ratio to JAX's, in units of what is allowed, whichever is larger."""
        worst = _quotient(self.relative_l2, self.tolerance)
        return worst if self.ratio is None else float(np.maximum(worst, _quotient(self.ratio, self.ratio_tolerance or 1.0)))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One gradient against another; true if every row is within its tolerance."""

    rows: tuple[Row, ...]
    """One for each leaf: for each tensor and layer, where layers are entries of a sequence."""
    tensors: tuple[Row, ...]
    """One for each tensor, all its layers together."""

    def __bool__(self) -> bool:
        """Whether the gradients agree."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row furthest beyond its tolerance, or nearest to it."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.excess) else row.excess)

    def __str__(self) -> str:
        """A table with a line for each tensor."""
        return table(self.tensors)


def compare(ours: Any, reference: Any, tolerance: Any = None, autodiff: Any = None, dtype: Any = None) -> Comparison:
    """Compare two gradients leaf by leaf.

    Args:
        ours: any pytree of floating-point arrays. In 16 bits or more.
        reference: the same tree, in any dtype at least as precise.
        tolerance: largest relative L2 error, one number or a tree of one a leaf; by default what rounding explains
            after `DEEP` roundings in each of the two.
        autodiff: JAX's gradient in the precision of ``ours``, to judge 16-bit results by: ours may be no further from
            the reference than this one, but for the scatter of two random errors, which is taken to be that of norms of as
            many independent numbers as the last axis has.
        dtype: whose units in the last place the errors are told in; by default that of each leaf of ``ours``.

    Returns:
        A row for each leaf. The first index into a sequence on the way to a leaf is its layer, the rest its name.

    Raises:
        ValueError: the trees or the shapes differ; the message names the first leaf that does.

    """
    tree: Any = jax.tree.structure(ours)
    if jax.tree.structure(reference) != tree:
        raise ValueError(f"the gradients have different structures: {tree} and {jax.tree.structure(reference)}")
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(ours), strict=True)
    if tolerance is None or isinstance(tolerance, float):
        tolerance = jax.tree.map(lambda a, b: _default_tolerance(a, b) if tolerance is None else tolerance, ours, reference)
    rivals = [None] * len(leaves) if autodiff is None else jax.tree.leaves(autodiff)
    measured = [
        _measure(path, a, b, allowed, rival, dtype)
        for path, a, b, allowed, rival in zip(
            paths, leaves, jax.tree.leaves(reference), jax.tree.leaves(tolerance), rivals, strict=True
        )
    ]
    groups: dict[str, list[_Measured]] = {}
    for leaf in measured:
        groups.setdefault(leaf.tensor, []).append(leaf)
    return Comparison(tuple(map(_row, measured)), tuple(_row(_together(group)) for group in groups.values()))


def _default_tolerance(ours: Any, reference: Any) -> float:
    u, v = unit_roundoff(ours.dtype), unit_roundoff(reference.dtype)
    return tolerance_of(DEEP * u * u, DEEP * v * v)


class _Measured(NamedTuple):
    """Sums over the elements of a leaf, or of several: squares of L2 norms and products add up."""

    tensor: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: Any
    tolerance: float
    reference2: float
    ours2: float
    product: float
    error2: float
    autodiff_error2: float | None
    max_error: float
    place: tuple[int, ...]
    largest: float
    """The reference's largest element."""


@jax.jit
def _sums(ours: Array, reference: Array) -> tuple[Array, ...]:
    wide = jnp.promote_types(jnp.promote_types(ours.dtype, reference.dtype), jnp.float32)
    a, b = ours.astype(wide).ravel(), reference.astype(wide).ravel()
    error = jnp.abs(a - b)
    at = jnp.argmax(error)
    return jnp.vdot(b, b), jnp.vdot(a, a), jnp.vdot(a, b), jnp.vdot(error, error), error[at], at, jnp.abs(b).max()


def _measure(path: Any, ours: Any, reference: Any, tolerance: float, autodiff: Any, dtype: Any) -> _Measured:
    tensor, layer = tensor_and_layer(path)
    ours, reference = jnp.asarray(ours), jnp.asarray(reference)
    if ours.shape != reference.shape:
        raise ValueError(f"{tensor} has shape {ours.shape} in one gradient and {reference.shape} in the other")
    reference2, ours2, product, error2, max_error, at, largest = (x.item() for x in jax.device_get(_sums(ours, reference)))
    autodiff_error2 = None if autodiff is None else _sums(jnp.asarray(autodiff), reference)[3].item()
    place = tuple(int(i) for i in np.unravel_index(at, ours.shape))
    sums = reference2, ours2, product, error2, autodiff_error2, max_error, place, largest
    return _Measured(tensor, layer, ours.shape, dtype or ours.dtype, tolerance, *sums)


def _together(leaves: list[_Measured]) -> _Measured:
    """All layers of a tensor as one; the layer becomes the first index."""
    first = leaves[0]
    if len(leaves) == 1:
        return first
    worst = max(leaves, key=lambda leaf: math.inf if math.isnan(leaf.max_error) else leaf.max_error)
    rivals = [leaf.autodiff_error2 for leaf in leaves if leaf.autodiff_error2 is not None]
    return first._replace(
        layer=None,
        shape=(len(leaves), *first.shape),
        tolerance=max(leaf.tolerance for leaf in leaves),
        autodiff_error2=sum(rivals) if rivals else None,
        max_error=worst.max_error,
        place=(worst.layer or 0, *worst.place),
        largest=max(leaf.largest for leaf in leaves),
        **{name: sum(getattr(leaf, name) for leaf in leaves) for name in ("reference2", "ours2", "product", "error2")},
    )


def _row(m: _Measured) -> Row:
    norms = math.sqrt(m.reference2 * m.ours2)
    judged = m.autodiff_error2 is not None
    return Row(
        tensor=m.tensor,
        layer=m.layer,
        shape=m.shape,
        norm=math.sqrt(m.reference2),
        relative_l2=_quotient(math.sqrt(m.error2), math.sqrt(m.reference2)),
        max_error=m.max_error,
        place=m.place,
        cosine=m.product / norms if norms else float(m.reference2 == m.ours2),
        ulps=_quotient(m.max_error, ulp(m.largest, m.dtype)),
        tolerance=m.tolerance,
        ratio=_quotient(math.sqrt(m.error2), math.sqrt(m.autodiff_error2 or 0.0)) if judged else None,
        ratio_tolerance=1 + LAMBDA / math.sqrt(2 * (m.shape or (1,))[-1]) if judged else None,
    )


def _quotient(a: float, b: float) -> float:
    """A / b, where 0 / 0 is 0: nothing is wrong."""
    return a / b if b else 0.0 if a == 0 else math.nan if math.isnan(a) else math.inf


def ulp(x: float, dtype: Any) -> float:
    """The distance from |x| to the next larger number of ``dtype``; of 0, the smallest normal number."""
    info = jnp.finfo(dtype)
    return float(info.eps) * 2.0 ** math.floor(math.log2(abs(x))) if math.isfinite(x) and x else float(info.tiny)


def tensor_and_layer(path: Any) -> tuple[str, int | None]:
    """The name of a leaf without the first index into a sequence on the way to it, and that index."""
    at = next((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)), None)
    rest = path if at is None else path[:at] + path[at + 1 :]
    name = jax.tree_util.keystr(tuple(rest), simple=True, separator=".") or "value"
    return name, None if at is None else path[at].idx


def table(rows: Sequence[Row]) -> str:
    """Lines of text, a header first."""
    return aligned(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, a header first; columns that no row fills are left out."""
    columns = {
        "tensor": lambda r: r.tensor if r.layer is None else f"{r.tensor}[{r.layer}]",
        "shape": lambda r: "x".join(map(str, r.shape)) or "scalar",
        "norm": lambda r: f"{r.norm:.3e}",
        "rel L2": lambda r: f"{r.relative_l2:.1e}",
        "max abs": lambda r: None if r.max_error is None else f"{r.max_error:.1e}",
        "at": lambda r: None if r.place is None else ",".join(map(str, r.place)),
        "cosine": lambda r: None if r.cosine is None else f"{r.cosine:.10f}",
        "ulps": lambda r: None if r.ulps is None else f"{r.ulps:.2g}",
        "/ autodiff": lambda r: None if r.ratio is None else f"{r.ratio:.3f}",
        "allowed": lambda r: None if r.ratio_tolerance is None else f"{r.ratio_tolerance:.3f}",
        "tolerance": lambda r: f"{r.tolerance:.1e}",
        "": lambda r: "ok" if r.ok else "WRONG",
    }
    texts = {name: [f(row) for row in rows] for name, f in columns.items()}
    filled = {name: column for name, column in texts.items() if any(cell is not None for cell in column)}
    return [list(filled), *(["-" if c is None else c for c in line] for line in zip(*filled.values(), strict=True))]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(f(cell, width) for f, cell, width in zip(justify, line, widths, strict=True)).rstrip() for line in lines
    )
