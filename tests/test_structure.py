"""The rules that keep the package readable, checked by a machine."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "gptjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = {"verify", "bench", "generate", "plan", "datasets", "tokenizers"}
COMMANDS = {"train", "convert", "evaluate", "plot"} | {f"{package}.__main__" for package in PACKAGES}
LAYERS = {"errors": 0, "sharding": 0, "ops": 1, "models": 2}  # everything else 3, commands 4


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    known = {name_of(p) for p in MODULES} - {"gptjax"}
    return found & known


def level(module: str) -> int:
    parts = module.split(".")[1:]
    return 4 if ".".join(parts) in COMMANDS else LAYERS.get(parts[0], 3)


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "gptjax"], ids=name_of)
def test_imports_point_one_way(path):
    """Errors <- ops <- models <- everything else <- commands."""
    for imported in imports_of(path):
        assert level(imported) <= level(name_of(path)), f"{name_of(path)} imports {imported}"
        if level(name_of(path)) == 4:
            assert level(imported) < 4, "commands do not import each other"


def test_no_cycles():
    graph = {name_of(p): imports_of(p) - {name_of(p)} for p in MODULES}

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        for imported in graph[module]:
            if not module.startswith(imported + "."):
                visit(imported, [*trail, module])

    for module in graph:
        visit(module, [])


def test_what_draws_and_logs_is_imported_where_it_is_used():
    """A run pays for the extras' imports only if it asks for them; `gptjax.plot.figures` is the notebooks', and nothing imports it."""
    assert not any("gptjax.plot.figures" in imports_of(path) for path in MODULES)
    for path in set(MODULES) - {PACKAGE / "show.py"}:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not {str(name).split(".")[0] for name in names} & {"matplotlib", "tensorboard", "wandb"}, path


def test_only_one_custom_vjp_and_it_is_the_binding():
    """Ops stay free of custom derivatives, or JAX's gradient of the forward would be no reference."""
    uses = {name_of(p): len(re.findall(r"custom_[vj][jv]p\b(?!``)", p.read_text())) for p in MODULES}
    assert {name for name, count in uses.items() if count} == {"gptjax.models.gpt2"}


def test_every_module_has_a_test():
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").rglob("test_*.py")}
    covered_elsewhere = {
        "blockwise": "attention",
        "sharding": "mesh",
        "heads": "mesh",
        "pieces": "mesh",
        "precision": "linear",
        "errors": "cli",
        "config": "train",
        "curves": "plot",
        "progress": "download",
        "lazy": "convert",
        "compiled": "predict",
        "report": "command",
        "devices": "floor",
    }
    covered_elsewhere |= {"__main__": "command", "gptjax": "structure"}
    names = {name_of(p).split(".")[-1] for p in MODULES} - {"ops", "models", "formats", "verify", "bench", "generate", "plan"}
    assert {covered_elsewhere.get(n, n) for n in names} <= tests


def test_nothing_is_left_to_be_filled_in():
    for path in [ROOT / "README.md", *(ROOT / "data").glob("*.md"), *(ROOT / "configs").iterdir()]:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", path.read_text()), path


def test_the_jupyter_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "notebooks" / "README.md").read_text(), re.DOTALL)
    exec(code[1], {})
    out = capsys.readouterr().out
    assert out.count(" ok") == 16
    assert "WRONG" not in out


# What reads by itself: the system's and this package's own files, what JAX has just written, and prompts from named pipes.
READS_ITSELF = {
    "gptjax.files",
    "gptjax.xla.cache",
    "gptjax.xla.native",
    "gptjax.bench.data",
    "gptjax.bench.profile",
    "gptjax.generate.__main__",
}


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) not in READS_ITSELF], ids=name_of)
def test_files_are_opened_in_one_place(path):
    """Files that come from elsewhere are read through gptjax.files, which opens no device and no named pipe."""
    reads = r'\.read_text\(|\.read_bytes\(|open\([^)]*"r[bt]?"|\bopen\(path\)|(?<!\w)open\(\)|fromfile\(path'
    found = [line for line in path.read_text().splitlines() if re.search(reads, line) and "open_file(" not in line]
    assert not found, "use gptjax.files"
