import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.xla import products
from gptjax.xla.products import (
    accumulation_dtype,
    affine,
    contract,
    sum_of_outer_products,
    times_transpose,
)
from tests.compare import normal, relative_l2


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


AXES = {  # of a weight from inputs to outputs
    "one to one": ((6,), (10,)),
    "channels to heads": ((6,), (2, 5)),
    "heads to channels": ((2, 3), (10,)),
    "heads to heads": ((2, 3), (5, 2)),
}


FORMS = {
    "this machine's": (affine, times_transpose, sum_of_outer_products),
    "a TPU's": (products._affine, products._times_transpose, products._sum_of_outer_products),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("inputs", "outputs"), AXES.values(), ids=AXES)
def test_several_axes_count_as_one(inputs, outputs, form):
    """Against NumPy's products of matrices."""
    forward, to_input, to_weight = form
    x, w = normal(0, 4, 3, *inputs), normal(1, *inputs, *outputs)
    b, dy = normal(2, *outputs), normal(3, 4, 3, *outputs)
    xm, wm, bm, dym = (
        np.asarray(a).reshape(shape)
        for a, shape in zip((x, w, b, dy), ((12, 6), (6, 10), 10, (12, 10)), strict=True)
    )
    for ours, exact, like in (
        (forward(x, w), xm @ wm, dy),
        (forward(x, w, b), xm @ wm + bm, dy),
        (to_input(dy, w), dym @ wm.T, x),
        (to_weight(x, dy), xm.T @ dym, w),
    ):
        assert ours.shape == like.shape
        assert relative_l2(ours.reshape(exact.shape), exact) < 1e-14


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_a_tpu_keeps_heads_apart(platform):
    x, w = normal(0, 4, 3, 6), normal(1, 6, 2, 5)

    def all_three(x, w):
        y = affine(x, w)
        return times_transpose(y, w), sum_of_outer_products(x, y)

    text = jax.export.export(jax.jit(all_three), platforms=[platform])(x, w).mlir_module()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert ["6x2x5" in line for line in lines] == [platform == "tpu"] * 3
