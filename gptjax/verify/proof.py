"""Check a hand-written gradient of any function."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from gptjax.verify import finite_difference, trace
from gptjax.verify.comparison import compare, leaf_names
from gptjax.verify.ops import OpError, ops_table
from gptjax.verify.rows import Comparison, table
from gptjax.verify.tolerance import LAMBDA, gradient_variances, tolerance
from gptjax.verify.trace import Mismatch

Reference = Literal["autodiff", "finite-difference"]


RELAXED = (
    f"tolerances are at least {LAMBDA:g} times the change of JAX's own gradient when each "
    "parameter moves by one unit in the last place"
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a check; true if everything agrees."""

    gradient: Comparison
    """Errors of the gradient by tensor."""
    forward: Comparison | None = None
    """Errors of the loss and, for a model, the logits."""
    curvature: Comparison | None = None
    """Errors of a Hessian-vector product by tensor."""
    ops: tuple[OpError, ...] = ()
    """Errors of each op by itself."""
    mismatch: Mismatch | None = None
    """Where the gradient first differs from JAX's, if that was found."""
    reference: str = "autodiff"
    """What the gradient is compared with."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """Facts about the check and the machine, by name."""
    layers: bool = False
    """Whether the text has a line for each layer."""
    relaxed: bool = False
    """Whether the tolerances are `gptjax.verify.model.relaxed_tolerances`."""

    def __bool__(self) -> bool:
        """Whether everything is within its tolerance."""
        parts = (self.gradient, self.forward, self.curvature)
        return all(bool(part) for part in parts if part is not None) and all(
            op.ok for op in self.ops
        )

    @property
    def closing(self) -> str:
        """The verdict, in one line."""
        worst = self.gradient.worst
        place = worst.tensor if worst.layer is None else f"{worst.tensor}[{worst.layer}]"
        if self:
            count = len(self.gradient.rows)
            agree = f"all {count} gradients agree" if count > 1 else "the gradient agrees"
            return f"{agree} with {self.reference}: the worst, {place}, to {worst.relative_l2:.1e}"
        if self.gradient:
            parts = {"THE FORWARD": self.forward, "A HESSIAN-VECTOR PRODUCT": self.curvature}
            wrong = [name for name, part in parts.items() if part is not None and not part]
            wrong += [f"THE OP {op.op}" for op in self.ops if not op.ok]
            return (
                f"{' AND '.join(wrong)} IS WRONG, though the gradients agree with {self.reference}"
            )
        wrong_count = sum(not row.ok for row in self.gradient.rows)
        where = f"; first at {self.mismatch}" if self.mismatch else ""
        if not self.mismatch and not self.reference.startswith("autodiff"):
            where = (
                "; but JAX's own gradient of this forward agrees with it, so check the reference "
                "and its parameters"
            )
        verdict = f"{wrong_count} OF {len(self.gradient.rows)} GRADIENTS ARE WRONG"
        return f"{verdict}: the worst, {place}, by {worst.relative_l2:.1e}{where}"

    def __str__(self) -> str:
        """Tables of the checked parts, then the verdict."""
        title = f"gradient, hand-written against {self.reference}"
        if not self.layers and any(row.layer is not None for row in self.gradient.rows):
            title += "; a row has all layers of a tensor, --layers shows each"
        parts = {title: table(self.gradient.rows if self.layers else self.gradient.tensors)}
        if self.forward is not None:
            parts["forward"] = table(self.forward.rows)
        if self.curvature is not None:
            parts["Hessian-vector product"] = table(
                self.curvature.rows if self.layers else self.curvature.tensors
            )
        if self.ops:
            parts["ops of all families, each by itself"] = ops_table(self.ops)
        texts = [f"{name}\n{text}" for name, text in parts.items()]
        if self.relaxed:
            texts.append(RELAXED)
        return "\n\n".join([*texts, self.closing])


def check(
    loss: Callable[..., Any],
    loss_and_grad: Callable[..., Any],
    params: Any,
    *batch: Any,
    reference: Reference = "autodiff",
    largest_error: float | None = None,
) -> Report:
    """Check the hand-written gradient of any function of any pytree.

    Args:
        loss: ``loss(params, *batch)``, a scalar; JAX must differentiate it without custom
            derivatives.
        loss_and_grad: ``loss_and_grad(params, *batch)``, the same scalar and its gradient, shaped
            like ``params``.
        params: floating-point arrays. In float64 (``jax.config.update("jax_enable_x64", True)``)
            the check finds errors that rounding hides in float32.
        batch: further arguments.
        reference: ``autodiff``: `jax.grad` of ``loss``; ``finite-difference``: values of ``loss``
            along random directions, for which ``params`` must be float64.
        largest_error: largest relative L2 error; by default what rounding explains, see
            `gptjax.verify.tolerance`, or for differences
            `gptjax.verify.finite_difference.TOLERANCE`.

    Returns:
        The report. It names the first wrong op if ops are jitted functions called ``OP_fwd`` and
        ``OP_bwd``, where ``OP_bwd`` takes the gradient of the op's result as its last argument and
        returns the gradients of the floating-point arguments of ``OP_fwd``, in their order; either
        list may be shorter.

    Raises:
        ValueError: the reference is unknown, the gradient is not shaped like the parameters, or the
            parameters are not float64 for differences.

    """
    if reference not in get_args(Reference):
        raise ValueError(
            f"reference must be one of {', '.join(get_args(Reference))}, not {reference}"
        )
    result = jax.jit(loss_and_grad)(params, *batch)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(
            f"loss_and_grad must return the pair (loss, gradient), not {type(result).__name__}"
        )
    value, gradient = result
    for shape in (jnp.shape(value), jnp.shape(jax.eval_shape(loss, params, *batch))):
        if shape:
            raise ValueError(f"the loss must be one number, not an array of shape {shape}")
    check_shapes(gradient, params)
    variances = gradient_variances(loss_and_grad, params, *batch)
    allowed = jax.tree.map(
        lambda v: tolerance(v, v) if largest_error is None else largest_error, variances
    )
    if reference == "finite-difference":
        if any(x.dtype != jnp.float64 for x in jax.tree.leaves(params)):
            raise ValueError(
                "differences need float64 parameters: jax.config.update('jax_enable_x64', True) "
                "first"
            )
        plain = jax.jit(loss)
        expected = plain(params, *batch)
        limit = finite_difference.TOLERANCE if largest_error is None else largest_error
        found = finite_difference.check_directions(
            lambda p: plain(p, *batch), params, gradient, tolerance=limit
        )
    else:
        expected, derivative = jax.jit(jax.value_and_grad(loss))(params, *batch)
        found = compare(gradient, derivative, allowed[1])
    forward = compare({"loss": value}, {"loss": expected}, {"loss": allowed[0]})
    return Report(
        found,
        forward,
        reference=reference,
        mismatch=None if found else locate(loss, loss_and_grad, params, *batch),
    )


def check_shapes(gradient: Any, params: Any) -> None:
    """Raise a ValueError unless the gradient is shaped like the parameters."""
    built: Any = jax.tree.structure(gradient)
    if built != jax.tree.structure(params):
        found, expected = (
            ", ".join(dict.fromkeys(tensor for tensor, _ in leaf_names(tree)))
            for tree in (gradient, params)
        )
        raise ValueError(
            f"the gradient, a {type(gradient).__name__} of {found}, is not built like the "
            f"parameters, a {type(params).__name__} of {expected}"
        )
    for (tensor, _), x, dx in zip(
        leaf_names(params), *map(jax.tree.leaves, (params, gradient)), strict=True
    ):
        if jnp.shape(dx) != jnp.shape(x):
            raise ValueError(
                f"the gradient of {tensor} has shape {jnp.shape(dx)}, its parameter {jnp.shape(x)}"
            )


def locate(
    loss: Callable[..., Any], loss_and_grad: Callable[..., Any], params: Any, *batch: Any
) -> Mismatch | None:
    """`trace.first_mismatch` with the largest tolerance of the gradient's tensors."""
    variance = max(jax.tree.leaves(gradient_variances(loss_and_grad, params, *batch)))
    return trace.first_mismatch(
        loss, loss_and_grad, params, *batch, largest=tolerance(variance, variance)
    )
