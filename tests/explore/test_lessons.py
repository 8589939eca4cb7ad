import html
import re

import pytest

from gptjax import ops
from gptjax.explore import lessons
from tests.models import tiny

OPS = [name.removesuffix("_bwd") for name in ops.__all__ if name.endswith("_bwd")]


def text_of(markup):
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_an_equation_a_derivation_and_its_code(op):
    lesson = lessons.lesson_of(op)
    text = text_of(lesson.text)
    assert lesson.text.startswith("<p>")
    assert "Derivation of the backward" in text
    assert "Raises:" not in text
    for function, markup in zip(
        lessons.functions_of(op), (lesson.forward, lesson.backward), strict=True
    ):
        code = text_of(markup)
        assert code == lessons.source_of(function).rstrip("\n")
        assert f"def {function.__name__}(" in code
        assert '"""' not in code


def test_arguments_are_named_with_their_axes():
    assert lessons.argument_names("linear") == [("x", "B T *I"), ("w", "..."), ("b", "*O")]
    names = [name for name, _ in lessons.argument_names("attention")]
    assert names[:3] == ["q", "k", "v"]


def test_what_no_op_holds_has_a_lesson_too():
    classifier, block = lessons.classifier_lesson(), lessons.block_lesson(tiny.config())
    assert "dscores" in classifier.text
    assert "def block_fwd" in text_of(block.forward)
    assert "def block_bwd" in text_of(block.backward)


def test_docstrings_become_paragraphs_and_equations():
    doc = "``a < b`` and `c`.\n\nThen\n\n    x = 1\n      y\n\nArgs:\n    z: no.\n"
    assert lessons.as_html(doc) == (
        "<p><code>a &lt; b</code> and <code>c</code>.</p><p>Then</p>"
        '<pre class="math" tabindex="0">x = 1\n  y</pre>'
    )
