"""Linear layers with weights stored for decoding: (out, in), in a dtype or in blocks of few bits.

Decoding a token reads every weight once and uses it once, so memory bandwidth sets its time.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Int, Shaped

from gptjax.ops.stacks import InStack, alone, stack_of
from gptjax.xla import native
from gptjax.xla.products import accumulation_dtype

BLOCK = 32  # inputs that share a scale
PANEL = 8  # outputs whose weights lie interleaved
GROUP = 4  # inputs of each output that lie side by side
LARGEST = 127  # of signed 8 bits; -128 stays unused to make the range symmetric
TINY = 2.0**-90  # activations below this count as zeros: their products would leave float32's range
FEW_ROWS = 8  # of x, up to which a product with bfloat16 takes as long as reading the weights
Kind = Literal["q8_0", "q4_0", "q4_1"]
BLOCK_KINDS: tuple[Kind, ...] = get_args(Kind)
AnyArray = Array | np.ndarray


class OutIn(NamedTuple):
    """A weight with its output axes first, or an embedding table: one row per output."""

    w: Float[Array, "..."]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q", "scale", "minimum"),
    meta_fields=("shape", "inputs"),
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A weight, output axes first, in blocks of 32 inputs with the numbers of GGUF's formats.

        q8_0:  w = scale q               -127 <= q <= 127
        q4_0:  w = scale (q - 8)            0 <= q <= 15
        q4_1:  w = scale q + minimum        0 <= q <= 15

    The order is the one that decoding reads fastest. Flattened to (8 P, 32 N) with zeros at the end
    of either axis, output 8 p + o and input 32 n + 4 j + c have the integer ``q[p, n, j, o, c]``;
    one of 4 bits is the lower half of that byte for j < 4, the upper half of ``q[p, n, j - 4, o,
    c]`` from there. Stacked layers have one more axis in front.
    """

    q: Shaped[AnyArray, "*L P N J 8 4"]
    """int8, J = 8; or uint8, J = 4, each two numbers of 4 bits."""
    scale: Float16[AnyArray, "*L P N 8"]
    minimum: Float16[AnyArray, "*L P N 8"] | None
    shape: tuple[int, ...]
    """Of one layer's weight."""
    inputs: int
    """Its trailing axes that are inputs."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output axes."""
        return self.shape[: -self.inputs]

    @property
    def arrays(self) -> list[Any]:
        """The arrays that hold it."""
        return [self.q, self.scale, *([] if self.minimum is None else [self.minimum])]


