"""Known errors of a hand-written backward, to plant one at a time.

A `Fault` replaces a piece of a function's source, so that the page can show the very line that is
wrong. `planted` runs the package with it.
"""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gptjax import ops
from gptjax.config import ModelConfig
from gptjax.models import transformer
from gptjax.models.family import family_of
from gptjax.ops.attention import materialised_bwd


class Fault(NamedTuple):
    """One error."""

    function: Callable[..., Any]
    """The function to break."""
    kind: str
    """The kind of error, such as ``sign``."""
    breaks: str
    """A description of the error."""
    right: str
    """A piece of the function's source that occurs exactly once."""
    wrong: str
    """What replaces it."""

    @property
    def place(self) -> str:
        """The function's name without its suffix."""
        name = "attention_bwd" if self.function is materialised_bwd else self.function.__name__
        return name.removesuffix("_bwd")

    @property
    def name(self) -> str:
        """The fault's name in the page's address."""
        return f"{self.place}-{self.breaks}".replace(" ", "-")


def _in(function: Any, *errors: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(function, *error) for error in errors]


IN_OPS = [
    *_in(
        ops.cross_entropy_bwd,
        (
            "dropped term",
            "no -1 at the target",
            "jnp.where(_is_target(x, targets), -jnp.ones((), x.dtype), jnp.exp(x - lse[:, None]))",
            "jnp.exp(x - lse[:, None])",
        ),
        ("off by one", "-1 at the token after the target", "(x, targets)", "(x, targets + 1)"),
        ("missing scale", "the sum instead of the mean", "dloss * weights * q", "dloss * q"),
        ("wrong operand", "another row's normaliser", "lse[:, None]", "jnp.roll(lse, 1)[:, None]"),
    ),
    *_in(
        ops.layernorm_bwd,
        (
            "dropped term",
            "no part through the mean",
            "dn - dn.mean(-1, keepdims=True) - n",
            "dn - n",
        ),
        (
            "dropped term",
            "no part through the variance",
            " - n * (dn * n).mean(-1, keepdims=True)",
            "",
        ),
        ("sign", "plus instead of minus before the variance", "True) - n *", "True) + n *"),
        ("missing scale", "not divided by the deviation", "dx = rstd * (", "dx = ("),
        (
            "wrong axis",
            "the mean over time, not over channels",
            "dn.mean(-1, keepdims=True) - n",
            "dn.mean(1, keepdims=True) - n",
        ),
        ("wrong operand", "dw of x before it is normalised", "(dyf * n).sum", "(dyf * x).sum"),
    ),
    *_in(
        ops.rmsnorm_bwd,
        ("dropped term", "no part through rstd", " - n * (dn * n).mean(-1, keepdims=True)", ""),
        ("added term", "LayerNorm's mean, too", "(dn - n", "(dn - dn.mean(-1, keepdims=True) - n"),
        ("sign", "plus instead of minus before rstd", "(dn - n", "(dn + n"),
        ("missing scale", "not multiplied by rstd", "dx = rstd * (", "dx = ("),
        ("wrong reduction", "sum instead of mean over channels", ".mean(-1,", ".sum(-1,"),
    ),
    *_in(
        ops.rotary_bwd,
        ("sign", "rotated forward, not back", "theta, -1)", "theta, 1)"),
        ("off by one", "by the next position's angle", "positions, theta", "positions + 1, theta"),
        ("dropped term", "not rotated at all", "_rotate(dy, positions, theta, -1)", "dy"),
    ),
    *_in(
        ops.swiglu_bwd,
        ("dropped term", "no derivative of the sigmoid", " + g * s * (1 - s)", ""),
        ("sign", "1 + s instead of 1 - s", "(1 - s)", "(1 + s)"),
        ("wrong operand", "dup from up instead of the gate", "(d * g * s)", "(d * u * s)"),
    ),
    *_in(
        ops.gelu_bwd,
        ("dropped term", "no derivative of tanh", " + 0.5 * xf * (1 - t * t) * du", ""),
        (
            "wrong constant",
            "2 instead of 3 in the cubic's derivative",
            "1 + 3 * CUBIC",
            "1 + 2 * CUBIC",
        ),
        ("missing scale", "no sqrt(2 / pi) in the inner derivative", "du = SLOPE * (", "du = ("),
        ("sign", "1 + tanh^2 instead of 1 - tanh^2", "(1 - t * t)", "(1 + t * t)"),
    ),
    *_in(
        ops.linear_bwd,
        ("sign", "minus dx", "dx = times_transpose", "dx = -times_transpose"),
        (
            "off by one",
            "dw of x and the next token's dy",
            "products(x, dy)",
            "products(x[:, :-1], dy[:, 1:])",
        ),
        ("wrong reduction", "mean instead of sum in db", ".sum((0, 1))", ".mean((0, 1))"),
    ),
    *_in(
        materialised_bwd,
        (
            "dropped term",
            "the softmax's Jacobian is its diagonal alone",
            "(dp - (dp * pf).sum(-1, keepdims=True))",
            "dp",
        ),
        (
            "wrong axis",
            "the Jacobian sums over queries",
            "(dp * pf).sum(-1, keepdims=True)",
            "(dp * pf).sum(-2, keepdims=True)",
        ),
        ("sign", "plus instead of minus in the Jacobian", "pf * (dp - (", "pf * (dp + ("),
        ("missing scale", "no 1 / sqrt(D)", " / math.sqrt(q.shape[3])", ""),
        (
            "off by one",
            "a mask that hides each position from itself",
            "pf = p.astype(acc)",
            "pf = p.astype(acc)\n    itself = jnp.arange(p.shape[2]) * p.shape[3] // p.shape[2]\n"
            "    pf = jnp.where(itself[:, None] == jnp.arange(p.shape[3]), 0, pf)",
        ),
        (
            "wrong reduction",
            "dk of the first query head of each group",
            '"bkrs,brkd->bskd", ds, q)',
            '"bkrs,brkd->bskd", ds[:, :, :: H // k.shape[2]], q[:, :: H // k.shape[2]])',
        ),
    ),
    *_in(
        ops.embedding_bwd,
        ("not accumulated", "of a repeated token, only the last counts", ".add(dy", ".set(dy"),
        ("dropped term", "the classifier's part of a tied table", "dtable.at", "(0 * dtable).at"),
    ),
]
"""Errors in an op, for the models that have it."""

