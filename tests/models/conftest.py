import pytest


@pytest.fixture(autouse=True)
def _strict(strict):
    """Ops and models are all ours."""
