import pytest


@pytest.fixture(autouse=True)
def _strict(strict):
    """Ops, models and what they tell XLA are all ours."""