def quantize(w: Float[Array, "..."], kind: Kind, inputs: int = 1) -> Blocks:
    """Round a weight to blocks.

    ``scale`` is the block's largest magnitude / 127 in 8 bits; in q4_0 its number of largest
    magnitude / -8, in q4_1 its range / 15. No weight moves by more than half a scale plus the
    rounding of scale and minimum to half precision; q4_0 also cuts off what would be 16, up to one
    scale.

    Args:
        w: output axes first; no NaN.
        kind: how to store it.
        inputs: number of trailing input axes, which are flattened into one.

    """
    rows = w.reshape(math.prod(w.shape[:-inputs]), -1).astype(jnp.float32)
    P, N = -(-rows.shape[0] // PANEL), -(-rows.shape[1] // BLOCK)
    blocks = jnp.pad(rows, ((0, -rows.shape[0] % PANEL), (0, -rows.shape[1] % BLOCK)))
    blocks = blocks.reshape(P, PANEL, N, BLOCK)
    high, low = blocks.max(-1), blocks.min(-1)
    signed = jnp.where(high > -low, high, low)
    scales = {"q8_0": jnp.abs(signed) / LARGEST, "q4_0": signed / -8, "q4_1": (high - low) / 15}
    scale, minimum = scales[kind].astype(jnp.float16), low.astype(jnp.float16)
    # What rounding leaves of the smallest scales may be zero
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    if kind == "q8_0":
        q = jnp.clip(jnp.round(blocks / divisor), -LARGEST, LARGEST).astype(jnp.int8)
    else:
        offset = 8 if kind == "q4_0" else -minimum.astype(jnp.float32)[..., None] / divisor
        q = jnp.clip(jnp.round(blocks / divisor + offset), 0, 15).astype(jnp.uint8)
        q = q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4
    return interleaved(q, scale, minimum if kind == "q4_1" else None, w.shape, inputs)


def interleaved(
    q: Shaped[AnyArray, "P 8 N bytes"],
    scale: Float16[AnyArray, "P 8 N"],
    minimum: Float16[AnyArray, "P 8 N"] | None,
    shape: tuple[int, ...],
    inputs: int,
) -> Blocks:
    """`Blocks` from the blocks of each output: int8, or uint8 with the first 16 inputs in the lower
    halves.

    The arrays may be NumPy's, and remain so.
    """
    P, _, N, _ = q.shape
    return Blocks(
        q.reshape(P, PANEL, N, -1, GROUP).transpose(0, 2, 3, 1, 4),
        scale.transpose(0, 2, 1),
        None if minimum is None else minimum.transpose(0, 2, 1),
        shape,
        inputs,
    )


def dequantize(w: Blocks) -> Float[Array, "..."]:
    """The weight in float32, in its shape."""
    q = _integers(w.q, w.minimum is None) * w.scale.astype(jnp.float32)[..., None, :, None]
    if w.minimum is not None:
        q += w.minimum.astype(jnp.float32)[..., None, :, None]
    P, N = w.scale.shape[:2]
    rows = q.transpose(0, 3, 1, 2, 4).reshape(P * PANEL, N * BLOCK)
    outputs, inputs = math.prod(w.outputs), math.prod(w.shape[-w.inputs :])
    return rows[:outputs, :inputs].reshape(w.shape)


def _integers(q: Shaped[AnyArray, "... J O 4"], centred: bool) -> Float[Array, "... 8 O 4"]:
    """The numbers that a scale multiplies, J = 8 along the third axis from the end."""
    if q.dtype == jnp.int8:
        return jnp.asarray(q, jnp.float32)
    numbers = jnp.concatenate([q & 15, q >> 4], -3).astype(jnp.float32)
    return numbers - 8 if centred else numbers


def table_rows(table: Any, ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of an embedding table, which is an array, `OutIn` or `Blocks`."""
    if not isinstance(table, Blocks):
        return (table.w if isinstance(table, OutIn) else table)[ids]
    panel, o = ids // PANEL, ids % PANEL
    q = _integers(table.q[panel, :, :, o][..., None, :], table.minimum is None)[..., 0, :]
    rows = q * table.scale[panel, :, o].astype(jnp.float32)[..., None, None]
    if table.minimum is not None:
        rows += table.minimum[panel, :, o].astype(jnp.float32)[..., None, None]
    return rows.reshape(*ids.shape, -1)[..., : table.shape[-1]]


def is_stored(w: Any) -> bool:
    """True for a weight stored for decoding, alone or in a stack."""
    return isinstance(w, OutIn | Blocks | InStack)


def quantized_linears(
    x: Float[Array, "B T *I"], ws: Sequence[Any], bs: Sequence[Array | None] | None = None
) -> list[Float[Array, "..."]]:
    """``y = x w + b`` for each stored weight w and its bias b, if there are any."""
    ys = products(x.reshape(-1, math.prod(x.shape[2:])), ws)

    def shaped(y: Array, w: Any, b: Array | None) -> Array:
        stack = stack_of(w).stack
        outputs = (
            stack.outputs if isinstance(stack, Blocks) else stack.w.shape[1 : stack.w.ndim - inputs]
        )
        y = y.reshape(*x.shape[:2], *outputs)
        return y if b is None else y + jnp.broadcast_to(b.astype(x.dtype), y.shape)

    inputs = x.ndim - 2
    return list(map(shaped, ys, ws, bs or [None] * len(ws)))


def product(x: Float[Array, "M I"], w: Any) -> Float[Array, "M O"]:
    """``x w^T``; see `products`."""
    return products(x, [w])[0]


def products(x: Float[Array, "M I"], ws: Sequence[Any]) -> list[Float[Array, "M O"]]:
    """``x w^T`` for each w in x's dtype; w is `OutIn`, `Blocks` or an (out, in) array, or one of
    them `InStack`, all in the same.

    Several output or input axes are flattened into one. On CPU, products with blocks round x to 8
    bits too, a scale for each 32 numbers, and add integers (`gptjax.xla.native`).
    """
    stacks = [stack_of(w).stack for w in ws]
    if len(set(map(type, stacks))) > 1:
        return [product(x, w) for w in ws]
    if isinstance(stacks[0], Blocks):
        return lax.platform_dependent(x, ws, cpu=_rounded_products, default=_dequantized_products)
    narrow = all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(stacks))
    if narrow and x.dtype == jnp.float32 and len(x) <= FEW_ROWS:
        return native.on_cpu("product", _few_rows_products, _products, x, ws)
    return _products(x, ws)


def _products(x: Float[Array, "M I"], ws: Sequence[Any]) -> list[Array]:
    matrices = [jax.tree.leaves(alone(w))[0].reshape(-1, x.shape[1]) for w in ws]
    # With the weights first, XLA's CPU compiler reads them in memory order.
    return [
        jnp.einsum("oi,mi->om", w.astype(x.dtype), x, preferred_element_type=accumulation_dtype(x))
        .astype(x.dtype)
        .T
        for w in matrices
    ]


def _few_rows_products(x: Float[Array, "M I"], ws: Sequence[Any]) -> list[Array]:
    stacks = [stack_of(w) for w in ws]
    arrays = [jax.tree.leaves(w.stack)[0] for w in stacks]
    matrices = [a.reshape(len(a), -1, x.shape[1]) for a in arrays]
    sizes = [w.shape[1] for w in matrices]
    return native.products(x, [[w] for w in matrices], sizes, stacks[0].layer)


def _dequantized_products(x: Float[Array, "M I"], ws: Sequence[Any]) -> list[Array]:
    return _products(x, [dequantize(alone(w)).reshape(-1, x.shape[1]) for w in ws])


def _rounded_products(x: Float[Array, "M I"], ws: Sequence[Any]) -> list[Array]:
    x32 = x.astype(jnp.float32)
    if native.available("product"):
        stacks = [stack_of(w) for w in ws]
        sizes = [math.prod(w.stack.outputs) for w in stacks]
        ys = native.products(x32, [w.stack.arrays for w in stacks], sizes, stacks[0].layer)
    else:
        ys = _dequantized_products(rounded(x32), ws)
    return [y.astype(x.dtype) for y in ys]


def rounded(x: Float[Array, "M I"]) -> Float[Array, "M I"]:
    """Round each 32 numbers of a row to multiples of their largest magnitude / 127."""
    blocks = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    largest = jnp.abs(blocks).max(-1, keepdims=True)
    finest = jnp.where(largest < TINY, jnp.inf, largest)
    q = jnp.round(blocks * (LARGEST / finest))
    return (q * (largest / LARGEST)).reshape(len(x), -1)[:, : x.shape[1]]
