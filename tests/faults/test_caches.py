"""Damaged and planted files where compiled code is kept: none is loaded, and every start computes
what it should.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax._src.lru_cache import LRUCache

from gptjax.xla import native
from gptjax.xla.cache import CheckedPrograms
from tests.faults.tally import trials

NOBODY = 65534


def truncated(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def flipped(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.randint(1, 5)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed) if bytes(changed) != content else truncated(content, generator)


def garbage(content: bytes, generator: random.Random) -> bytes:
    return generator.randbytes(generator.randrange(2 * len(content)))


DAMAGES = [truncated, flipped, garbage]


@pytest.fixture(scope="module")
def code() -> bytes:
    """The library as the compiler makes it."""
    if not native.available("adamw"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    return native.compiled("adamw", native.compiler(), None)


@pytest.fixture
def kept(code, monkeypatch, tmp_path) -> Path:
    """The library kept in a folder of its own; the compiler takes no time."""
    monkeypatch.setattr(native, "compiled_folder", lambda: tmp_path)
    monkeypatch.setattr(native, "compiled", lambda *_: code)
    native.library("adamw")
    (path,) = tmp_path.glob("*.so")
    return path


@pytest.fixture
def loaded(monkeypatch) -> list[bytes]:
    """What is loaded, whether it works or not; nothing really is."""
    loads: list[bytes] = []
    monkeypatch.setattr(native, "load", lambda kernel, code: loads.append(code))
    return loads


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["library", "hash"])
def test_a_damaged_library_is_never_loaded(code, kept, loaded, tally, damage, which):
    path = kept if which == "library" else native.recorded(kept)
    whole, generator = path.read_bytes(), random.Random(0)
    tried, held = trials(20), 0
    for _ in range(tried):
        path.write_bytes(damage(whole, generator))
        loaded.clear()
        native.library("adamw")
        held += loaded == [code] and path.read_bytes() == whole
    tally(f"library: {which} {damage.__name__}", tried, held)


def plant(kept: Path, how: str) -> None:
    """Put another library, with its hash, where the kept one was."""
    planted = b"another"
    files = {kept: planted, native.recorded(kept): native.sha256(planted).encode()}
    for path, content in files.items():
        path.unlink()
        if how == "link":
            elsewhere = path.with_name(f"planted-{path.name}")
            elsewhere.write_bytes(content)
            elsewhere.chmod(0o600)
            path.symlink_to(elsewhere)
        elif how == "pipe":
            os.mkfifo(path, 0o600)
        else:
            path.write_bytes(content)
            path.chmod({"writable by the group": 0o660, "writable by all": 0o606}.get(how, 0o600))
        if how == "another user's":
            os.chown(path, NOBODY, NOBODY)
    if how == "in a folder writable by all":
        kept.parent.chmod(0o777)
    if how == "in another user's folder":
        os.chown(kept.parent, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "how",
    ["link", "pipe", "writable by the group", "writable by all", "in a folder writable by all"],
)
def test_a_planted_library_is_never_loaded(code, kept, loaded, tally, how):
    plant(kept, how)
    native.library("adamw")
    tally(f"library planted: {how}", 1, loaded == [code])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("how", ["another user's", "in another user's folder"])
def test_another_users_library_is_never_loaded(code, kept, loaded, tally, how):
    plant(kept, how)
    native.library("adamw")
    tally(f"library planted: {how}", 1, loaded == [code])


def test_what_only_this_user_can_have_planted_is_loaded(kept, loaded):
    """So that the tests above fail for the reason that they name."""
    plant(kept, "by this user")
    native.library("adamw")
    assert loaded == [b"another"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_never_run(tmp_path, tally, damage):
    store, generator = CheckedPrograms(LRUCache(str(tmp_path), max_size=-1)), random.Random(0)
    program = generator.randbytes(3000)
    tried, held = trials(100), 0
    for _ in range(tried):
        store.put("key", program)
        (path,) = tmp_path.iterdir()
        path.write_bytes(damage(path.read_bytes(), generator))
        absent = store.get("key") is None
        store.put("key", program)
        held += absent and store.get("key") == program
    tally(f"JAX's program {damage.__name__}", tried, held)


START = """
import json, jax, jax.numpy as jnp
from gptjax.xla.cache import enable_compilation_cache
enable_compilation_cache()
from gptjax.xla import native
assert native.available("adamw")

@jax.jit
def first_step(p, g):
    scalars = jnp.array([0.9, 0.1, 0.99, 0.1, 10, 100, 0.5, 1], jnp.float32)
    return native.adamw(scalars, [[p], [0 * p], [0 * p], [g]], [0.1], 1e-8)[0][0]

print(json.dumps(first_step(jnp.arange(5, dtype=jnp.float32), jnp.array([1, -2, 3, -4, 0], jnp.float32)).tolist()))
"""


def test_every_start_computes_the_right_update(code, tmp_path, tally):
    """Real starts, one after another in the same folder, each after other damage to all that is
    kept there.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    expected = np.arange(5) - 0.5 * (np.array([1, -1, 1, -1, 0]) + 0.1 * np.arange(5))
    generator = random.Random(0)
    damages = [None, *(generator.choice(DAMAGES) for _ in range(trials(2))), "writable by all"]
    held = 0
    for damage in damages:
        if damage == "writable by all":
            tmp_path.chmod(0o777)
        elif damage:
            for path in tmp_path.iterdir():
                path.write_bytes(damage(path.read_bytes(), generator))
        command = [sys.executable, "-W", "error", "-c", START]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        told = "compiled programs are not cached" in result.stderr
        right = result.returncode == 0 and np.allclose(
            json.loads(result.stdout), expected, rtol=1e-6
        )
        held += bool(right) and told == (damage == "writable by all")
    tally("starts after damage to all that is compiled", len(damages), held)
