"""JAX's strictest settings, shapes checked by a machine, and where outside data may be found."""

import atexit
import gc
import itertools
import os
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: leave LLVM's slow passes out, and give it each program
# in one piece.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
# Emit fusions without MLIR; XLA ends a process whose flags it does not know
if version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"

# What one test has compiled, no other process of this session compiles again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gptjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # JAX writes an entry in place: one that reads it half written warns, compiles by itself, and
    # loses nothing. Commands and these tests' own processes check the entries (see below); what a
    # test runs with JAX alone does not.
    HALF_WRITTEN = "ignore:Error reading persistent compilation cache entry:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(
        filter(None, [os.environ.get("PYTHONWARNINGS"), HALF_WRITTEN])
    )

from jaxtyping import install_import_hook

# Before anything imports them
install_import_hook(("gptjax.ops", "gptjax.models"), "beartype.beartype")

from pathlib import Path

import hypothesis
import jax
import pytest
from hypothesis import Phase

from gptjax.xla import native
from gptjax.xla.cache import replace_damaged_programs

replace_damaged_programs()  # before anything is compiled
jax.config.update("jax_enable_x64", True)
# Simulated, for tests/test_mesh.py; everything else uses the first
jax.config.update("jax_num_cpu_devices", 8)

# Deterministic, so that a failure is the code's; no deadline, because compiling takes as long as it
# takes.
hypothesis.settings.register_profile(
    "gptjax", deadline=None, derandomize=True, max_examples=8, database=None
)
# For a mutation run, `--hypothesis-profile mutation`: whether an example fails matters, not which
# one is the smallest.
hypothesis.settings.register_profile(
    "mutation", parent=hypothesis.settings.get_profile("gptjax"), phases=[Phase.generate]
)
hypothesis.settings.load_profile("gptjax")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def search_for_cycles():
    """Commands look for them less often, and what they leave would be found in another test."""
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)


@pytest.fixture
def strict():
    """No implicit change of dtype or rank: for code that is all ours."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def in_cpp(monkeypatch):
    """`in_cpp(False)` makes XLA compute what C++ could. JAX forgets what it traced before and since,
    but not the programs of a `LastingJit`.
    """

    def choose(yes):
        if not yes:
            monkeypatch.setattr(native, "available", lambda kernel: False)
        jax.clear_caches()

    yield choose
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that is not part of the project; tests that need it are skipped where it is
    absent.
    """
    path = Path(os.environ.get("GPTJAX_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("needs the data that GPTJAX_SHARED names")
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow what `slow.txt` lists: the tests that take longest."""
    listed = set((Path(__file__).parent / "slow.txt").read_text().splitlines())
    for item in items:
        if item.nodeid.removeprefix("tests/") in listed:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    """The score of the errors planted in tests/verify/test_mutations.py, and the faults of
    tests/faults.
    """
    reports = {
        name: [r for r in terminalreporter.stats.get(name, []) if r.when == "call"]
        for name in ("passed", "failed")
    }
    found, missed = (
        sum("test_mutations.py::test_an_error_in_" in r.nodeid for r in group)
        for group in reports.values()
    )
    if found or missed:
        terminalreporter.write_line(f"planted errors found: {found} of {found + missed}")
    faults: Counter[str] = Counter()
    holds: Counter[str] = Counter()
    for report in itertools.chain(*reports.values()):
        for name, value in report.user_properties:
            if name == "fault":
                kind, tried, held = value
                faults[kind] += tried
                holds[kind] += held
    for kind in sorted(faults):
        terminalreporter.write_line(f"{kind:<48} tried {faults[kind]:>6}   held {holds[kind]:>6}")
