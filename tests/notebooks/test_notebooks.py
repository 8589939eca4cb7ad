"""The notebooks run as they are, and what is stored in them is what they give."""

import ast
import os
import re
import subprocess
import sys

import pytest

import gptjax
from tests.notebooks.execution import NOTEBOOKS, ROOT, execute, read, source_hash

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(e[-+]?\d+)?")
# They compute more than they compile, unlike what tests/conftest.py sets XLA for
TRAINING = ("03_train", "04_inside")
AGAIN = "run python -m tests.notebooks.execution"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(cell):
    """Of each output, its kinds (stream or MIME types), and its text but for the numbers, which
    rounding may change.
    """
    found = []
    for output in cell.outputs:
        data = {"stdout": output.text} if output.output_type == "stream" else dict(output.data)
        text = next(
            (data[kind] for kind in ("stdout", "text/markdown", "text/plain") if kind in data), ""
        )
        varies = "varies" in cell.metadata.get("tags", ()) or "image/png" in data
        found.append((sorted(data), "" if varies else " ".join(NUMBER.sub("0", text).split())))
    return found


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_forward",
        "02_backward_by_hand",
        "03_train",
        "04_inside",
        "05_your_own_backward",
    ]


@each
def test_a_notebook_is_short_and_begins_with_its_title(path):
    notebook = read(path)
    assert len(notebook.cells) <= 20
    assert notebook.cells[0].source.startswith("# ")
    assert path.stat().st_size < 300_000


@each
def test_a_notebook_runs_without_a_warning_and_gives_what_is_stored(path, tmp_path):
    stored = read(path)
    assert stored.metadata["source_sha256"] == source_hash(stored), (
        f"the code has changed since it was run: {AGAIN}"
    )
    unset = {"XLA_FLAGS"} if path.stem in TRAINING else set()
    fresh = execute(
        stored, tmp_path, {name: value for name, value in os.environ.items() if name not in unset}
    )
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
    assert set(gptjax.__all__) == used


def test_every_name_exists_and_importing_the_package_loads_nothing():
    code = "import gptjax, sys; assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert all(getattr(gptjax, name) is not None for name in gptjax.__all__)
