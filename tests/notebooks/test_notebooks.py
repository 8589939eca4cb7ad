"""The notebooks run as they are, what is stored in them is what they give, and their answers are
right.
"""

import ast
import re
import subprocess
import sys

import pytest

import gptjax
from tests.notebooks.execution import (
    ANSWER,
    NOTEBOOKS,
    ROOT,
    exercises,
    has_tag,
    read,
    run,
    source_hash,
)

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(e[-+]?\d+)?")
LINES, COLUMNS = 15, 88  # of a cell
AGAIN = "run python -m tests.notebooks.execution"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """What an output shows; nothing for a picture."""
    data = {"stdout": output.text} if output.output_type == "stream" else output.data
    kinds = () if "image/png" in data else ("stdout", "text/markdown", "text/plain")
    return next((data[kind] for kind in kinds if kind in data), "")


def outputs_of(cell):
    """Of each output, its kinds (stream or MIME types), and its text but for the numbers, which
    rounding may change.
    """
    found = []
    for output in cell.outputs:
        kinds = sorted(output.get("data", ["stdout"]))
        text = "" if has_tag(cell, "varies") else NUMBER.sub("0", text_of(output))
        found.append((kinds, " ".join(text.split())))
    return found


def test_there_are_seven():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_chain_rule",
        "01_forward",
        "02_backward_by_hand",
        "03_train",
        "04_inside",
        "05_your_own_backward",
        "06_llama",
    ]


@each
def test_a_notebook_begins_with_its_title_and_fits_a_page(path):
    notebook = read(path)
    assert notebook.cells[0].source.startswith("# ")
    assert path.stat().st_size < 400_000
    for cell in code_cells(notebook):
        assert cell.source.count("\n") < LINES, cell.source
        shown = [] if has_tag(cell, "varies") else map(text_of, cell.outputs)
        for text in (cell.source, *shown):
            assert max(map(len, text.splitlines()), default=0) <= COLUMNS, text
    for cell in notebook.cells:
        for code in re.findall(r"```\w*\n(.*?)```", cell.source, re.S):
            assert max(map(len, code.splitlines())) <= COLUMNS, code


@each
def test_pictures_are_drawn_out_of_sight_and_described(path):
    notebook = read(path)
    for cell in notebook.cells:
        assert not re.search(r"!\[\s*\]|<img", cell.source), "an image without alt text"
    for cell in code_cells(notebook):
        assert not re.search(r"matplotlib|\bplt\b", cell.source)
    pictures = [
        output
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", ())
    ]
    assert pictures
    for output in pictures:
        assert len(output.metadata["image/png"]["alt"]) > 30
        assert output.data["text/plain"] == output.metadata["image/png"]["alt"]


@each
def test_exercises_are_not_done_and_have_a_folded_answer(path):
    found = exercises(read(path))
    assert len(found) >= 2
    for exercise, answer in found:
        check = exercise.source.rpartition("\n\n")[2]
        assert re.search(r"^matches\(.*\)$", check, re.M | re.S)
        assert re.search("not done yet|wrong", exercise.outputs[-1].data["text/plain"])
        assert has_tag(answer, "answer")
        assert ANSWER.fullmatch(answer.source)


@each
def test_a_notebook_gives_what_is_stored_without_a_warning_and_its_answers_are_right(
    path, tmp_path
):
    stored = read(path)
    assert stored.metadata["source_sha256"] == source_hash(stored), (
        f"the code has changed since it was run: {AGAIN}"
    )
    fresh = run(path, tmp_path)
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert not [output for output in after.outputs if output.get("name") == "stderr"]
        assert outputs_of(before) == outputs_of(after), f"what is stored is out of date: {AGAIN}"


def names_used(source: str) -> set[str]:
    """The names of the package that code uses: ``gptjax.NAME`` and ``from gptjax import NAME``."""
    tree = ast.parse(source)
    direct = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    imported = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "gptjax"
    ]
    return {node.attr for node in direct if node.value.id == "gptjax"} | {
        a.name for node in imported for a in node.names
    }


def test_the_package_offers_exactly_the_names_that_the_notebooks_use():
    used = set().union(
        *(names_used(cell.source) for path in NOTEBOOKS for cell in code_cells(read(path)))
    )
    assert set(gptjax.__all__) == used | {"LanguageModel", "load"}


def test_every_name_exists_and_importing_the_package_loads_nothing():
    code = "import gptjax, sys; assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert all(getattr(gptjax, name) is not None for name in gptjax.__all__)
