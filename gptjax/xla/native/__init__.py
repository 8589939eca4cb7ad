"""AdamW in C++ for CPUs, compiled when first needed by the C++ compiler that is here; without one XLA computes the same."""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jaxtyping import Array, Float

from gptjax.xla.cache import compiled_folder, processor
from gptjax.durable import write_whole
from gptjax.errors import GptjaxError

SOURCE = Path(__file__).parent / "adamw.cc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
TARGET = "gptjax_adamw"
PATIENCE = 60  # seconds for the compiler


@functools.cache
def available() -> bool:
    """Whether `adamw` can be called: JAX computes on a CPU, and it could be compiled, now or before.

    ``CXX`` names the compiler, ``c++`` by default; ``CXX=false`` leaves the work to XLA. Why it cannot is logged.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library().adamw), platform="cpu")
    except (OSError, AttributeError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        logging.getLogger(__name__).info("AdamW is XLA's: %s %s", error, said.decode(errors="replace"))
        return False
    return True


def library() -> ctypes.CDLL:
    """The compiled code: what is kept, or made anew and then kept in `compiled_folder`, if there is such a place.

    With ``JAX_ENABLE_COMPILATION_CACHE=false`` nothing is kept.

    Raises:
        OSError: there is no compiler, or no place for what it makes.
        ValueError: ``CXX`` cannot be split into words.
        subprocess.SubprocessError: the compiler cannot compile it, or takes too long.

    """
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS, "-isystem", jax.ffi.include_dir()]
    made_of = (SOURCE.read_text(), jaxlib.__version__, processor(), *compiler)
    name = f"gptjax-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    config: Any = jax.config
    kept: Path | None = None
    if config.jax_enable_compilation_cache:
        with contextlib.suppress(OSError, RuntimeError):
            kept = compiled_folder() / name
    if kept and kept.exists():
        with contextlib.suppress(OSError, AttributeError):
            found = ctypes.CDLL(str(kept))
            _ = found.adamw  # in one that is not damaged
            return found
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        command = [*compiler, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
        found = ctypes.CDLL(str(made))  # which stays loaded
        if kept:
            with contextlib.suppress(OSError, GptjaxError), write_whole(kept) as file:
                file.write(made.read_bytes())
    return found


def adamw(
    scalars: Float[Array, " S"], tensors: Sequence[Sequence[Array]], weight_decay: Sequence[float], eps: float
) -> tuple[list[Array], list[Array], list[Array]]:
    """(parameters, first moments, second moments) after one step of AdamW; see `gptjax.optim.update`.

    Args:
        scalars: those of `gptjax.optim.Scalars`, in their order.
        tensors: float32: the parameters, their first moments, their second moments, their gradients.
        weight_decay: of each parameter.
        eps: added to the root of the second moment.

    """
    *changed, _ = tensors
    n = len(weight_decay)
    call: Any = jax.ffi.ffi_call(
        TARGET,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in itertools.chain(*changed)],
        input_output_aliases={1 + i: i for i in range(3 * n)},
    )
    decay = np.asarray(weight_decay, np.float32)
    new = call(scalars, *itertools.chain(*tensors), weight_decay=decay, eps=np.float32(eps))
    return new[:n], new[n : 2 * n], new[2 * n :]
