import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.xla.products import accumulation_dtype, contract
from tests.compare import normal


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_sums_are_never_narrower_than_float32_nor_than_their_terms(dtype, wide):
    assert accumulation_dtype(jnp.zeros(1, dtype)) == wide


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_product_is_rounded_once(dtype):
    """512 terms that a 16-bit sum would lose its way in; their products are exact in float64."""
    x, y = normal(0, 3, 512).astype(dtype), normal(1, 512, 4).astype(dtype)
    z = contract("nk,km->nm", x, y)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    assert z.dtype == x.dtype
    wide = jnp.finfo(accumulation_dtype(x)).eps
    np.testing.assert_allclose(
        np.asarray(z, np.float64), exact, rtol=jnp.finfo(dtype).eps / 2, atol=512 * wide
    )


def test_on_cpu_16_bit_products_have_float32_results():
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    product = jax.jit(lambda x, y: contract("nk,km->nm", x, y))
    kinds = {}
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(product, platforms=[platform])(x, x).mlir_module()
        (line,) = (line for line in text.splitlines() if "stablehlo.dot_general" in line)
        kinds[platform] = line.rpartition("x")[2].split(">")[0]
    assert kinds == {"cpu": "f32", "cuda": "bf16", "tpu": "bf16"}
