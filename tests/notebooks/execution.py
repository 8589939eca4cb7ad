"""Run a notebook as Jupyter does. ``python -m tests.notebooks.execution [NAME...]`` stores what its
cells give in it.
"""

import copy
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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


def execute(
    notebook: NotebookNode, root: Path, environment: Mapping[str, str] = os.environ
) -> NotebookNode:
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


def main(names: list[str]) -> None:
    """Store the outputs of the notebooks whose names start with these, or of all."""
    for path in NOTEBOOKS:
        if not names or path.name.startswith(tuple(names)):
            with tempfile.TemporaryDirectory() as root:
                notebook = execute(read(path), Path(root))
            notebook.metadata = {
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
                "source_sha256": source_hash(notebook),
            }
            path.write_text(nbformat.writes(notebook, indent=1) + "\n")
            print(f"{path.relative_to(ROOT)} {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
