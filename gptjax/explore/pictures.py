"""Arrays as small pictures: 8 bits a cell, to be drawn by the page."""

import base64
import math
from typing import Any, NamedTuple

import numpy as np

MOST_ROWS, MOST_COLUMNS = 64, 128
STEPS = 127


class Picture(NamedTuple):
    """An array as the page draws it."""

    rows: int
    columns: int
    cells: str
    """Base64 of ``rows`` x ``columns`` signed bytes, where `STEPS` stands for ``largest``."""
    largest: float
    shape: tuple[int, ...]
    """Shape of the array."""
    norm: float


def picture(array: Any) -> Picture:
    """A picture of an array: its first axes are the rows, its last ones the columns.

    An array of more than two axes, such as a weight of all heads, is split where the two sides are
    nearest in size. If there are more than `MOST_ROWS` rows or `MOST_COLUMNS` columns, each cell
    stands for a group of values and shows the one of largest magnitude.
    """
    x = np.asarray(array, np.float64)
    grid = _shrunk(_shrunk(x.reshape(_rows(x.shape), -1), MOST_ROWS, 0), MOST_COLUMNS, 1)
    grid = np.where(np.isfinite(grid), grid, 0)
    # A quantile, because with the maximum one outlier would leave the rest blank.
    largest = float(np.quantile(np.abs(grid), 0.995)) or float(np.abs(grid).max())
    scaled = grid / largest * STEPS if largest else grid
    cells = np.clip(np.round(scaled), -STEPS, STEPS).astype(np.int8)
    rows, columns = cells.shape
    return Picture(
        rows,
        columns,
        base64.b64encode(cells.tobytes()).decode(),
        largest,
        x.shape,
        float(np.linalg.norm(x)),
    )


def _rows(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 1
    splits = [math.prod(shape[:i]) for i in range(1, len(shape))]
    return min(splits, key=lambda rows: abs(math.log(rows * rows / math.prod(shape))))


def _shrunk(x: np.ndarray, most: int, axis: int) -> np.ndarray:
    """At most ``most`` entries along an axis, each the one of largest magnitude of a group."""
    size = x.shape[axis]
    group = -(-size // most)
    if group == 1:
        return x
    x = np.moveaxis(x, axis, 0)
    x = np.concatenate([x, np.zeros((-size % group, *x.shape[1:]))])
    x = x.reshape(-1, group, *x.shape[1:])
    at = np.abs(x).argmax(1)[:, None]
    return np.moveaxis(np.take_along_axis(x, at, 1)[:, 0], 0, axis)
