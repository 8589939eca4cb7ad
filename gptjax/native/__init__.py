"""Kernels in C++ for CPUs, compiled when first needed by the C++ compiler that is here; without one XLA computes the same."""

import ctypes
import functools
import hashlib
import itertools
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

from gptjax.cache import compiled_folder, processor

SOURCE = Path(__file__).parent / "adamw.cc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
TARGET = "gptjax_adamw"


@functools.cache
def available() -> bool:
    """Whether the kernels can be called: JAX computes on a CPU, and they were compiled, now or before.

    ``CXX`` names the compiler, ``c++`` by default; ``CXX=false`` leaves the work to XLA.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ctypes.CDLL(str(library())).adamw), platform="cpu")
    except (OSError, subprocess.SubprocessError):  # no compiler, one that cannot do it, or no place for the result
        return False
    return True


def library() -> Path:
    """The compiled kernels: those that are kept, or new ones, which are then kept beside JAX's programs if there is a place.

    Raises:
        OSError: there is no compiler, or no place at all.
        subprocess.SubprocessError: it cannot compile them.

    """
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS, "-isystem", jax.ffi.include_dir()]
    made_of = (SOURCE.read_text(), jaxlib.__version__, processor(), *compiler)
    name = f"gptjax-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    try:
        folder = compiled_folder()
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="gptjax-"))
    path = folder / name
    if not path.exists():
        partial = path.with_name(f"{name}.{os.getpid()}")  # of this process: others may compile the same
        try:
            subprocess.run([*compiler, str(SOURCE), "-o", str(partial)], check=True, capture_output=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


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
