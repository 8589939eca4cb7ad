"""How the tolerances of a configuration come about, in words and numbers."""

import math

import jax

from gptjax.verify import finite_difference, model
from gptjax.verify.comparison import leaf_names
from gptjax.verify.model import Subject
from gptjax.verify.rows import aligned
from gptjax.verify.tolerance import LAMBDA, unit_roundoff

TEXT = """\
What rounding explains

Every operation rounds its result: relative error at most u, the unit roundoff, which is {u:.2e} in {dtype}.
If roundings are independent with mean zero, then n of them in a row, 1 + delta each, multiply to within {LAMBDA:g} sqrt(n) u
of 1 with a probability of at least 1 - 2 exp(-{LAMBDA:g}^2 / 2) = {probability:.5f} (Higham and Mary 2019,
doi:10.1137/18M1226312, theorem 2.4). A term of a sum of n sees at most n. A gradient is a chain of such sums: forward
through every layer to the loss, and back. Their variances n u^2 add up. The chains are followed in the program itself, from
the tokens to each tensor of the gradient, and the longest counts. That is a model, not a bound: what a step magnifies, and
what cancels in a sum, are taken to make up for each other.

    n           terms of all sums on the longest chain, in units of u^2
    tolerance   {LAMBDA:g} sqrt(n) u, times sqrt(1 + (u'/u)^2) for the reference's own rounding, with its u'

Where an error is beyond that, JAX's own gradient decides whether it can be rounding: each parameter is moved by one unit in
the last place, and {LAMBDA:g} times the distance that JAX's gradient then moves is allowed, if that is more.

No tensor has a number of its own that somebody chose. An error is told relative to the tensor's size:
|ours - reference| / |reference|, L2 norms. Differences of the loss are held to sqrt(u) of float64, {difference:.1e}, the
best that a plain one-sided difference could do, or to {LAMBDA:g} times the error that the extrapolation estimates of
itself. In bfloat16 the gradient must also be no further from float64 than JAX's own is: the ratio of the two distances may
exceed 1 by {LAMBDA:g} / sqrt(2 C), the scatter of the norms of two random errors of C independent parts, where C, the
length of the tensor's last axis, stands for how many those are.
"""


def explain(subject: Subject) -> str:
    """The derivation, and what it gives for each tensor."""
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
