"""Cases of a parametrized test that are left out unless asked for, as with ``-m slow``."""

from collections.abc import Sequence
from typing import Any

import pytest


def slow(case: Sequence[Any]) -> Any:
    """The case, marked slow."""
    return pytest.param(*case, marks=pytest.mark.slow)
