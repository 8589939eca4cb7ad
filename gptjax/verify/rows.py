"""The result of comparing two gradients, as rows of numbers and as text."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """The distance of one tensor of a gradient from the reference."""

    tensor: str
    layer: int | None
    shape: tuple[int, ...]
    norm: float
    """The reference's L2 norm."""
    relative_l2: float
    """|ours - reference| / |reference|, L2 norms; 0 if both are all zero. If the reference is zero
    up to rounding, the norm of the whole gradient replaces its own; see `gptjax.verify.compare`."""
    max_error: float | None
    """Largest |ours - reference| of an element. It and the next three are None if only the whole
    tensor was compared.
    """
    place: tuple[int, ...] | None
    """Index of that element, after the layer in a row for all layers."""
    cosine: float | None
    """Cosine of the angle between the two; like the ulps, None if the reference is zero up to
    rounding.
    """
    ulps: float | None
    """max_error in units in the last place of the reference's largest element, in the checked
    dtype.
    """
    tolerance: float
    """Largest relative_l2 that rounding explains."""
    ratio: float | None = None
    """relative_l2 divided by that of JAX's gradient in the same 16-bit dtype."""
    ratio_tolerance: float | None = None
    layers_ok: bool = True
    """In a row for all layers: whether each layer is within its tolerance."""

    @property
    def ok(self) -> bool:
        """Whether the errors are within their tolerances; a non-finite error never is."""
        return self.excess <= 1 and self.layers_ok

    @property
    def excess(self) -> float:
        """The error over its tolerance, or the ratio over its own, whichever is larger."""
        worst = quotient(self.relative_l2, self.tolerance)
        return (
            worst
            if self.ratio is None
            else float(np.maximum(worst, quotient(self.ratio, self.ratio_tolerance or 1.0)))
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of two gradients; true if every row is within its tolerance."""

    rows: tuple[Row, ...]
    """A row for each leaf, that is, for each tensor and layer."""
    tensors: tuple[Row, ...]
    """A row for each tensor, over all its layers."""

    def __bool__(self) -> bool:
        """Whether the gradients agree."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row whose error is largest relative to its tolerance."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.excess) else row.excess)

    def __str__(self) -> str:
        """A table with a line for each tensor."""
        return table(self.tensors)


def quotient(a: float, b: float) -> float:
    """``a / b``, with 0 / 0 = 0."""
    return a / b if b else 0.0 if a == 0 else math.nan if math.isnan(a) else math.inf


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text after a header."""
    return aligned(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells after a header; columns that no row fills are left out."""
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
    filled = {
        name: column for name, column in texts.items() if any(cell is not None for cell in column)
    }
    return [
        list(filled),
        *(["-" if c is None else c for c in line] for line in zip(*filled.values(), strict=True)),
    ]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The lines with padded columns: the first left-justified, the others right-justified."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(
            f(cell, width) for f, cell, width in zip(justify, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
