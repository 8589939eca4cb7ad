import numpy as np
import pytest

from gptjax.ops.heads import heads_of_rows, rows_of_groups
from tests.compare import normal


@pytest.mark.parametrize("K", [1, 2, 6])
def test_a_groups_heads_are_rows_of_its_key_head(K):
    x = normal(0, 2, 5, 6, 4)
    rows, G = rows_of_groups(x, K), 6 // K
    assert rows.shape == (2, 5 * G, K, 4)
    for t in range(5):
        for h in range(6):
            np.testing.assert_array_equal(rows[:, t * G + h % G, h // G], x[:, t, h])
    np.testing.assert_array_equal(heads_of_rows(rows, 6), x)
