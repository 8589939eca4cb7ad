"""Run a notebook as Jupyter does. ``python -m tests.notebooks.execution [NAME...]`` stores what its
cells give in it.
"""

import copy
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# They compute more than they compile, unlike what tests/conftest.py sets XLA for
TRAINING = ("03_train", "04_inside")
ANSWER = re.compile(
    r"<details><summary>Answer</summary>\n\n.*?```python\n(.*?)\n```\n\n</details>", re.S
)
# In the kernel, before the first cell. What Jupyter's own modules warn of is theirs; the cache is
# tests/conftest.py's.
STRICT = [
    "import warnings",
    'warnings.simplefilter("error")',
    'warnings.filterwarnings("ignore", module="ipykernel|jupyter|zmq|tornado")',
    'warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")',
]


def read(path: Path) -> NotebookNode:
    """The notebook, checked."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the code."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def environment_of(path: Path) -> dict[str, str]:
    """The environment of a notebook's kernel."""
    unset = {"XLA_FLAGS"} if path.stem in TRAINING else set()
    return {name: value for name, value in os.environ.items() if name not in unset}


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell has a tag."""
    return tag in cell.metadata.get("tags", ())


def exercises(notebook: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Each exercise, and the cell below it, which has the answer."""
    cells = notebook.cells
    return [
        (a, b) for a, b in zip(cells, [*cells[1:], None], strict=True) if has_tag(a, "exercise")
    ]


def with_answers(notebook: NotebookNode) -> NotebookNode:
    """A copy with a cell after each answer that fails unless it is right, and leaves no names. An
    answer stands for the exercise up to its last paragraph, which checks it.
    """
    notebook = copy.deepcopy(notebook)
    for exercise, answer in exercises(notebook):
        check = exercise.source.rpartition("\n\n")[2].replace("matches(", "verdict = matches(")
        code = f"{ANSWER.fullmatch(answer.source)[1]}\n{check}\nassert verdict, verdict"
        cell = nbformat.v4.new_code_cell(
            f"exec({code!r}, dict(globals()))", metadata={"tags": ["added"]}
        )
        notebook.cells.insert(notebook.cells.index(answer) + 1, cell)
    return notebook


def execute(notebook: NotebookNode, root: Path, environment: Mapping[str, str]) -> NotebookNode:
    """A copy with the outputs of a fresh kernel, which runs in ``root/notebooks``; a warning is an
    error.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.

    """
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=[f"--IPKernelApp.exec_lines={'; '.join(STRICT)}", "--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=dict(environment) | {"PYTHONPATH": str(ROOT)})
    return notebook


def run(path: Path, root: Path) -> NotebookNode:
    """Execute a notebook and the answers to its exercises, and return it without the latter."""
    notebook = execute(with_answers(read(path)), root, environment_of(path))
    notebook.cells = [cell for cell in notebook.cells if not has_tag(cell, "added")]
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    for number, cell in enumerate(code, 1):
        for numbered in (cell, *cell.outputs):
            if "execution_count" in numbered:
                numbered.execution_count = number
    return notebook


def main(names: list[str]) -> None:
    """Store the outputs of the notebooks whose names start with these, or of all."""
    for path in NOTEBOOKS:
        if not names or path.name.startswith(tuple(names)):
            with tempfile.TemporaryDirectory() as root:
                notebook = run(path, Path(root))
            notebook.metadata = {
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
                "source_sha256": source_hash(notebook),
            }
            path.write_text(nbformat.writes(notebook, indent=1) + "\n")
            print(f"{path.relative_to(ROOT)} {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
