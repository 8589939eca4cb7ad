import jax
import numpy as np
import pytest

from gptjax.xla.norms import SMALL, _in_one_sum, global_norm
from tests.compare import normal


@pytest.mark.parametrize("norm", [global_norm, _in_one_sum])
def test_the_norm_is_that_of_all_elements(norm):
    tree = [normal(0, 7), {"matrix": normal(1, 3, SMALL), "heads": normal(2, SMALL // 4, 2, 4)}]
    elements = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    np.testing.assert_allclose(jax.jit(norm)(tree), np.linalg.norm(elements), rtol=1e-12)