IN_NETWORK = [
    *_in(
        transformer.loss_and_grad,
        ("wrong order", "layers get each other's gradients", "=dblocks)", "=dblocks[::-1])"),
    ),
    *_in(
        transformer.blocks_bwd,
        ("wrong order", "from the first layer to the last", "cfg, reverse=True)", "cfg)"),
    ),
]

IN_BLOCK = [
    ("dropped term", "the stream's gradient ends at the MLP", "dx = dx + dx2", "dx = dx2"),
    ("dropped term", "the stream's gradient ends at attention", "dx = dx + dx1", "dx = dx1"),
    ("dropped term", "no gradient through the values", "add(dhq, dhk, dhv)", "add(dhq, dhk)"),
    (
        "wrong operand",
        "queries and keys are exchanged",
        "dq, dk, dv = attend",
        "dk, dq, dv = attend",
    ),
    ("wrong operand", "gate and up are exchanged", "dgate, dup = swi", "dup, dgate = swi"),
]
"""Errors in a family's ``block_bwd``, for the families that have the line."""


def faults_of(cfg: ModelConfig, traced: Iterable[str]) -> list[Fault]:
    """The errors that can be planted in a model, op by op. Some have no effect, such as one in the
    sum over a group's heads if each head has its own keys.

    Args:
        cfg: the model.
        traced: the ops that it consists of.

    """
    present = {f"{op}_bwd" for op in traced}
    in_ops = [f for f in IN_OPS if f"{f.place}_bwd" in present]
    function = family_of(cfg).block_bwd
    source = inspect.getsource(function)
    block = [f for f in _in(function, *IN_BLOCK) if source.count(f.right) == 1]
    if cfg.num_kv_heads != cfg.num_heads:  # queries and keys have different shapes
        block = [f for f in block if "attend" not in f.right]
    return [*in_ops, *block, *IN_NETWORK]


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Within the block, replace the fault's function by the wrong version in all our modules."""
    wrong = wrong_version(fault.function, fault.right, fault.wrong)
    changes = [(fault.function, wrong)]
    if fault.function is materialised_bwd:
        # Its caller was compiled with the right version: copy it, too.
        changes.append((ops.attention_bwd, _copy(ops.attention_bwd, {"materialised_bwd": wrong})))
    with contextlib.ExitStack() as until_the_end:
        for right, other in changes:
            until_the_end.enter_context(_replaced(right, other))
        yield


@contextlib.contextmanager
def _replaced(right: Callable[..., Any], wrong: Callable[..., Any]) -> Iterator[None]:
    name = right.__name__
    modules = [module for path, module in list(sys.modules.items()) if path.startswith("gptjax")]
    holders = [module for module in modules if vars(module).get(name) is right]
    try:
        for module in holders:
            setattr(module, name, wrong)
        yield
    finally:
        for module in holders:
            setattr(module, name, right)


def wrong_version(function: Callable[..., Any], right: str, wrong: str) -> Any:
    """A function with a piece of its source replaced, in a namespace of its own.

    Raises:
        ValueError: the piece is not in the source exactly once.

    """
    count = _source(function).count(right)
    if count != 1:
        raise ValueError(f"{function.__name__} has {right!r} {count} times, not once")
    return _copy(function, {}, right, wrong)


def _copy(
    function: Callable[..., Any], names: dict[str, Any], right: str = "", wrong: str = ""
) -> Any:
    """Recompile a function from its source, with ``names`` in place of its module's globals."""
    names = vars(sys.modules[function.__module__]) | names
    source = _source(function).replace(right, wrong) if right else _source(function)
    exec(compile(source, f"<a copy of {function.__name__}>", "exec"), names)
    return names[function.__name__]


def _source(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
