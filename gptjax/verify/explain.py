"""Explain how the tolerances of a configuration are derived, in words and numbers."""

import math

import jax

from gptjax.verify import finite_difference, model
from gptjax.verify.comparison import leaf_names
from gptjax.verify.model import Subject
from gptjax.verify.rows import aligned
from gptjax.verify.tolerance import LAMBDA, unit_roundoff

TEXT = """\
What rounding explains

Every operation rounds its result, with a relative error of at most the unit roundoff u, {u:.2e} in
{dtype}. If roundings are independent with mean zero, then the product of n of them, 1 + delta each,
is within {LAMBDA:g} sqrt(n) u of 1 with a probability of at least 1 - 2 exp(-{LAMBDA:g}^2 / 2) =
{probability:.5f} (Higham and Mary 2019, doi:10.1137/18M1226312, theorem 2.4). Each term of a sum of
n goes through at most n roundings. A gradient is a chain of such sums, forward through every layer
to the loss, and back. Their variances n u^2 add up. The traced program gives the chains from the
tokens to each tensor of the gradient, and the longest counts. This models rounding; it is no bound:
magnified errors and errors that cancel are assumed to balance.

    n           terms of all sums on the longest chain, in units of u^2
    tolerance   {LAMBDA:g} sqrt(n) u, times sqrt(1 + (u'/u)^2) for the rounding u' of the reference

If an error exceeds that, JAX's own gradient decides whether rounding can cause it: each parameter
is moved by one unit in the last place, and {LAMBDA:g} times the resulting change of JAX's gradient
is allowed, if larger.

No tolerance is chosen by hand. Errors are relative to the tensor's size, |ours - reference| /
|reference| in L2 norms. Finite differences must agree to sqrt(u) of float64, {difference:.1e}, the
best that a one-sided difference can do, or to {LAMBDA:g} times the error that the extrapolation
estimates. In bfloat16 the gradient must also be as close to float64 as JAX's own: the ratio of the
two distances may exceed 1 by {LAMBDA:g} / sqrt(2 C), the scatter of the norms of two random errors
with C independent parts, where C is the length of the tensor's last axis.
"""


def explain(subject: Subject) -> str:
    """The derivation in words, then the tolerance of each tensor."""
    u = unit_roundoff(subject.cfg.compute_dtype)
    text = TEXT.format(
        u=u,
        dtype=subject.cfg.dtype,
        LAMBDA=LAMBDA,
        probability=1 - 2 * math.exp(-(LAMBDA**2) / 2),
        difference=finite_difference.TOLERANCE,
    )
    allowed = model.tolerances(subject)
    theirs = 1 + (unit_roundoff("float64") / u) ** 2
    largest: dict[str, float] = {}
    gradient = allowed.gradient()
    for (name, _), value in zip(leaf_names(gradient), jax.tree.leaves(gradient), strict=True):
        largest[name] = max(value, largest.get(name, 0.0))
    rows = {"loss": allowed.loss, "logits": allowed.logits} | largest
    lines = [["tensor", "n", "tolerance"]]
    lines += [
        [name, f"{(value / LAMBDA / u) ** 2 / theirs:,.0f}", f"{value:.1e}"]
        for name, value in rows.items()
    ]
    return text + "\n" + aligned(lines)
