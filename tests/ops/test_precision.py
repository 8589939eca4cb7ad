import jax.numpy as jnp
import pytest

from gptjax.ops.precision import accumulation_dtype


@pytest.mark.parametrize(
    ("dtype", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_sums_are_never_narrower_than_float32_nor_than_their_terms(dtype, wide):
    assert accumulation_dtype(jnp.zeros(1, dtype)) == wide
