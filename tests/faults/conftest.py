"""The tally that every test here ends with."""

from collections.abc import Callable

import pytest


@pytest.fixture
def tally(record_property) -> Callable[[str, int, int], None]:
    """``tally(kind, tried, held)`` adds a row to the table at the end of the run, and fails unless
    all held.
    """

    def count(kind: str, tried: int, held: int) -> None:
        record_property("fault", [kind, tried, held])
        assert held == tried, f"{kind}: {held} of {tried} held"

    return count
