"""Kernels in C++ for CPUs: AdamW, and for decoding, products with stored weights and attention.

The C++ compiler that is here compiles each when it is first needed; without one XLA computes the
same.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gptjax.errors import ConfigError, GptjaxError
from gptjax.files import write_whole
from gptjax.xla.cache import compiled_folder, processor, read_private

FOLDER = Path(__file__).parent
HEADERS = tuple(
    FOLDER / name for name in ("isa.h", "parallel.h", "product_x86.inc", "product_avx512.inc")
)
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
Kernel = Literal["adamw", "product", "attention"]
"""A function of KERNEL.cc; XLA calls it gptjax_KERNEL."""
ISA = "GPTJAX_NATIVE_ISA"  # the environment variable that names one of these instruction sets
ISAS = ("avx512vnni", "avxvnni", "avx2", "portable")
PATIENCE = 120  # seconds for the compiler
LEFT_ALONE = 24 * 60 * 60  # seconds for which a compiler that took longer is not asked again
LOADS = "import ctypes, sys; ctypes.CDLL(sys.argv[1])[sys.argv[2]]"


def available(kernel: Kernel) -> bool:
    """Whether XLA can call a kernel; otherwise it does the work itself."""
    return registered(kernel) is not None


def on_cpu(kernel: Kernel, call: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``, which calls the kernel, on a CPU that has it; elsewhere ``plain(*args)``."""
    if not available(kernel):
        return plain(*args)
    return lax.platform_dependent(*args, cpu=call, default=plain)


@functools.cache
def registered(kernel: Kernel) -> ctypes.CDLL | None:
    """The library of a kernel, which XLA can call; None if JAX does not compute on a CPU, or the
    kernel could not be compiled, now or before.

    ``CXX`` names the compiler, ``c++`` by default; ``CXX=false`` leaves the work to XLA. Why it
    cannot be compiled is logged. ``GPTJAX_NATIVE_ISA`` names one of `instruction_sets`; by default
    each kernel takes the best that it has. AdamW has versions for portable and AVX2 only, attention
    also one for AVX-512.

    Raises:
        ConfigError: it names another.

    """
    if jax.default_backend() != "cpu":
        return None
    isa = os.environ.get(ISA) or None
    if isa and isa not in ISAS:
        raise ConfigError(f"{ISA} is {isa!r}: choose {', '.join(ISAS[:-1])} or {ISAS[-1]}")
    try:
        found = library(kernel)
        capsule = jax.ffi.pycapsule(found[kernel])
        jax.ffi.register_ffi_target(f"gptjax_{kernel}", capsule, platform="cpu")
    except (OSError, AttributeError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        logging.getLogger(__name__).info(
            "%s is computed by XLA: %s %s", kernel, error, said.decode(errors="replace")
        )
        return None
    if kernel == "product":
        found.instruction_set.restype = ctypes.c_char_p
        use_instruction_set(found, isa or instruction_sets(found)[0])
    return found


def instruction_sets(found: ctypes.CDLL) -> list[str]:
    """Those of `ISAS` that products can use on this processor, the best first; portable is plain
    C++.

    Args:
        found: the library of ``product``.

    """
    names = (found.instruction_set(index) for index in itertools.count())
    return [name.decode() for name in itertools.takewhile(bool, names)]


def instruction_set_in_use() -> str:
    """The one that products use; empty if XLA does the work."""
    found = registered("product")
    return found.instruction_set(-1).decode() if found else ""


def use_instruction_set(found: ctypes.CDLL, name: str) -> None:
    """Let products use it from now on.

    Raises:
        ConfigError: this processor does not have it.

    """
    known = instruction_sets(found)
    if name not in known:
        raise ConfigError(
            f"{ISA} is {name!r}, which this processor does not have: choose {' or '.join(known)}"
        )
    found.use_instruction_set(known.index(name))


def library(kernel: Kernel) -> ctypes.CDLL:
    """The compiled code of a kernel: what is kept, or made anew and then kept in `compiled_folder`,
    if there is such a place.

    What is kept is loaded only if it has the SHA-256 recorded beside it, and nobody else can have
    written either (`gptjax.xla.cache.read_private`). With ``JAX_ENABLE_COMPILATION_CACHE=false``
    nothing is kept.

    Raises:
        OSError: there is no compiler, or no place for what it makes.
        ValueError: ``CXX`` cannot be split into words. subprocess.SubprocessError: the compiler
        cannot compile it, or takes too long, now or less than a day ago.

    """
    sources = (path.read_text() for path in (source(kernel), *HEADERS))
    made_of = (*sources, jaxlib.__version__, processor(), *compiler())
    name = f"gptjax-{kernel}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    config: Any = jax.config
    kept: Path | None = None
    if config.jax_enable_compilation_cache:
        with contextlib.suppress(OSError, RuntimeError):
            kept = compiled_folder() / name
    if kept:
        with contextlib.suppress(OSError, AttributeError):
            return load(kernel, read_kept(kept))
    code = compiled(kernel, compiler(), kept and kept.with_suffix(".slow"))
    found = load(kernel, code)
    if kept:
        with contextlib.suppress(OSError, GptjaxError):
            for path, content in ((kept, code), (recorded(kept), sha256(code).encode())):
                with write_whole(path) as file:
                    # Whatever the umask: `read_private` takes nothing that others can write
                    os.fchmod(file.fileno(), 0o600)
                    file.write(content)
    return found


def source(kernel: Kernel) -> Path:
    """The file that the compiler is given."""
    return FOLDER / f"{kernel}.cc"


def read_kept(path: Path) -> bytes:
    """The compiled code kept as ``path``.

    Raises:
        OSError: there is none, or it is not to be trusted.

    """
    code = read_private(path)
    if read_private(recorded(path)).decode(errors="replace") != sha256(code):
        raise OSError(f"{path} does not have the SHA-256 recorded beside it")
    return code


def recorded(path: Path) -> Path:
    """Where the SHA-256 of ``path`` is recorded."""
    return path.with_name(f"{path.name}.sha256")


def sha256(code: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(code).hexdigest()


def load(kernel: Kernel, code: bytes) -> ctypes.CDLL:
    """Load compiled code from a copy that no one else can see, so that nothing changes what was
    checked or is running.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native.so"
        path.write_bytes(code)
        found = ctypes.CDLL(str(path))  # which stays loaded
    _ = found[kernel]
    return found


def compiler() -> list[str]:
    """The compiler's command and options."""
    return [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS, "-isystem", jax.ffi.include_dir()]


def compiled(kernel: Kernel, command: Sequence[str], slow: Path | None) -> bytes:
    """What the compiler makes of a kernel's source. That it can be loaded is tried in another
    process, which it may crash.

    Args:
        kernel: its name.
        command: `compiler`'s.
        slow: a file that says when the compiler took too long; it is then not asked again for a
            day.

    """
    with contextlib.suppress(OSError):
        if slow and 0 <= time.time() - slow.stat().st_mtime < LEFT_ALONE:
            raise subprocess.SubprocessError(
                f"{command[0]} took too long less than a day ago: delete {slow}, or name another "
                "compiler in CXX, to try again"
            )
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "native.so"
        try:
            run([*command, str(source(kernel)), "-o", str(made)])
        except subprocess.TimeoutExpired:
            if slow:
                with contextlib.suppress(OSError, GptjaxError), write_whole(slow) as file:
                    said = f"{command[0]} took more than {PATIENCE} s. Delete this to try again.\n"
                    file.write(said.encode())
            raise
        run([sys.executable, "-I", "-c", LOADS, str(made), kernel])
        return made.read_bytes()


def run(command: Sequence[str]) -> None:
    """Run a command for at most `PATIENCE` seconds, then end what is left of it and of all that it
    started.

    Raises:
        OSError: it cannot be started.
        subprocess.SubprocessError: it failed, or took too long.

    """
    null = subprocess.DEVNULL
    # A pipe would stay open as long as any child of the command
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=said, start_new_session=True
        )
        try:
            status = process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status:
            said.seek(0)
            raise subprocess.CalledProcessError(status, command, stderr=said.read(10_000))


def adamw(
    scalars: Float[Array, " S"],
    tensors: Sequence[Sequence[Array]],
    weight_decay: Sequence[float],
    eps: float,
) -> tuple[list[Array], list[Array], list[Array]]:
    """(parameters, first moments, second moments) after one step of AdamW; see
    `gptjax.train.optimizer.update`.

    Args:
        scalars: those of `gptjax.train.optimizer.Scalars`, in their order.
        tensors: float32: the parameters, their first moments, their second moments, their
            gradients.
        weight_decay: of each parameter.
        eps: added to the root of the second moment.

    """
    *changed, _ = tensors
    n = len(weight_decay)
    call: Any = jax.ffi.ffi_call(
        "gptjax_adamw",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in itertools.chain(*changed)],
        input_output_aliases={1 + i: i for i in range(3 * n)},
    )
    decay = np.asarray(weight_decay, np.float32)
    new = call(scalars, *itertools.chain(*tensors), weight_decay=decay, eps=np.float32(eps))
    return new[:n], new[n : 2 * n], new[2 * n :]


