"""Stored weights: how exactly blocks hold them, and every kernel against the product in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError
from gptjax.ops import quantized
from gptjax.ops.linear import linear_fwd
from gptjax.ops.quantized import (
    BLOCK,
    Blocks,
    OutIn,
    _dequantized_products,
    dequantize,
    product,
    products,
    quantize,
    quantized_linears,
    rounded,
    table_rows,
)
from gptjax.ops.stacks import InStack
from gptjax.xla import native
from tests.compare import assert_same_sums, normal

KINDS = ("q8_0", "q4_0", "q4_1")
X = jax.random.normal(jax.random.key(0), (3, 77), jnp.float32)
W = jax.random.normal(jax.random.key(1), (13, 77), jnp.float32)
TERMS = X[:, None] * W[None]  # of X @ W.T
HALF = 2.0**-11  # relative rounding error of half precision
SMALLEST_HALF = 2.0**-25  # absolute rounding error of its smallest numbers
QUANTIZE = jax.jit(quantize, static_argnames=("kind", "inputs"))
PRODUCT = jax.jit(product)

# Sizes with and without tails of panels (8), blocks (32) and vectors (16)
SIZES = [(1, 1), (9, 33), (24, 96), (33, 300)]
ROWS = {"native": [*range(1, 18), 40], "XLA": [1, 5]}
# (rows, outputs, inputs): matrices that are shared out in several pieces, with an odd number of
# panels; more rows than stay in a core's cache
LARGE = [(1, 137, 1100), (6, 137, 1100), (50, 9, 3100)]


def exact(w: Blocks) -> np.ndarray:
    """The stored weight in float64, (O, I)."""
    return np.asarray(dequantize(w), np.float64).reshape(math.prod(w.outputs), -1)


def in_blocks(a) -> np.ndarray:
    """(..., I) -> (..., N, 32), with zeros at the end."""
    a = np.asarray(a, np.float64)
    padded = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % BLOCK)])
    return padded.reshape(*a.shape[:-1], -1, BLOCK)


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


# --- Blocks ---


def most(w, kind) -> np.ndarray:
    """The furthest that `quantize` may move each weight, from the scale of its block."""
    blocks = in_blocks(w)
    size = np.abs(blocks).max(-1, keepdims=True)
    steps, scale = {
        "q8_0": (127, size / 127),
        "q4_0": (8, size / 8),
        "q4_1": (15, np.ptp(blocks, -1, keepdims=True) / 15),
    }[kind]
    # Half a step, and what rounding does to the scale: in q4_0 the largest may be cut off, which
    # then is a whole step away
    step = scale if kind == "q4_0" else scale / 2
    minimum = size * HALF + SMALLEST_HALF if kind == "q4_1" else 0
    bound = step + steps * (scale * HALF + SMALLEST_HALF) + minimum
    return bound.repeat(BLOCK, -1).reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.floats(1e-7, 1e4), seed=st.integers(0, 99))
def test_the_error_of_each_weight_is_bounded_by_its_scale(kind, size, seed):
    w = (size * np.random.default_rng(seed).normal(size=(13, 77))).astype(np.float32)
    assert (np.abs(exact(QUANTIZE(w, kind)) - w) <= 1.0001 * most(w, kind)).all()


def test_the_error_of_normal_weights_is_as_expected():
    """A uniform error in one step of the grid has the standard deviation step / sqrt(12)."""
    w = normal(2, 64, 4096).astype(jnp.float32)
    errors = {kind: relative(exact(QUANTIZE(w, kind)), w) for kind in KINDS}
    assert errors == pytest.approx({"q8_0": 0.0049, "q4_0": 0.088, "q4_1": 0.078}, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_again_changes_nothing(kind):
    once = QUANTIZE(W, kind)
    twice = QUANTIZE(dequantize(once), kind)
    tolerance = {"atol": 0.3 * float(once.scale.max())} if kind == "q4_0" else {"rtol": 2e-3}
    np.testing.assert_allclose(exact(twice), exact(once), **{"atol": 1e-3, **tolerance})


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    w = QUANTIZE(jnp.zeros((9, 40)), kind)
    assert not exact(w).any()
    assert not np.asarray(PRODUCT(jnp.ones((1, 40)), w)).any()
    assert not np.asarray(PRODUCT(jnp.zeros((2, 77)), QUANTIZE(W, kind))).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_ggufs(kind):
    """As many, and the same numbers: the scale, the minimum, then the integers of 32 inputs."""
    gguf = pytest.importorskip("gguf")
    w = normal(5, 16, 96).astype(jnp.float32)
    stored = QUANTIZE(w, kind)
    theirs = getattr(gguf.GGMLQuantizationType, kind.upper())
    raw = gguf.quants.quantize(np.asarray(w), theirs)
    assert sum(a.nbytes for a in stored.arrays) == raw.nbytes
    read = gguf.quants.dequantize(raw, theirs)
    assert relative(read, w) == pytest.approx(relative(exact(stored), w), rel=0.02)
    # The same but for the rounding of the scales, before theirs and after ours
    assert relative(exact(stored), read) < 0.5 * relative(read, w)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind):
    ids = jnp.array([[4, 0], [12, 1]])
    for table in (W, OutIn(W)):
        np.testing.assert_array_equal(table_rows(table, ids), W[ids])
    table = QUANTIZE(W, kind)
    np.testing.assert_array_equal(jax.jit(table_rows)(table, ids), dequantize(table)[ids])


def test_stacked_layers_equal_single_ones():
    layers = normal(3, 2, 9, 40).astype(jnp.float32)
    for kind in KINDS:
        stacked = jax.vmap(partial(quantize, kind=kind))(layers)
        _, each = jax.lax.scan(lambda _, w: (None, product(X[:, :40], w)), None, stacked)
        for w, y in zip(layers, each, strict=True):
            assert relative(y, product(X[:, :40], quantize(w, kind))) < 1e-6


@pytest.mark.parametrize("how", [*KINDS, "bfloat16", "float32"])
@pytest.mark.parametrize("kernels", ["native", "XLA"])
def test_a_layer_in_a_stack_gives_what_it_gives_alone(in_cpp, how, kernels):
    if kernels == "XLA":
        in_cpp(False)
    layers = [normal(seed, 9, 40).astype(jnp.float32) for seed in range(3)]
    stored = [quantize(w, how) if how in KINDS else OutIn(w.astype(how)) for w in layers]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *stored)
    one = jax.jit(lambda x, w: product(x, w))
    read = jax.jit(lambda x, stack, i: products(x, [InStack(stack, i)] * 2))
    for i, alone in enumerate(stored):
        for y in read(X[:, :40], stack, i):
            # XLA sums in another order if other numbers are in sight
            exact = kernels == "native" and how != "float32" and native.available("product")
            assert relative(y, one(X[:, :40], alone)) <= (0 if exact else 1e-6)
    x = X[None, :, :40]
    (y,) = quantized_linears(x, [InStack(stack, 1)], [jnp.ones(9)])
    np.testing.assert_array_equal(y, quantized_linears(x, [stored[1]], [jnp.ones(9)])[0])


def test_a_bare_matrix_in_bfloat16_is_multiplied_as_a_stored_one():
    w = W.astype(jnp.bfloat16)
    assert relative(product(X, w), product(X, OutIn(w))) < 1e-6


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_in_the_stack_is_refused(layer):
    if not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), quantize(W, "q4_1"))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="do not fit"):
        jax.block_until_ready(PRODUCT(X, InStack(stack, jnp.int32(layer))))


# --- Products ---


@pytest.fixture(params=["native", "XLA"])
def kernels(request, in_cpp):
    """What computes products."""
    if request.param == "XLA":
        in_cpp(False)
    elif not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    return request.param


def native_product(x, arrays, outputs):
    return native.products(x, [[a[None] for a in arrays]], [outputs], 0)[0]


NATIVE = jax.jit(native_product, static_argnames="outputs")


def computed(x, w, kernels) -> np.ndarray:
    """The product; of the C++ kernels, by every instruction set that this machine has, all of which
    give the same bits.
    """
    x = jnp.asarray(x, jnp.float32)
    if kernels == "XLA":
        return np.asarray(jax.jit(lambda x, w: product(x, w))(x, w), np.float64)
    library, found = native.registered("product"), {}
    arrays, outputs = (w.arrays, w.outputs) if isinstance(w, Blocks) else ([w.w], w.w.shape[:1])
    known = native.instruction_sets(library)
    for name in known:
        native.use_instruction_set(library, name)
        found[name] = np.asarray(NATIVE(x, arrays, math.prod(outputs)), np.float64)
    native.use_instruction_set(library, known[0])
    for other in found.values():
        np.testing.assert_array_equal(other, found["portable"])
    return found["portable"]


def rounding_bound(x, w: Blocks) -> np.ndarray:
    """The most that rounding x to blocks of 8 bits changes each product: half a step of each of
    x's blocks times the weights of the block, and float32's rounding of the sum.
    """
    weights = np.abs(in_blocks(exact(w)))
    steps = np.abs(in_blocks(x)).max(-1) / 127
    halves = np.einsum("mn,on->mo", steps / 2, weights.sum(-1))
    sums = np.einsum("mni,oni->mo", np.abs(in_blocks(x)) + steps[..., None], weights)
    return 1.0001 * halves + 4 * (weights.shape[1] + 4) * 2.0**-24 * sums


def make(seed, outputs, inputs, rows, kind):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    x[0, 0] *= 50  # activations have outliers
    return x, QUANTIZE(rng.normal(size=(outputs, inputs)).astype(np.float32), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_products_differ_by_the_rounding_of_x_alone(kernels, kind, size):
    for M in ROWS[kernels]:
        x, w = make(M, *size, M, kind)
        error = np.abs(computed(x, w, kernels) - np.asarray(x, np.float64) @ exact(w).T)
        assert (error <= rounding_bound(x, w)).all()
        assert error.any() or size == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), LARGE)
def test_large_products_differ_by_the_rounding_of_x_alone(kernels, kind, rows, outputs, inputs):
    x, w = make(rows, outputs, inputs, rows, kind)
    found = computed(x, w, kernels)
    error = np.abs(found - np.asarray(x, np.float64) @ exact(w).T)
    assert (error <= rounding_bound(x, w)).all()
    if kernels == "native":
        for row in (0, rows - 1):
            np.testing.assert_array_equal(computed(x[row : row + 1], w, kernels)[0], found[row])


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_rounded_activations_are_exact(kernels, kind):
    """What `rounded` gives is not changed by rounding again, so float32 is the only error."""
    x, w = make(7, 33, 300, 5, kind)
    x = rounded(jnp.asarray(x))
    expected = np.asarray(x, np.float64) @ exact(w).T
    np.testing.assert_allclose(
        computed(x, w, kernels), expected, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_those_beside_it(kernels, kind):
    """So that what is drawn depends neither on the batch nor on how many tokens are read at once."""
    if kernels == "XLA":
        pytest.skip("XLA sums in another order")
    x, w = make(8, 33, 300, 41, kind)
    together = computed(x, w, kernels)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(40, 41)):
        np.testing.assert_array_equal(computed(x[rows], w, kernels), together[rows])


@pytest.mark.parametrize("extreme", [1, -1])
def test_the_largest_integers_do_not_overflow(kernels, extreme):
    """127 x 127 and 15 x 127, 32 times over and with either sign; nothing saturates."""
    for kind, q in (("q8_0", 127), ("q8_0", -128), ("q4_0", 255), ("q4_1", 255)):
        w = QUANTIZE(np.ones((16, 96), np.float32), kind)
        w = Blocks(jnp.full_like(w.q, q), jnp.ones_like(w.scale), w.minimum, w.shape, w.inputs)
        x = np.full((2, 96), extreme * 127.0)
        np.testing.assert_allclose(
            computed(x, w, kernels), np.asarray(x, np.float64) @ exact(w).T, rtol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-6, 1e6, 1e30])
def test_activations_of_any_size(kernels, kind, size):
    x, w = make(10, 33, 300, 2, kind)
    y = computed(size * x, w, kernels)
    if size == 1e-30:
        assert not y.any()
    else:
        np.testing.assert_allclose(y, size * computed(x, w, kernels), rtol=1e-2, atol=1e-4 * size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e3])
def test_weights_of_any_size(kernels, kind, size):
    """Of 1e-8, half precision's scales hold little or nothing."""
    x, w = make(11, 33, 300, 2, kind)
    w = QUANTIZE(np.float32(size) * np.asarray(dequantize(w)), kind)
    error = np.abs(computed(x, w, kernels) - np.asarray(x, np.float64) @ exact(w).T)
    assert (error <= rounding_bound(x, w)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_activation_that_is_not_finite_spoils_only_its_row(kernels, kind, bad):
    """The whole row becomes NaN, and no other."""
    x, w = make(12, 9, 40, 3, kind)
    x[1, 35] = bad
    y = computed(x, w, kernels)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("size", SIZES)
def test_products_with_bfloat16_are_exact(kernels, size):
    rng = np.random.default_rng(2)
    w = rng.normal(size=size).astype(jnp.bfloat16)
    for M in ROWS[kernels]:
        x = rng.normal(size=(M, size[1])).astype(np.float32)
        terms = x[:, None] * w[None].astype(np.float32)
        y = computed(x, OutIn(jnp.asarray(w)), kernels)
        assert_same_sums(y, terms.sum(-1), terms)


def test_mismatched_shapes_are_rejected():
    if not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    w = QUANTIZE(W, "q8_0")
    for x, arrays, outputs in (
        (X, w.arrays, 17),
        (X[:, :5], w.arrays, 13),
        (X, [w.q, w.scale[1:]], 13),
        (X, [W.astype(jnp.bfloat16)], 12),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            native_product(x, arrays, outputs).block_until_ready()


def test_an_unavailable_instruction_set_is_rejected():
    if not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    with pytest.raises(ConfigError, match="'mmx'.*choose .*portable"):
        native.use_instruction_set(native.registered("product"), "mmx")


def test_activations_are_rounded_on_cpu_only():
    w = QUANTIZE(W, "q8_0")
    expected = np.asarray(X, np.float64) @ exact(w).T
    np.testing.assert_allclose(_dequantized_products(X, [w])[0], expected, rtol=1e-5, atol=1e-5)


# --- Layers ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["dtype", *KINDS])
def test_products_have_the_dtype_of_the_activations(dtype, how):
    x, w = X.astype(dtype), W.astype(dtype)
    y = product(x, OutIn(w) if how == "dtype" else QUANTIZE(w, how))
    assert y.dtype == x.dtype
    assert relative(y.astype(jnp.float64), X @ W.T) < (0.15 if "4" in how else 2e-2)


def test_products_of_unquantized_weights_are_exact():
    assert_same_sums(product(X, OutIn(W)), X @ W.T, TERMS)
    assert_same_sums(product(X, W), X @ W.T, TERMS)


@pytest.mark.parametrize("storages", [KINDS, ("bfloat16",) * 3, ("q4_1", "bfloat16", "float32")])
def test_products_of_one_input_are_those_of_each_weight_alone(storages, kernels):
    """Whatever their sizes and storages, to the bit."""

    def stored(rows, how):
        return QUANTIZE(W[:rows], how) if how in KINDS else OutIn(W[:rows].astype(how))

    ws = list(map(stored, (13, 1, 8), storages))
    together = jax.jit(lambda x, ws: products(x, ws))(X, ws)
    for y, w in zip(together, ws, strict=True):
        np.testing.assert_array_equal(y, jax.jit(lambda x, w: product(x, w))(X, w))


def test_products_of_one_input_are_one_call():
    if not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    ws = [QUANTIZE(W, kind) for kind in KINDS]
    text = jax.jit(lambda x: products(x, ws)).lower(X).compile().as_text()
    assert text.count('custom_call_target="gptjax_product"') == 1


def test_a_linear_layer_takes_weights_in_any_storage():
    x, b = X.reshape(3, 1, 77), jnp.arange(13, dtype=jnp.float32)
    y, _ = linear_fwd(x, W.T, b)
    terms = jnp.concatenate([TERMS, jnp.broadcast_to(b[None, :, None], (3, 13, 1))], -1)[:, None]
    assert_same_sums(quantized_linears(x, [OutIn(W)], [b])[0], y, terms)
    assert relative(quantized_linears(x, [QUANTIZE(W, "q8_0")], [b])[0], y) < 1e-2


def test_several_axes_count_as_one():
    """Heads to channels, without bias: (C, H, D) for the outputs first; channels to heads."""
    w = normal(0, 5, 3, 4)
    x = normal(1, 2, 6, 3, 4)
    y, _ = linear_fwd(x, jnp.moveaxis(w, 0, -1))
    assert_same_sums(
        quantized_linears(x, [OutIn(w)])[0], y, (x[:, :, None] * w[None, None]).reshape(2, 6, 5, 12)
    )
    assert quantize(w, "q8_0", inputs=2).outputs == (5,)
    assert relative(quantized_linears(x, [quantize(w, "q8_0", inputs=2)])[0], y) < 1e-2
    w, x = normal(2, 3, 4, 12), normal(3, 2, 6, 12)
    y, _ = linear_fwd(x, jnp.moveaxis(w, -1, 0))
    assert relative(quantized_linears(x, [quantize(w, "q8_0")])[0], y) < 1e-2
    assert quantized.product(x[0], quantize(w, "q4_1")).shape == (6, 12)
