"""Groups of query heads that share a head of keys and values (Ainslie et al. 2023,
arXiv:2305.13245).
"""

from jaxtyping import Array, Shaped

Heads = Shaped[Array, "B T H D"]
Rows = Shaped[Array, "B R K D"]


def rows_of_groups(x: Heads, K: int) -> Rows:
    """Reshape H query heads to K heads with R = T G rows, so that the G heads that share keys and
    values become rows of one head. The G rows of a position are adjacent.
    """
    B, T, H, D = x.shape
    return x.reshape(B, T, K, H // K, D).swapaxes(2, 3).reshape(B, -1, K, D)


def heads_of_rows(x: Rows, H: int) -> Heads:
    """Undo `rows_of_groups`."""
    B, _, K, D = x.shape
    return x.reshape(B, -1, H // K, K, D).swapaxes(2, 3).reshape(B, -1, H, D)