def products(
    x: Float[Array, "M I"],
    weights: Sequence[Sequence[Array]],
    outputs: Sequence[int],
    layer: Int[Array, ""],
) -> list[Float[Array, "M O"]]:
    """``x w^T`` for each weight w of a layer, in one call.

    Args:
        x: a few rows, float32.
        weights: of each, the matrices of L layers in bfloat16, (L, O, I); or, if they are in blocks
            (`gptjax.ops.quantized.Blocks`), the integers, the scales and the minima, if there are
            any, (L, ...).
        outputs: O of each.
        layer: the one of the L that x is multiplied with.

    """
    known = [("int8", 2), ("uint8", 2), ("uint8", 3), ("bfloat16", 1)]
    kinds = [known.index((arrays[0].dtype.name, len(arrays))) for arrays in weights]
    call: Any = jax.ffi.ffi_call(
        "gptjax_product", [jax.ShapeDtypeStruct((x.shape[0], size), x.dtype) for size in outputs]
    )
    return list(
        call(
            x,
            jnp.asarray(layer, jnp.int32),
            *itertools.chain(*weights),
            kinds=np.asarray(kinds, np.int32),
        )
    )


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    past: tuple[Float[Array, "L B K S D"], Float[Array, "L B K S D"]],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
    begin: Int[Array, " B"],
) -> Float[Array, "B T H D"]:
    """Attention of T new positions, see `gptjax.ops.kv_cache.cached_attention`; in float32, with
    keys and values all in float32 or all in float16.
    """
    call: Any = jax.ffi.ffi_call("gptjax_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, k, v, *past, jnp.asarray(layer, jnp.int32), begin, jnp.asarray(slot, jnp.int32))
