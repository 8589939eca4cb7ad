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
    """The folder that JAX keeps its programs in, made; if it keeps none, or far away, ``~/.cache/gptjax/compiled-PROCESSOR``.

    Raises:
        OSError: it cannot be made.
        RuntimeError: there is no home.

    """
    config: Any = jax.config
    configured = config.jax_compilation_cache_dir
    if configured and "://" not in configured:
        folder = Path(configured)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax" / f"compiled-{processor()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
