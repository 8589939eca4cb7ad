"""Check each op at small shapes: its hand-derived backward against JAX's and against differences of
the forward.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptjax import ops
from gptjax.ops.attention import causal, materialised_bwd, materialised_fwd
from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd
from gptjax.verify import finite_difference
from gptjax.verify.comparison import compare
from gptjax.verify.rows import Row, aligned
from gptjax.verify.tolerance import gradient_variances, tolerance


@dataclasses.dataclass(frozen=True)
class OpCase:
    """An op at one shape: forward and backward as functions of its differentiable arguments."""

    name: str
    forward: Callable[..., Any]
    """``forward(*args) -> y``."""
    backward: Callable[..., Any]
    """``backward(*args, dy) -> gradients``, one for each argument."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the arguments."""


class OpError(NamedTuple):
    """An op's worst relative L2 errors over its arguments, and their tolerances."""

    op: str
    autodiff: float
    """Error relative to JAX's gradient of the forward in float64."""
    autodiff_tolerance: float
    difference: float
    """Error of the float64 backward relative to differences of the float64 forward."""
    difference_tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerances."""
        return (
            self.autodiff <= self.autodiff_tolerance
            and self.difference <= self.difference_tolerance
        )


def op_cases() -> list[OpCase]:
    """Every op, at a small shape whose axes differ in size."""
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (2, 9), 0, 5, jnp.int32)
    # An ignored target has weight 0
    targets = jax.random.randint(key, (6,), 0, 13, jnp.int32).at[0].set(ops.IGNORE_INDEX)
    weights = jnp.linspace(0.0, 0.3, 6, dtype=jnp.float32)
    weights = weights.astype(jnp.bfloat16).astype(jnp.float32)  # exact in every dtype

    def embedding_bwd(table: Any, dy: Any) -> Any:
        """The backward adds to an array, so pass it ones and subtract them again."""
        return (ops.embedding_bwd(tokens, jnp.ones_like(table), dy) - 1,)

    def linear(name: str, x: tuple[int, ...], *weights: tuple[int, ...]) -> OpCase:
        def backward(x: Any, w: Any, *b_dy: Any) -> Any:
            gradients = ops.linear_bwd(ops.linear_fwd(x, w, *b_dy[:-1])[1], w, b_dy[-1])
            return gradients[: 1 + len(weights)]  # without a bias, leave out its gradient

        return OpCase(name, lambda *a: ops.linear_fwd(*a)[0], backward, (x, *weights))

    segments = jnp.array([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2], jnp.int32)
    restarting = jnp.array([[*range(4), *range(5)], [*range(7), *range(2)]], jnp.int32)

    def cross_entropy(x: Any) -> Any:
        return ops.cross_entropy_fwd(x, targets, weights, 13)

    def attention(name: str, fwd: Any, bwd: Any, *heads: int) -> OpCase:
        """With H heads of queries, and K of keys and values."""
        H, K = heads
        forward = lambda q, k, v: fwd(q, k, v, 0.2, key)  # noqa: E731
        return OpCase(
            name,
            lambda *a: forward(*a)[0],
            lambda q, k, v, do: bwd(forward(q, k, v)[1], do, 0.2),
            ((2, 9, H, 4), (2, 9, K, 4), (2, 9, K, 4)),
        )

    def packed(q: Any, k: Any, v: Any, rate: float, key: Any) -> Any:
        return materialised_fwd(q, k, v, rate, key, causal(9, segments))

    def in_blocks(q: Any, k: Any, v: Any, rate: float, key: Any) -> Any:
        return blockwise_fwd(q, k, v, rate, key, block_size=4)

    def packed_in_blocks(q: Any, k: Any, v: Any, rate: float, key: Any) -> Any:
        return blockwise_fwd(q, k, v, rate, key, segments, block_size=4)

    def rotary(name: str, positions: Array) -> OpCase:
        return OpCase(
            name,
            lambda x: ops.rotary_fwd(x, positions, 100.0),
            lambda x, dy: (ops.rotary_bwd(positions, 100.0, dy),),
            ((2, 9, 3, 4),),
        )

    return [
        OpCase(
            "embedding", lambda table: ops.embedding_fwd(tokens, table), embedding_bwd, ((5, 8),)
        ),
        # Few outputs select the other form of the weight's gradient on CPU
        linear("linear", (3, 9, 8), (8, 2), (2,)),
        linear("linear into heads", (2, 9, 8), (8, 3, 2), (3, 2)),
        linear("linear out of heads", (2, 9, 3, 2), (3, 2, 8), (8,)),
        linear("linear without bias", (2, 9, 8), (8, 6)),
        OpCase(
            "layernorm",
            lambda *a: ops.layernorm_fwd(*a)[0],
            lambda x, w, b, dy: ops.layernorm_bwd(ops.layernorm_fwd(x, w, b)[1], w, dy),
            ((2, 9, 8), (8,), (8,)),
        ),
        OpCase(
            "gelu",
            lambda x: ops.gelu_fwd(x)[0],
            lambda x, dy: (ops.gelu_bwd(ops.gelu_fwd(x)[1], dy),),
            ((2, 9, 8),),
        ),
        OpCase(
            "rmsnorm",
            lambda *a: ops.rmsnorm_fwd(*a)[0],
            lambda x, w, dy: ops.rmsnorm_bwd(ops.rmsnorm_fwd(x, w)[1], w, dy),
            ((2, 9, 8), (8,)),
        ),
        OpCase(
            "swiglu",
            lambda *a: ops.swiglu_fwd(*a)[0],
            lambda gate, up, dy: ops.swiglu_bwd(ops.swiglu_fwd(gate, up)[1], dy),
            ((2, 9, 8), (2, 9, 8)),
        ),
        rotary("rotary", jnp.arange(9, dtype=jnp.int32)),
        rotary("rotary by row", restarting),
        OpCase(
            "dropout",
            lambda x: ops.dropout_fwd(x, 0.2, key)[0],
            lambda x, dy: (ops.dropout_bwd(ops.dropout_fwd(x, 0.2, key)[1], 0.2, dy),),
            ((2, 9, 8),),
        ),
        attention("attention materialised", materialised_fwd, materialised_bwd, 3, 3),
        attention("attention materialised, grouped and packed", packed, materialised_bwd, 6, 2),
        attention("attention blockwise", in_blocks, blockwise_bwd, 3, 3),
        attention("attention blockwise, grouped and packed", packed_in_blocks, blockwise_bwd, 6, 2),
        OpCase(
            "cross-entropy",
            lambda x: cross_entropy(x)[0],
            lambda x, dloss: (ops.cross_entropy_bwd(cross_entropy(x)[1], 13, dloss),),
            ((6, 16),),
        ),
    ]


def check_ops(dtype: str = "float64") -> list[OpError]:
    """`check_op` of every op. Needs ``jax_enable_x64``."""
    return [check_op(case, dtype) for case in op_cases()]


def check_op(case: OpCase, dtype: str = "float64") -> OpError:
    """Both comparisons of an op, at random arguments."""
    by_jax, by_differences = op_against_autodiff(case, dtype), op_against_differences(case)
    return OpError(
        case.name,
        by_jax.relative_l2,
        by_jax.tolerance,
        by_differences.relative_l2,
        by_differences.tolerance,
    )


def op_against_autodiff(case: OpCase, dtype: str = "float64") -> Row:
    """Compare the backward in ``dtype`` with JAX's gradient of the forward in float64; the row of
    the worst argument.
    """
    exact, dy = _arguments(case)
    rounded = [x.astype(dtype) for x in (*exact, dy)]
    reference = jax.jit(lambda dy, *xs: list(jax.vjp(case.forward, *xs)[1](dy)))(dy, *exact)
    allowed = [
        tolerance(v, v) for v in jax.tree.leaves(gradient_variances(case.backward, *rounded))
    ]
    return compare(list(jax.jit(case.backward)(*rounded)), reference, allowed).worst


def op_against_differences(case: OpCase) -> Row:
    """Compare the backward with differences of the forward, both in float64; the row of the worst
    argument.
    """
    exact, dy = _arguments(case)
    differences = finite_difference.elementwise(case.forward, exact, dy)
    return compare(
        list(jax.jit(case.backward)(*exact, dy)), differences, finite_difference.TOLERANCE
    ).worst


def _arguments(case: OpCase) -> tuple[list[Array], Array]:
    keys = jax.random.split(jax.random.key(1), len(case.shapes) + 1)
    # Exact in every dtype, so that all dtypes differentiate at the same point
    exact = [
        jax.random.normal(k, shape, jnp.bfloat16).astype(jnp.float64)
        for k, shape in zip(keys[1:], case.shapes, strict=True)
    ]
    y = jax.eval_shape(case.forward, *exact)
    return exact, jax.random.normal(keys[0], y.shape, jnp.bfloat16).astype(jnp.float64)


def ops_table(errors: Sequence[OpError]) -> str:
    """The errors as lines of text after a header."""
    return aligned(ops_cells(errors))


def ops_cells(errors: Sequence[OpError]) -> list[list[str]]:
    """The table's cells after a header."""
    head = ["op", "rel L2 to autodiff", "tolerance", "rel L2 to differences", "tolerance", ""]
    lines = [
        [
            e.op,
            f"{e.autodiff:.1e}",
            f"{e.autodiff_tolerance:.1e}",
            f"{e.difference:.1e}",
            f"{e.difference_tolerance:.1e}",
            "ok" if e.ok else "WRONG",
        ]
        for e in errors
    ]
    return [head, *lines]
