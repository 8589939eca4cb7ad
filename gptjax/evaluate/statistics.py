"""Means with their standard errors."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    error: float | None
    """Standard error; None for a single observation."""

    def scaled(self, by: float) -> "Estimate":
        """The value and its error, multiplied by ``by``."""
        return Estimate(self.value * by, None if self.error is None else self.error * by)


def ratio(above: npt.ArrayLike, below: npt.ArrayLike) -> Estimate:
    """Ratio estimate sum a / sum b over n independent pairs (a, b); ``above`` and ``below`` are
    (n,).

    With r the ratio, its standard error is that of the mean of a - r b, over the mean of b
    (Cochran 1977, Sampling Techniques, 6.4):

        sqrt(sum (a - r b)^2 / (n - 1)) / (sqrt(n) mean b)

    If every b is 1, it is the sample's standard deviation over sqrt(n). Sums are in float64,
    pairwise.
    """
    a, b = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    value = float(a.sum() / b.sum())
    n = a.size
    if n < 2:
        return Estimate(value, None)
    return Estimate(value, float(np.sqrt(((a - value * b) ** 2).sum() / (n - 1) / n) / b.mean()))
