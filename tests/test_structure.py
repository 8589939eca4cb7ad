"""The rules that keep the package readable, checked by a machine."""

import ast
import importlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

import gptjax
from gptjax.models import FAMILIES, gpt2, llama
from gptjax.parallel.sharding import RULES
from tests.conftest import ROOT

PACKAGE = ROOT / "gptjax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from the rooms before its own. Commands, each room's __main__ among them, come
# last and import no other.
ORDER = (
    "errors",
    "config",
    "files",
    "parallel",
    "xla",
    "ops",
    "models",
    "formats",
    "cli",
    "tokenizers",
    "datasets",
    "generate",
    "train",
    "convert",
    "evaluate",
    "verify",
    "explore",
    "chat",
    "plan",
    "bench",
    "plot",
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in it."""
    known = {name_of(p) for p in MODULES} - {"gptjax"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= modules if len(modules) == len(node.names) else modules | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def level(module: str) -> int:
    room, *rest = module.removeprefix("gptjax.").split(".")
    return len(ORDER) if rest == ["__main__"] or room == "__main__" else ORDER.index(room)


def test_the_package_has_at_most_24_entries_each_in_the_import_order():
    entries = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 24
    rooms = {p.removesuffix(".py") for p in entries if not p.startswith("__") and p != "py.typed"}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "gptjax"], ids=name_of)
def test_imports_point_one_way(path):
    room = name_of(path).split(".")[1]
    for imported in imports_of(path):
        if imported.split(".")[1] != room or level(imported) == len(ORDER):
            assert level(imported) < level(name_of(path)), f"{name_of(path)} imports {imported}"


def test_no_cycles():
    graph = {name_of(p): imports_of(p) - {name_of(p)} for p in MODULES}

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        for imported in graph[module]:
            if not module.startswith(imported + "."):
                visit(imported, [*trail, module])

    for module in graph:
        visit(module, [])


def test_type_checkers_know_the_names_that_the_package_offers():
    (block,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    )
    declared = {(node.module, alias.name) for node in block.body for alias in node.names}
    for module, name in declared:
        assert getattr(gptjax, name) is getattr(
            importlib.import_module(f"gptjax.{module}" if module else "gptjax"), name
        )
    assert {name for _, name in declared} == set(gptjax.__all__)


# --- A family is a module ---

# Who may name a family's tensors, and why.
NAMES_TENSORS = {
    "gptjax.models.gpt2": "the family itself",
    "gptjax.models.llama": "the family itself",
    "gptjax.formats.gguf": "a format's table",
    "gptjax.formats.hf": "a format's table",
    "gptjax.formats.llama2c": "a format's table",
    "gptjax.formats.llmc": "a format's table",
    "gptjax.formats.safetensors": "a format's table",
    "gptjax.plot.figures": "draws GPT-2's block for the notebooks",
}
TENSORS = {"qkvw", "qkvb"}.union(
    *(family.Params._fields + family.Block._fields for family in (gpt2, llama))
) - {"blocks"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_its_own_files_name_a_familys_tensors(path):
    found = set(re.findall(rf"\b(?:{'|'.join(TENSORS)})\b", path.read_text()))
    assert bool(found) == (name_of(path) in NAMES_TENSORS), found


def test_only_the_registry_imports_a_family():
    families = {f"gptjax.models.{name}" for name in FAMILIES}
    assert {name_of(p) for p in MODULES if imports_of(p) & families} == {"gptjax.models"}


# --- Names mean one thing ---

# Modules of one name in several rooms, which mean the same there.
SHARED_NAMES = {
    "__init__": "Python's",
    "__main__": "a room's command",
    "llama2c": "of llama2.c's files",
    "report": "prints what a command says of its subject",
    "samples": "text that a model wrote",
}


def test_modules_and_public_classes_of_one_name_mean_one_thing():
    modules, classes = defaultdict(list), defaultdict(list)
    for path in MODULES:
        modules[path.stem].append(name_of(path))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name_of(path))
    assert {name for name, where in modules.items() if len(where) > 1} == set(SHARED_NAMES)
    # Every family has these, by which the rest knows it.
    for name in ("Params", "Block", "BlockSaved"):
        assert classes.pop(name) == [f"gptjax.models.{family}" for family in FAMILIES]
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


# --- Equations are free of the compiler ---


def test_the_one_custom_derivative_binds_the_network_to_its_backward():
    """Ops stay free of custom derivatives, or JAX's gradient of the forward would be no
    reference. A form for one compiler has JAX's derivative of the plain form.
    """
    uses = {name_of(p) for p in MODULES if re.search(r"custom_[vj][jv]p\b(?!``)", p.read_text())}
    assert uses == {"gptjax.models.transformer", "gptjax.xla.forms"}


def test_ops_know_neither_the_mesh_nor_barriers():
    ops = {name_of(p): imports_of(p) for p in (PACKAGE / "ops").glob("*.py")}
    sharded = {
        name for name, found in ops.items() if any(m.startswith("gptjax.parallel") for m in found)
    }
    held_back = {name for name, found in ops.items() if "gptjax.xla.barrier" in found}
    assert sharded == {"gptjax.ops.splash"}, (
        "XLA cannot split a kernel over devices: it is called under shard_map"
    )
    assert held_back == {"gptjax.ops.kv_cache"}, (
        "the cache is updated in place only after it has been read"
    )
    assert {axis for axis in RULES if RULES[axis].compute or RULES[axis].param}, (
        "the mesh's rules are in one table"
    )


# --- The rest of the house ---


def defines_something(path: Path) -> bool:
    kinds = ast.FunctionDef | ast.ClassDef
    return any(isinstance(node, kinds) for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize("path", [p for p in MODULES if defines_something(p)], ids=name_of)
def test_every_module_has_a_test_of_its_own(path):
    """tests/ROOM/test_MODULE.py, and for a room's command tests/ROOM/test_command.py."""
    folder = ROOT / "tests" / path.relative_to(PACKAGE).parent
    if path == PACKAGE / "__main__.py":
        places = [folder / "test_main.py"]
    elif path.stem == "__init__":
        places = [
            folder / f"test_{path.parent.name}.py",
            folder.parent / f"test_{path.parent.name}.py",
        ]
    else:
        places = [folder / f"test_{'command' if path.stem == '__main__' else path.stem}.py"]
    assert any(place.exists() for place in places), places[0]


def test_what_draws_and_logs_is_imported_where_it_is_used():
    """A run pays for the extras' imports only if it asks for them; `gptjax.plot.figures` is the
    notebooks' alone.
    """
    assert not any("gptjax.plot.figures" in imports_of(path) for path in MODULES)
    for path in set(MODULES) - {PACKAGE / "plot" / "figures.py"}:
        for node in ast.parse(path.read_text()).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", "")]
            )
            assert not {str(name).split(".")[0] for name in names} & {
                "matplotlib",
                "tensorboard",
                "wandb",
            }, path


def test_nothing_is_left_to_be_filled_in():
    readmes = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *PACKAGE.glob("*/*.md")]
    for path in [*readmes, *(ROOT / "configs").iterdir()]:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", path.read_text()), path


# What reads by itself: the system's and this package's own files, what JAX has just written, and
# prompts from named pipes.
READS_ITSELF = {
    "gptjax.files",
    "gptjax.xla.cache",
    "gptjax.xla.native",
    "gptjax.bench.data",
    "gptjax.bench.profile",
    "gptjax.generate.__main__",
}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if name_of(p) not in READS_ITSELF], ids=name_of
)
def test_files_are_opened_in_one_place(path):
    """Files that come from elsewhere are read through gptjax.files, which opens no device and no
    named pipe.
    """
    reads = r'\.read_text\(|\.read_bytes\(|open\([^)]*"r[bt]?"|\bopen\(path\)|(?<!\w)open\(\)|fromfile\(path'
    found = [
        line
        for line in path.read_text().splitlines()
        if re.search(reads, line) and "open_file(" not in line
    ]
    assert not found, "use gptjax.files"


def test_every_slow_test_that_is_listed_exists():
    """By its file and name; those of parameters may be another machine's."""
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        file, name = line.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), line
