"""How many faults each test tries.

``pytest tests/faults`` tries a few of each kind and ends with a table of (tried, held).
``GPTJAX_FAULTS=15 pytest tests/faults`` tries 15 times as many.
"""

import os

FACTOR = int(os.environ.get("GPTJAX_FAULTS", "1"))


def trials(few: int) -> int:
    """The number of trials of a kind of which ``few`` are enough for every run of the tests."""
    return few * FACTOR
