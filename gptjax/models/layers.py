"""The ops as the models' blocks call them: with barriers for XLA, and on weights in any storage.

Each computes the same numbers as the op of the same name in `gptjax.ops`. Barriers decide what the
backward stores and what it recomputes. This module ignores the mesh: `gptjax.models.transformer`
lays out a block's weights and gradients.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax import ops
from gptjax.ops import (
    dropout_bwd,
    dropout_fwd,
    embedding_bwd,
    layernorm_fwd,
    rmsnorm_fwd,
    rotary_bwd,
    rotary_fwd,
    swiglu_fwd,
)
from gptjax.ops.activation import gelu
from gptjax.ops.quantized import is_stored, product, quantized_linears, table_rows
from gptjax.xla.barrier import barrier, barrier_except_tpu, cpu_barrier
from gptjax.xla.forms import form_of
from gptjax.xla.products import contract

__all__ = [
    "add",
    "classifier_fwd",
    "dropout_bwd",
    "dropout_fwd",
    "embedding_bwd",
    "embedding_fwd",
    "gelu_again",
    "gelu_bwd",
    "gelu_fwd",
    "layernorm_bwd",
    "layernorm_fwd",
    "linear_bwd",
    "linear_fwd",
    "linears_fwd",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "rotary_bwd",
    "rotary_fwd",
    "swiglu_again",
    "swiglu_bwd",
    "swiglu_fwd",
]


def linear_fwd(x: Array, w: Any, b: Array | None = None) -> tuple[Array, Any]:
    """`ops.linear_fwd`; the weights may be stored for decoding."""
    (y,), saved = linears_fwd(x, (w,), (b,))
    return y, saved


def linears_fwd(
    x: Array, ws: Sequence[Any], bs: Sequence[Array | None] | None = None
) -> tuple[list[Array], Any]:
    """`linear_fwd` of one input with several weights: a y for each, and what is saved.

    Weights that are stored for decoding are read in one call.
    """
    if any(map(is_stored, ws)):
        return quantized_linears(x, ws, bs), None
    ys, saved = zip(*map(partial(ops.linear_fwd, x), ws, bs or [None] * len(ws)), strict=True)
    return list(ys), saved[0]


def linear_bwd(x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """`ops.linear_bwd`; on CPU dx waits for the weight's gradient, which frees x and dy early."""
    dx, dw, db = ops.linear_bwd(x, w, dy)
    return cpu_barrier((dw, db), dx), dw, db


def layernorm_bwd(saved: Any, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """`ops.layernorm_bwd`; its statistics wait for dy.

    Otherwise XLA computes their broadcasts in the forward and stores them.
    """
    saved = saved._replace(
        mean=barrier_except_tpu(dy, saved.mean), rstd=barrier_except_tpu(dy, saved.rstd)
    )
    dx, dw, db = ops.layernorm_bwd(saved, w, dy)
    return cpu_barrier((dw, db), dx), dw, db


def rmsnorm_bwd(saved: Any, w: Array, dy: Array) -> tuple[Array, Array]:
    """`ops.rmsnorm_bwd`; its statistic waits for dy, as `layernorm_bwd`'s do."""
    saved = saved._replace(rstd=barrier_except_tpu(dy, saved.rstd))
    dx, dw = ops.rmsnorm_bwd(saved, w, dy)
    return cpu_barrier(dw, dx), dw


@jax.jit  # so that the verifier finds both forms under one name
def gelu_fwd(x: Array) -> tuple[Array, Array]:
    """`ops.gelu_fwd`; on CUDA in the form that XLA fuses into the product that made x.

    cuBLASLt then computes it from the product's float32 sums. XLA recognises the equation only if
    it is computed in x's own dtype.
    """
    return lax.platform_dependent(x, cuda=_gelu_of_product, default=_gelu), x


def _gelu(x: Array) -> Array:
    return ops.gelu_fwd(x)[0]


@form_of(_gelu)
def _gelu_of_product(x: Array) -> Array:
    return gelu(x)


def gelu_bwd(x: Array, dy: Array) -> Array:
    """`ops.gelu_bwd`; x waits for dy, or XLA computes tanh(u) in the forward and stores it."""
    return ops.gelu_bwd(barrier_except_tpu(dy, x), dy)


def gelu_again(dx: Array, x: Array) -> Array:
    """`ops.gelu_fwd` of x, recomputed in the backward once dx is available."""
    return ops.gelu_fwd(barrier(dx, x))[0]


def swiglu_bwd(saved: Any, dy: Array) -> tuple[Array, Array]:
    """`ops.swiglu_bwd`; the gate waits for dy, or XLA computes its sigmoid in the forward and
    stores it.
    """
    return ops.swiglu_bwd(saved._replace(gate=barrier_except_tpu(dy, saved.gate)), dy)


def swiglu_again(dx: Array, saved: Any) -> Array:
    """`ops.swiglu_fwd`, recomputed in the backward once dx is available."""
    return ops.swiglu_fwd(barrier(dx, saved.gate), saved.up)[0]


def classifier_fwd(h: Float[Array, "N C"], head: Any) -> Float[Array, "N Vp"]:
    """``h head^T``; the classifier may be stored for decoding."""
    if is_stored(head):
        return product(h, head)
    return contract("nc,vc->nv", h, head.astype(h.dtype))


def embedding_fwd(ids: Int[Array, "..."], table: Any) -> Float[Array, "..."]:
    """`ops.embedding_fwd`; the table may be stored for decoding."""
    return table_rows(table, ids) if is_stored(table) else ops.embedding_fwd(ids, table)


def add(x: Float[Array, "B T C"], *products: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    """``x`` plus what products have just made: a residual branch, or gradients of one input.

    cuBLASLt can add the sum so far while it writes the next product. XLA's GPU compiler copies that
    sum first, unless it itself has the product's shape, (N, C), and XLA sees that it is used again.
    XLA lets a product add one array, and looks at the left operand first.
    """
    rows = _rows(x)
    for y in products:
        rows = _rows(y) + rows
    return rows.reshape(x.shape)


def _rows(x: Float[Array, "B T C"]) -> Float[Array, "N C"]:
    return x.reshape(-1, x.shape[-1])
