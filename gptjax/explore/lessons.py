"""Lessons of the page: an op's equation, derivation and code, taken from its own source."""

import ast
import inspect
import io
import keyword
import re
import textwrap
import tokenize
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple, get_args

from gptjax import ops
from gptjax.models import transformer
from gptjax.models.family import family_of
from gptjax.ops.attention import materialised_bwd, materialised_fwd

SECTIONS = ("Args:", "Returns:", "Raises:")


class Lesson(NamedTuple):
    """The text and code that the page shows of an op."""

    title: str
    text: str
    """HTML: the equation, the derivation, what is saved."""
    forward: str
    """HTML: the source of the forward."""
    backward: str
    """HTML: the source of the backward."""


def functions_of(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward of an op; for attention, the materialised ones."""
    if op == "attention":
        return materialised_fwd, materialised_bwd
    return getattr(ops, f"{op}_fwd"), getattr(ops, f"{op}_bwd")


def lesson_of(op: str) -> Lesson:
    """The lesson of an op, from its docstring and source."""
    forward, backward = functions_of(op)
    return Lesson(
        op.replace("_", " "),
        as_html(inspect.getdoc(inspect.unwrap(forward)) or ""),
        highlighted(source_of(forward)),
        highlighted(source_of(backward)),
    )


CLASSIFIER = """``scores = h W^T``, one row of the matrix W for each token of the vocabulary.

The scores of a token are the products of its position's output h with every row of W.

Derivation of the backward. It is a linear layer without a bias, so

    dh = dscores W
    dW = dscores^T h

If the classifier is tied to the token embeddings, dW is added to the embeddings' gradient. One
function computes the forward and the backward of the loss, so that the scores of only one chunk of
rows are in memory at a time.
"""

STREAM = """``x = x + branch(x)``: a block adds what its branches compute to the residual stream.

Derivation of the backward. The sum's derivative with respect to both of its terms is 1, so the
stream's gradient goes to both: unchanged along the stream, and into the branch, whose own gradient
is added to it.

    dx = dy + branch_bwd(dy)

The backward is the forward read from its last line to its first.
"""


def classifier_lesson() -> Lesson:
    """The lesson of the classifier, which is not an op of its own."""
    code = highlighted(source_of(transformer.classifier_and_grad))
    return Lesson("classifier", as_html(CLASSIFIER), "", code)


def block_lesson(cfg: Any) -> Lesson:
    """The lesson of the block of the model's family: its ops and the residual stream."""
    family = family_of(cfg)
    return Lesson(
        "block",
        as_html(STREAM),
        highlighted(source_of(family.block_fwd)),
        highlighted(source_of(family.block_bwd)),
    )


def source_of(function: Callable[..., Any]) -> str:
    """The source of a function without its docstring."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    node: Any = ast.parse(source).body[0]
    if ast.get_docstring(node) is None:
        return source
    doc, lines = node.body[0], source.splitlines(keepends=True)
    return "".join(lines[: doc.lineno - 1] + lines[doc.end_lineno :])


def argument_names(op: str) -> list[tuple[str, str]]:
    """(name, axes) of the arrays that a forward takes, in order; axes as in `gptjax.ops`."""
    parameters = inspect.signature(inspect.unwrap(functions_of(op)[0])).parameters
    return [(name, axes) for name, p in parameters.items() if (axes := _axes(p.annotation))]


def _axes(annotation: Any) -> str:
    for one in (annotation, *get_args(annotation)):
        if isinstance(axes := getattr(one, "dim_str", None), str):
            return axes or "scalar"
    return ""


def as_html(docstring: str) -> str:
    """A docstring as HTML: paragraphs, and indented lines as they stand."""
    parts = []
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines = block.splitlines()
        if lines[0].strip() in SECTIONS:
            break
        plain = [line for line in lines if not line.startswith("    ")]
        indented = [line for line in lines if line.startswith("    ")]
        if plain:
            parts.append(f"<p>{_inline(' '.join(line.strip() for line in plain))}</p>")
        if indented:
            code = escape(textwrap.dedent("\n".join(indented)).rstrip())
            parts.append(f'<pre class="math" tabindex="0">{code}</pre>')
    return "".join(parts)


def _inline(text: str) -> str:
    text = re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def highlighted(source: str) -> str:
    """Python as HTML, with its keywords, comments and strings marked."""
    lines = source.splitlines(keepends=True)
    marks: list[tuple[int, int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = {tokenize.COMMENT: "c", tokenize.STRING: "s"}.get(token.type, "")
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "k"
        if kind and token.start[0] == token.end[0]:
            marks.append((token.start[0] - 1, token.start[1], token.end[1], kind))
    out = []
    for number, line in enumerate(lines):
        at = 0
        for row, start, end, kind in marks:
            if row == number:
                out.append(escape(line[at:start]))
                out.append(f'<span class="{kind}">{escape(line[start:end])}</span>')
                at = end
        out.append(escape(line[at:]))
    return "".join(out).rstrip("\n")
