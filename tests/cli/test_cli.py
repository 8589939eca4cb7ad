import gc
import subprocess
import sys
import types
import weakref

import jax
import numpy as np
import pytest

from gptjax import cli
from gptjax.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a\n  b"), 2, "prog: error: a b\n"),
        (KeyboardInterrupt(), 130, "prog: error: interrupted\n"),
        (
            OSError(28, "No space left on device", "x"),
            2,
            "prog: error: x cannot be used: No space left on device; free space",
        ),
    ],
)
def test_errors_that_a_person_can_mend(error, status, message, capsys):
    with pytest.raises(SystemExit) as stop, cli.reported_errors("prog"):
        raise error
    assert stop.value.code == status
    assert capsys.readouterr().err.startswith(message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.reported_errors("prog"):
        raise ZeroDivisionError
    with pytest.raises(OSError, match="strange"), cli.reported_errors("prog"):
        raise OSError("strange")


@pytest.mark.parametrize("words", [*cli.GIVEN_UP, "something else"])
def test_of_what_libraries_gave_up_nothing_is_shown(words, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    cli.quiet_libraries()
    unraisable = types.SimpleNamespace(exc_value=ValueError(f"{words} and more"))
    sys.unraisablehook(unraisable)
    assert shown == ([unraisable] if words == "something else" else [])


def test_a_start_looks_for_cycles_less_often():
    cli.look_for_cycles_less_often()
    gc.collect()
    cycle = ConfigError()
    cycle.self, gone = cycle, weakref.ref(cycle)
    del cycle
    kept = [[] for _ in range(40_000)]
    assert gone() is not None
    kept += [[] for _ in range(20_000)]
    assert gone() is None


def test_freed_memory_is_returned():
    """Of 64 MB in small pieces nearly all; without asking, it would stay."""
    script = """
import gptjax.cli as cli
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
cli.reuse_freed_memory()
before = resident()
pieces = [bytes(1000) for _ in range(64_000)]
last = bytes(1000)
del pieces
kept = resident() - before
cli.return_freed_memory()
print(kept, resident() - before)
"""
    if sys.platform != "linux":
        pytest.skip("glibc alone")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 48e6
    assert left < 16e6


def test_code_of_the_start_is_returned():
    """What JAX's import leaves, after the second part of an output; then it compiles as before."""
    script = """
import re
import jax, jax.numpy as jnp
import gptjax.cli as cli
def of_files():
    return int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.jit(jnp.cos)(1.0)
found = []
for part in cli.returning_startup_memory("abcd", forget=True):
    found.append(of_files())
    if part == "c":
        jax.jit(jnp.tan)(1.0)
print(*found, jax.jit(jnp.sin)(0.0), of_files())
"""
    if sys.platform != "linux":
        pytest.skip("Linux alone")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *before, third, fourth, sine, compiled = map(float, done.stdout.split())
    assert sine == 0
    assert len(before) == 2
    assert max(third, fourth) < min(before) / 3
    assert third < compiled


@pytest.mark.parametrize("forget", [True, False])
def test_programs_are_forgotten_when_two_parts_have_come(forget):
    cli.forget_traces.cache_clear()
    once = jax.jit(lambda x: x + 1)
    once(1)
    sizes = [once._cache_size() for _ in cli.returning_startup_memory("abc", forget)]
    assert sizes == [1, 1, 0 if forget else 1]


SMAPS = """\
00400000-00500000 r-xp 00000000 fe:00 123                        /a library.so (deleted)
Size:               1024 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00500000-00600000 r--p 00000000 fe:00 123                        /relocated.so
Size:               1024 kB
Anonymous:             4 kB
VmFlags: rd mr mw me
00600000-00700000 rw-p 00000000 fe:00 123                        /data.so
Anonymous:             0 kB
00700000-00800000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 fe:00 9                  /usr/lib/c.so
Anonymous:             0 kB
"""


def test_only_pages_that_a_file_still_has_are_clean():
    """Not what was relocated, can be written, or belongs to no file."""
    first, last = (0x400000, 0x500000), (0x7F0000000000, 0x7F0000001000)
    assert cli.clean_mappings(SMAPS) == [first, last]


def test_peak_memory_is_of_this_process_alone():
    """A child's is small while its parent holds 256 MB more."""
    held = np.ones(1 << 28, np.int8)
    script = "from gptjax import cli; print(cli.peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    before, mine = int(done.stdout), cli.peak_memory()
    assert 20e6 < before < mine - held.nbytes / 2
    size = held.nbytes
    del held
    assert cli.peak_memory() > mine - size / 2
