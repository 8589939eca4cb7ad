"""Where what is compiled for this machine's processor is kept, so that the next start need not compile it again."""

import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax


def processor() -> str:
    """The kind of processor: 12 hex digits. What was compiled for one kind may crash another."""
    cpuinfo = Path("/proc/cpuinfo")
    kind = re.search(r"^(?:flags|Features)\s*:.*", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return hashlib.sha256(f"{platform.machine()} {kind[0] if kind else platform.processor()}".encode()).hexdigest()[:12]


def compiled_folder() -> Path:
    """The folder that JAX keeps its programs in; if it keeps none, ``~/.cache/gptjax/compiled-PROCESSOR``. It is made.

    Raises:
        OSError: it cannot be made.
        RuntimeError: there is no home.

    """
    config: Any = jax.config
    configured = config.jax_compilation_cache_dir
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") if not configured else None
    folder = root / "gptjax" / f"compiled-{processor()}" if root else Path(configured)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
